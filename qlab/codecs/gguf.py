"""GGUF: the tensors of one file under the names of a model, through the `gguf` package.

The codes of Q4_0 and Q8_0 are kept (gguf_blocks.py). The package dequantizes every other kind: a
Q4_1 block is q * d + m, whose zero point -m / d no dtype holds exactly.

GGUF has its own names for tensors, which the package maps. For the architecture "llama" it stores
the rows of q and k with the two halves of a rotation interleaved; that order is made and undone
here.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from qlab.algebra.qtensor import Leaf, QTensor
from qlab.codecs import gguf_blocks, gguf_header
from qlab.errors import QlabError, first_line

# general.architecture -> whether rows of q and k are interleaved. Files of other architectures
# change weights in further ways.
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}
# Factors of rotary frequencies, which transformers does not read into a config.
SCALED_ROTARY = "rope_freqs.weight"
# kind of a tensor -> (numbers in a block, bytes of a block)
SIZES = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
BITS = {kind: bits for bits, kind in gguf_blocks.KINDS.items()}
# Tensors whose rows are interleaved -> the key that says how many heads they have.
HEADS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}


def tensors(path: Path, names: Collection[str]) -> Iterator[tuple[str, str, Leaf]]:
    """(name, kind, leaf) of every parameter of `names` in the file, one at a time. A head that is
    tied to the embedding has no tensor.

    kind: how the file stores the tensor ("Q4_0", "Q6_K", "F32").
    Refuses a file that is no GGUF, an architecture whose weights qlab cannot restore, parameters
    without a tensor, and tensors without a parameter.
    """
    reader, arch = opened(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    blocks = blocks_of(path, reader, arch)
    names_in_file = _names(path, arch, blocks, names, stored)
    if SCALED_ROTARY in stored:
        raise QlabError(
            f"{path} holds {SCALED_ROTARY}: its rotary frequencies are scaled, which no config "
            "made of the file says; quantize the model from its safetensors files"
        )
    unused = sorted(stored.keys() - set(names_in_file.values()))
    if unused:
        raise QlabError(
            f"{path} holds {unused[0]}, for which the model has no parameter; "
            "the file is of another model"
        )
    for name, file_name in names_in_file.items():
        leaf = _leaf(f"{path}: {file_name}", stored[file_name])
        count_of_heads = heads_key(arch, file_name)
        if count_of_heads:
            heads = _field(path, reader, f"{arch}.{count_of_heads}", int)
            leaf = _halves_apart(f"{path}: {file_name}", leaf, heads)
        yield name, stored[file_name].tensor_type.name, leaf


def opened(path: Path) -> tuple[Any, str]:
    """The package's reader of a file, and the file's architecture; refuses a file that is no GGUF,
    an architecture whose weights qlab cannot restore."""
    reader = _reader(path)
    arch = _field(path, reader, "general.architecture", str)
    if arch not in ARCHITECTURES:
        raise QlabError(
            f"{path} holds a model of architecture {arch!r}; qlab reads "
            f"{', '.join(ARCHITECTURES)}: convert it to safetensors with transformers first"
        )
    return reader, arch


def blocks_of(path: Path, reader: Any, arch: str) -> int:
    """How many blocks a file says that its model has; refuses more than it has tensors."""
    blocks: int = _field(path, reader, f"{arch}.block_count", int)
    if not 0 < blocks <= len(reader.tensors):
        raise QlabError(
            f"{path} says that it has {blocks} blocks and holds {len(reader.tensors)} tensors; "
            "download it again"
        )
    return blocks


def _reader(path: Path) -> Any:
    try:
        gguf_header.check(path, SIZES)
        return gguf.GGUFReader(path)
    except Exception as error:  # whatever parsing bytes as numbers, lengths and text runs into
        raise QlabError(
            f"{path} is truncated or not a GGUF file ({first_line(error)}); download it again"
        ) from error


def fields(reader: Any) -> dict[str, Any]:
    """Every key of the file with its value; None for a text that is not UTF-8."""
    return {name: _contents(field) for name, field in reader.fields.items()}


def _contents(field: Any) -> Any:
    try:
        return field.contents()
    except UnicodeDecodeError:
        return None


def _field(path: Path, reader: Any, name: str, kind: type) -> Any:
    """The value of a key; refuses a file without it, and a value of another type."""
    field = reader.get_field(name)
    value = _contents(field) if field else None
    if not isinstance(value, kind):
        raise QlabError(f"{path} does not say its {name}; download it again")
    return value


def _names(
    path: Path, arch: str, blocks: int, names: Collection[str], stored: Collection[str]
) -> dict[str, str]:
    """Name of a parameter of the model -> name of its tensor in the file."""
    names_in_file: dict[str, str] = {}
    for name, file_name in file_names(arch, blocks, names).items():
        if file_name is not None and file_name in stored:
            names_in_file[name] = file_name
        elif file_name != "output.weight":  # a head that is tied to the embedding
            raise QlabError(f"{path} has no tensor for {name}; the file is of another model")
    return names_in_file


def file_names(arch: str, blocks: int, names: Collection[str]) -> dict[str, str | None]:
    """Name of a parameter of the model -> how the format calls it; None where it has no name."""
    [key] = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch]
    table = gguf.get_tensor_name_map(key, blocks)
    called: dict[str, str | None] = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        base = table.get_name(module)
        called[name] = f"{base}.{kind}" if base else None
    return called


def heads_key(arch: str, file_name: str) -> str | None:
    """The key that says how many heads a tensor has, where the file interleaves its rows."""
    return HEADS.get(file_name.split(".")[-2]) if ARCHITECTURES[arch] else None


def _leaf(where: str, tensor: Any) -> Leaf:
    """The content of a tensor: codes where qlab keeps them, else floats."""
    kind = tensor.tensor_type
    if kind.name in BITS and len(tensor.shape) == 2:
        return gguf_blocks.codes_of(torch.from_numpy(np.array(tensor.data)), BITS[kind.name])
    if tensor.data.dtype in (np.float32, np.float16):
        return torch.from_numpy(np.array(tensor.data))
    try:
        return torch.from_numpy(gguf.dequantize(tensor.data, kind))
    except NotImplementedError as error:
        raise QlabError(
            f"{where} is stored as {kind.name}, which the gguf package does not dequantize; "
            "convert the file"
        ) from error


def _halves_apart(where: str, leaf: Leaf, heads: int) -> Leaf:
    """The rows of every head in their own order; the file has them as 0, d/2, 1, d/2 + 1, ..."""
    rows = leaf.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise QlabError(
            f"{where} has {rows} rows, which {heads} heads do not divide; download the file again"
        )
    order = torch.arange(rows).view(heads, -1, 2).mT.flatten()
    if isinstance(leaf, Tensor):
        return leaf[order]
    return QTensor(leaf.codes[order], leaf.scales[order], None, leaf.spec)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `_halves_apart`: rows of any content as the file has them."""
    return rows[torch.arange(len(rows)).view(heads, 2, -1).mT.flatten()]
