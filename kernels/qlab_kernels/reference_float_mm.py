"""The products of `float_mm.py` in plain torch, on any device: what its kernels are checked
against."""

import torch
from torch import Tensor

from qlab_kernels.float_layout import PackedFloats, unpack


def dequantize(packed: PackedFloats, dtype: torch.dtype) -> Tensor:
    """W[..., n, k] = f * s * q in `dtype`. The product is formed in fp32 (fp64 for fp64), which the
    codes and scales of bytes leave exact, and rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codes, scales, factors = unpack(packed, wide)
    group = packed.group or packed.k
    steps = (scales * factors[..., None]).repeat_interleave(group, -1)[..., : packed.k]
    return (codes * steps).to(dtype)


def float_mm(x: Tensor, packed: PackedFloats, wide: torch.dtype = torch.float64) -> Tensor:
    """y[m, n] = x[m, k] @ W[n, k].T with everything in `wide`; never rounded to 16 bits."""
    return x.to(wide) @ dequantize(packed, wide).mT


def float_grouped_mm(
    x: Tensor, packed: PackedFloats, offsets: Tensor, wide: torch.dtype = torch.float64
) -> Tensor:
    """Rows offsets[e-1]:offsets[e] of x [t, k] times expert e of W [e, n, k]; rows past the last
    offset are zero."""
    W_enk = dequantize(packed, wide)
    y = x.new_zeros(x.shape[0], packed.n, dtype=wide)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        y[start:end] = x[start:end].to(wide) @ W_enk[expert].mT
        start = end
    return y
