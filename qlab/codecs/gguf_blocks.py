"""GGUF's blocks of 32 weights along a row, with one float16 scale d each: W = q * d.

    Q4_0    d, then 16 bytes of q + 8: columns 0 to 15 in the low nibbles, 16 to 31 in the high ones
    Q8_0    d, then 32 bytes: q as signed numbers

q is in [-8, 7] or [-128, 127], so that both hold qlab's codes as they are. Source: ggml, gguf 0.19.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Spec, Tile
from qlab.codecs import checks
from qlab.errors import QlabError

BLOCK = 32
KINDS = {4: "Q4_0", 8: "Q8_0"}  # bits of a code -> how the format calls its blocks
SCALE = torch.float16


def spec_of(bits: int) -> Int:
    """The numbers that a kind of blocks holds."""
    return Int(bits, Tile(1, BLOCK), True, SCALE)


def refusal(spec: Spec, online: Collection = ()) -> str | None:
    """Why no block holds such a weight, or None when one does."""
    reason = checks.refusal("GGUF", tuple(KINDS), spec, online)
    if reason:
        return reason
    if spec.tile != Tile(1, BLOCK) or not spec.symmetric:
        nearest = Int(spec.bits, Tile(1, BLOCK))
        return f"GGUF has no {spec}; its blocks hold {nearest}"
    if spec.scale_dtype not in (None, SCALE):
        return f"GGUF has no {spec.scale_dtype} scales; its blocks have float16 ones"
    return None


def misfit(spec: Spec, shape: torch.Size) -> str | None:
    """Why weights [..., o, k] of this shape do not fit, or None."""
    if shape[-1] % BLOCK:
        return f"{shape[-1]} input channels do not fill blocks of {BLOCK}, as GGUF needs"
    return None


def encode(path: str, leaf: QTensor) -> dict[str, Tensor]:
    """QTensor [o, k] -> {path.weight}: uint8 [o, k/32 * bytes of a block]."""
    reason = refusal(leaf.spec) or misfit(leaf.spec, leaf.shape)
    checks.check_leaf(path, "GGUF", leaf, reason)
    if leaf.perm is not None:
        raise QlabError(
            f"{path}: its channels share groups in an order of their own (perm), which GGUF has no "
            "place for; write gptq_desc_act"
        )
    if leaf.scales.dtype != SCALE:
        raise QlabError(f"{path}: {leaf.scales.dtype} scales would be rounded to float16")
    o = leaf.shape[0]
    codes = leaf.codes.reshape(o, -1, BLOCK)
    if leaf.spec.bits == 4:
        low, high = (codes + 8).view(torch.uint8).chunk(2, -1)
        data = low | high << 4
    else:
        data = codes.view(torch.uint8)
    scales = leaf.scales.contiguous().view(torch.uint8).reshape(o, -1, SCALE.itemsize)
    return {f"{path}.weight": torch.cat([scales, data], -1).reshape(o, -1)}


def decode(path: str, tensors: Mapping[str, Tensor], spec: Spec) -> QTensor:
    """The inverse of encode; refuses missing, misshaped and unexpected tensors."""
    reason = refusal(spec)
    if reason:
        raise QlabError(f"{path}: {reason}")
    checks.check_names(path, "GGUF", tensors, ("weight",))
    rows = checks.take(path, tensors, "weight", (None, None), torch.uint8)
    size = SCALE.itemsize + BLOCK * spec.bits // 8
    if rows.shape[1] % size:
        raise QlabError(
            f"{path}.weight has rows of {rows.shape[1]} bytes, which blocks of {size} bytes do not "
            "fill; the file is damaged"
        )
    return codes_of(rows, spec.bits)


def codes_of(rows: Tensor, bits: int) -> QTensor:
    """uint8 [o, k/32 * bytes of a block] -> codes [o, k] with scales [o, k/32]."""
    blocks = rows.reshape(rows.shape[0], -1, SCALE.itemsize + BLOCK * bits // 8)
    scales = blocks[..., : SCALE.itemsize].contiguous().view(SCALE).squeeze(-1)
    data = blocks[..., SCALE.itemsize :].contiguous()
    if bits == 4:
        data = torch.cat([data & 15, data >> 4], -1) - 8
    codes = data.view(torch.int8).reshape(len(rows), -1)
    return QTensor(codes, scales, None, spec_of(bits))
