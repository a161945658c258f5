"""`pack-quantized`: W = (q - z) * s with u = q + 2^(b-1) as one dense bit stream per row.

    weight_packed      int32 [o, ceil(k*b/32)]
    weight_scale       [o, g] in its own dtype
    weight_shape       int64 [2]
    weight_zero_point  int32 [ceil(o*b/32), g], asymmetric weights only: the same stream along dim 0

A scale per tensor is weight_scale [1] with weight_zero_point int8 [1], not packed; vLLM reads group
and channel scales only.

Read only: files before 0.15, whose words hold floor(32/b) codes each, and weight_g_idx int32 [k],
the group of every input channel (actorder "group").
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qlab.algebra.bits import pack_signed, unpack_signed, words_of
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Spec
from qlab.codecs.checks import check_codes, take, take_spread
from qlab.codecs.compressed_tensors.tensors import (
    check_scales,
    refuse_others,
    scale_dtypes,
    stored_shape,
    strategy,
    whole_groups,
)
from qlab.errors import QlabError


def encode(path: str, leaf: QTensor) -> dict[str, Tensor]:
    """QTensor [o, k] -> {path.weight_packed, path.weight_scale, path.weight_shape[,
    path.weight_zero_point]}."""
    check_scales(path, leaf)
    check_codes(path, leaf)
    bits, per_tensor = leaf.spec.bits, strategy(leaf.spec.tile) == "tensor"
    tensors = {
        "weight_packed": pack_signed(leaf.codes, bits),
        "weight_scale": leaf.scales.reshape(1) if per_tensor else leaf.scales.contiguous(),
        "weight_shape": torch.tensor(leaf.shape, dtype=torch.long),
    }
    if leaf.zeros is not None:
        zeros = leaf.zeros.reshape(1) if per_tensor else pack_signed(leaf.zeros.mT, bits).mT
        tensors["weight_zero_point"] = zeros.contiguous()
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}


def decode(path: str, tensors: Mapping[str, Tensor], spec: Spec) -> QTensor:
    """The inverse of encode; refuses missing, misshaped and unexpected tensors of the module."""
    known = {"weight_packed", "weight_scale", "weight_shape", "weight_g_idx"}
    if not spec.symmetric:
        known.add("weight_zero_point")
    refuse_others(path, tensors, spec, known)
    sizes = take(path, tensors, "weight_shape", (2,), torch.int64, torch.int32)
    o, k = shape = torch.Size(sizes.tolist())
    if o < 1 or k < 1 or not whole_groups(spec, shape):
        raise QlabError(
            f"{path}.weight_shape {tuple(shape)} does not fit {spec}; "
            "the file or its config is wrong"
        )
    grid, stored, bits = spec.tile.scales_shape(shape), stored_shape(spec, shape), spec.bits
    legacy = _is_legacy(tensors.get(f"{path}.weight_packed"), k, bits)
    words, unpack_words = (_legacy_words, _unpack_legacy) if legacy else (words_of, unpack_signed)
    packed = take(path, tensors, "weight_packed", (o, words(k, bits)), torch.int32)
    scales = take_spread(path, tensors, "weight_scale", stored, *scale_dtypes(spec))
    if spec.symmetric:
        zeros = None
    elif strategy(spec.tile) == "tensor":
        zeros = take_spread(path, tensors, "weight_zero_point", stored, torch.int8).reshape(grid)
    else:
        columns = take(path, tensors, "weight_zero_point", (words(o, bits), grid[1]), torch.int32)
        zeros = unpack_words(columns.mT, bits, o).mT.contiguous()
    codes = unpack_words(packed, bits, k)
    perm = _perm(path, tensors, spec, k)
    return QTensor(
        codes=codes if perm is None else codes[:, perm],
        scales=scales.reshape(grid),
        zeros=zeros,
        spec=spec,
        perm=perm,
    )


def _perm(path: str, tensors: Mapping[str, Tensor], spec: Spec, k: int) -> Tensor | None:
    """The permutation that puts channels of one group side by side, or None where they are.
    Writers fill weight_g_idx with -1 where they did not reorder channels."""
    if f"{path}.weight_g_idx" not in tensors:
        return None
    g_idx = take(path, tensors, "weight_g_idx", (k,), torch.int32, torch.int64)
    cols = spec.tile.cols or k
    in_order = torch.arange(k, dtype=g_idx.dtype) // cols
    if (g_idx == -1).all() or torch.equal(g_idx, in_order):
        return None
    if not torch.equal(g_idx.sort().values, in_order):
        raise QlabError(
            f"{path}.weight_g_idx does not put {cols} channels into each of {-(-k // cols)} "
            "groups; qlab reads groups of one size"
        )
    return g_idx.argsort(stable=True)


def _is_legacy(packed: Tensor | None, k: int, bits: int) -> bool:
    """Whether a weight_packed is as wide as files before 0.15 have it, and no other width."""
    if packed is None or packed.ndim != 2:
        return False
    return words_of(k, bits) != _legacy_words(k, bits) == packed.shape[-1]


def _legacy_words(k: int, bits: int) -> int:
    """How many words hold k codes in files before 0.15."""
    return -(-k // (32 // bits))


def _unpack_legacy(words: Tensor, bits: int, k: int) -> Tensor:
    """floor(32/b) codes per word, the first in the lowest bits; the rest of a word is empty."""
    lanes = [(words >> (i * bits)) & (2**bits - 1) for i in range(32 // bits)]
    unsigned_codes = torch.stack(lanes, -1).flatten(-2)[..., :k]
    return (unsigned_codes - 2 ** (bits - 1)).to(torch.int8).contiguous()
