"""GGUF: the tensors of one file under the names of a model, through the `gguf` package.

The codes of Q4_0 and Q8_0 are kept (gguf_blocks.py). The package dequantizes every other kind: a
Q4_1 block is q * d + m, whose zero point -m / d no dtype holds exactly.

GGUF has its own names for tensors, which the package maps; all experts of a projection are one
tensor. Of some architectures it stores the rows of q and k with the two halves of a rotation
interleaved, or norms otherwise (gguf_models.py); both are made and undone here.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from qlab.algebra.qtensor import Leaf, QTensor
from qlab.codecs import gguf_blocks, gguf_header
from qlab.codecs.gguf_models import FOREIGN, MODELS, written_as
from qlab.errors import QlabError, first_line

RECORDED = "qlab.json"  # the key of what qlab says of a file that it wrote
STACKED = "_exps."  # in the name of a tensor that is of all experts
EXPERT = re.compile(r"\.experts\.(\d+)\.")
# Factors of rotary frequencies, which transformers does not read into a config.
SCALED_ROTARY = "rope_freqs.weight"
# kind of a tensor -> (numbers in a block, bytes of a block)
SIZES = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
BITS = {kind: bits for bits, kind in gguf_blocks.KINDS.items()}
# What models call their head, for which the format has no name where it is always tied.
HEAD = gguf.TensorNameMap.mappings_cfg[gguf.MODEL_TENSOR.OUTPUT]
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
    if SCALED_ROTARY in stored and RECORDED not in reader.fields:
        raise QlabError(
            f"{path} holds {SCALED_ROTARY}: its rotary frequencies are scaled, which no config "
            "made of the file says; quantize the model from its safetensors files"
        )
    unused = sorted(stored.keys() - set(names_in_file.values()) - {SCALED_ROTARY})
    if unused:
        raise QlabError(
            f"{path} holds {unused[0]}, for which the model has no parameter; "
            "the file is of another model"
        )
    for name, file_name in names_in_file.items():
        expert = expert_of(name)
        leaf = _leaf(f"{path}: {file_name}", stored[file_name], expert)
        count_of_heads = heads_key(arch, file_name)
        if count_of_heads:
            heads = _field(path, reader, f"{arch}.{count_of_heads}", int)
            leaf = _halves_apart(f"{path}: {file_name}", leaf, heads)
        if isinstance(leaf, Tensor):
            leaf = written_as(arch).restored(name, leaf)
        yield name, stored[file_name].tensor_type.name, leaf


def opened(path: Path) -> tuple[Any, str]:
    """The package's reader of a file, and the file's architecture; refuses a file that is no GGUF,
    an architecture whose weights qlab cannot restore."""
    reader = _reader(path)
    arch: str = _field(path, reader, "general.architecture", str)
    own = [model.arch for model in MODELS.values()] if RECORDED in reader.fields else []
    if arch not in (*FOREIGN, *own):
        raise QlabError(
            f"{path} holds a model of architecture {arch!r}; qlab reads "
            f"{', '.join(FOREIGN)}: convert it to safetensors with transformers first"
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
        elif name.rpartition(".")[0] not in HEAD:  # it is tied to the embedding
            raise QlabError(f"{path} has no tensor for {name}; the file is of another model")
    return names_in_file


def file_names(arch: str, blocks: int, names: Collection[str]) -> dict[str, str | None]:
    """Name of a parameter of the model -> how the format calls it; None where it has no name."""
    [key] = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch]
    table = gguf.get_tensor_name_map(key, blocks)
    called: dict[str, str | None] = {}
    for name in names:
        module, _, kind = EXPERT.sub(".experts.", name).rpartition(".")
        base = table.get_name(module)
        called[name] = f"{base}.{kind}" if base else None
    return called


def expert_of(name: str) -> int | None:
    """Which of the experts a weight is of; None for a weight that is no expert's."""
    found = EXPERT.search(name)
    return int(found[1]) if found else None


def heads_key(arch: str, file_name: str) -> str | None:
    """The key that says how many heads a tensor has, where the file interleaves its rows."""
    return HEADS.get(file_name.split(".")[-2]) if written_as(arch).interleaved else None


def _leaf(where: str, tensor: Any, expert: int | None) -> Leaf:
    """The content of a tensor, or of its part of one expert: codes where qlab keeps them, else
    floats."""
    kind, data = tensor.tensor_type, tensor.data
    if expert is not None:
        if data.ndim != 3 or expert >= len(data):
            raise QlabError(f"{where} has no expert {expert}; download the file again")
        data = data[expert]
    if kind.name in BITS and data.ndim == 2:
        return gguf_blocks.codes_of(torch.from_numpy(np.array(data)), BITS[kind.name])
    if data.dtype in (np.float32, np.float16):
        return torch.from_numpy(np.array(data))
    try:
        return torch.from_numpy(gguf.dequantize(data, kind))
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
