"""The products of int4 weights and activations of 8 bits in plain torch, on any device: what the
kernels are checked against."""

import torch
from torch import Tensor

from qlab_kernels.device8 import Limits
from qlab_kernels.layout import Packed
from qlab_kernels.layout8 import unpack8


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """W[..., n, k] = (code - z) * s in `dtype`. The product is formed in fp32 (fp64 for fp64) and
    rounded once."""
    codes, scales, zeros = unpack8(packed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def of_channels(part: Tensor) -> Tensor:
        return part.to(wide).repeat_interleave(packed.group, -1)[..., : packed.k]

    w = codes.to(wide)
    if zeros is not None:
        w -= of_channels(zeros)
    return w.mul_(of_channels(scales)).to(dtype)


def rounded(
    x: Tensor, t: Tensor | None, limits: Limits, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes p [m, k] of x in int8 or e4m3, and their scales: t, or each token's own [m, 1]."""
    wide = x.float()
    if t is None:
        t = wide.abs().amax(1, keepdim=True) / limits.reach
        t = torch.where((t == 0) | t.isnan(), torch.finfo(torch.float32).eps, t)
    steps = (wide / t).clamp(limits.lowest, limits.highest)
    return (steps.round() if dtype == torch.int8 else steps).to(dtype), t


def int4_a8_mm(p: Tensor, t: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """y [m, n] = t (p @ W.T) + b in fp64, never rounded."""
    y = t.double() * (p.double() @ dequantize(packed, torch.float64).mT)
    return y if bias is None else y + bias.double()


def int4_a8_grouped_mm(p: Tensor, t: Tensor, packed: Packed, offsets: Tensor) -> Tensor:
    """Rows offsets[e-1]:offsets[e] of p [s, k] times expert e of W [e, n, k], in fp64; rows past
    the last offset are zero."""
    W_enk = dequantize(packed, torch.float64)
    y, start = p.new_zeros(len(p), packed.n, dtype=torch.float64), 0
    for expert, end in enumerate(offsets.tolist()):
        y[start:end] = p[start:end].double() @ W_enk[expert].mT
        start = end
    return y * t.double()
