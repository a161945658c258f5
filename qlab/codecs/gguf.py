"""GGUF: the tensors of one file under a model's own names; read only, through the `gguf` package.

Q4_0 and Q8_0 stay codes: blocks of 32 along a row, one float16 scale each, W = q * d with q in [-8,
7] or [-128, 127]. Every other kind is dequantized by the package: a Q4_1 block is q * d + m, whose
zero point -m / d no dtype holds exactly.

GGUF has names of its own for tensors, which the package maps, and stores the rows of q and k of the
architecture "llama" with the two halves of a rotation side by side; that order is undone here.
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from qlab.algebra.qtensor import Leaf, QTensor
from qlab.algebra.spec import Int, Tile
from qlab.errors import QlabError

BLOCK = 32
# general.architecture -> whether rows of q and k are interleaved; the weights of others are changed
# in further ways
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}
# factors of rotary frequencies, which transformers does not read into a config
SCALED_ROTARY = "rope_freqs.weight"


def tensors(path: Path, names: Collection[str]) -> Iterator[tuple[str, str, Leaf]]:
    """(name, kind, leaf) of every parameter of `names` in the file, one at a time; a head tied to
    the embedding has no tensor.

    kind: how the file stores it ("Q4_0", "Q6_K", "F32").
    Errors: no GGUF file, an architecture whose weights are not stored as they are, parameters and
    tensors without each other.
    """
    reader, arch = opened(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    found = _names(path, arch, _field(path, reader, f"{arch}.block_count", int), names, stored)
    if SCALED_ROTARY in stored:
        raise QlabError(
            f"{path} holds {SCALED_ROTARY}: its rotary frequencies are scaled, which no config "
            "made of the file says; quantize the model from its safetensors files"
        )
    if left := sorted(stored.keys() - set(found.values())):
        raise QlabError(
            f"{path} holds {left[0]}, for which the model has no parameter; the file is of "
            "another model"
        )
    for name, own in found.items():
        leaf = _leaf(f"{path}: {own}", stored[own])
        if ARCHITECTURES[arch] and (kind := own.split(".")[-2]) in ("attn_q", "attn_k"):
            heads = _field(
                path,
                reader,
                f"{arch}.attention.head_count" + ("_kv" if kind == "attn_k" else ""),
                int,
            )
            leaf = _halves_apart(f"{path}: {own}", leaf, heads)
        yield name, stored[own].tensor_type.name, leaf


def opened(path: Path) -> tuple[Any, str]:
    """The package's reader of a file, and the file's architecture; refuses what is no GGUF file or
    is stored in a way that qlab cannot undo."""
    reader = _reader(path)
    arch = _field(path, reader, "general.architecture", str)
    if arch not in ARCHITECTURES:
        raise QlabError(
            f"{path} holds a model of architecture {arch!r}; qlab reads "
            f"{', '.join(ARCHITECTURES)}: convert it to safetensors with transformers first"
        )
    return reader, arch


def _reader(path: Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # whatever parsing bytes as numbers, lengths and text runs into
        raise QlabError(
            f"{path} is truncated or not a GGUF file ({str(error) or type(error).__name__}); "
            "download it again"
        ) from error


def fields(reader: Any) -> dict[str, Any]:
    """Every key of the file with its value; None where that is no text."""
    return {name: _contents(field) for name, field in reader.fields.items()}


def _contents(field: Any) -> Any:
    try:
        return field.contents()
    except UnicodeDecodeError:
        return None


def _field(path: Path, reader: Any, name: str, kind: type) -> Any:
    field = reader.get_field(name)
    value = _contents(field) if field else None
    if not isinstance(value, kind):
        raise QlabError(f"{path} does not say its {name}; download it again")
    return value


def _names(
    path: Path, arch: str, blocks: int, names: Collection[str], stored: Collection[str]
) -> dict[str, str]:
    """A model's names -> the file's."""
    [key] = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch]
    if not 0 < blocks <= len(stored):
        raise QlabError(
            f"{path} says that it has {blocks} blocks and holds {len(stored)} tensors; download "
            "it again"
        )
    table, found = gguf.get_tensor_name_map(key, blocks), {}
    for name in names:
        module, _, kind = name.rpartition(".")
        own = f"{table.get_name(module)}.{kind}"
        if own == "output.weight" and own not in stored:
            continue
        if own not in stored:
            raise QlabError(f"{path} has no tensor for {name}; the file is of another model")
        found[name] = own
    return found


def _leaf(where: str, tensor: Any) -> Leaf:
    kind = tensor.tensor_type
    if kind in EXACT and len(tensor.shape) == 2:
        return EXACT[kind](torch.from_numpy(np.array(tensor.data)))
    if tensor.data.dtype in (np.float32, np.float16):
        return torch.from_numpy(np.array(tensor.data))
    try:
        return torch.from_numpy(gguf.dequantize(tensor.data, kind))
    except NotImplementedError as error:
        raise QlabError(
            f"{where} is stored as {kind.name}, which the gguf package does not dequantize; "
            "convert the file"
        ) from error


def _q4_0(rows: Tensor) -> QTensor:
    """uint8 [o, 18 * k/32]: a scale, then the codes of columns 0 to 15 in low nibbles and of 16 to
    31 in high ones."""
    blocks = rows.view(rows.shape[0], -1, 2 + BLOCK // 2)
    nibbles = blocks[..., 2:]
    codes = (torch.cat([nibbles & 15, nibbles >> 4], -1) - 8).view(torch.int8)
    return _blocks(4, blocks, codes)


def _q8_0(rows: Tensor) -> QTensor:
    """uint8 [o, 34 * k/32]: a scale, then 32 signed bytes."""
    blocks = rows.view(rows.shape[0], -1, 2 + BLOCK)
    return _blocks(8, blocks, blocks[..., 2:].contiguous().view(torch.int8))


def _blocks(bits: int, blocks: Tensor, codes: Tensor) -> QTensor:
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    return QTensor(
        codes.reshape(len(codes), -1), scales, None, Int(bits, Tile(1, BLOCK), True, torch.float16)
    )


EXACT: dict[Any, Callable[[Tensor], QTensor]] = {
    gguf.GGMLQuantizationType.Q4_0: _q4_0,
    gguf.GGMLQuantizationType.Q8_0: _q8_0,
}


def _halves_apart(where: str, leaf: Leaf, heads: int) -> Leaf:
    """Rows (0, d/2, 1, d/2 + 1, ...) of every head in their own order."""
    rows = leaf.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise QlabError(
            f"{where} has {rows} rows, which {heads} heads do not divide; download the file again"
        )
    order = torch.arange(rows).view(heads, -1, 2).mT.flatten()
    if isinstance(leaf, Tensor):
        return leaf[order]
    return QTensor(leaf.codes[order], leaf.scales[order], None, leaf.spec)
