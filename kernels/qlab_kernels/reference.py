"""The same products in plain torch, on any device: what the kernels are checked against, and the
path of devices without Triton."""

import torch
from torch import Tensor

from qlab_kernels.layout import Packed, unpack


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """W[..., n, k] = (code - z) * s in `dtype`. The product is formed in fp32 (fp64 for fp64) and
    rounded once."""
    codes, scales, zeros = unpack(packed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    k = packed.k
    w = codes.to(wide)
    if zeros is not None:
        w -= zeros.to(wide).repeat_interleave(packed.group, -1)[..., :k]
    w *= scales.to(wide).repeat_interleave(packed.group, -1)[..., :k]
    return w.to(dtype)


def int4_mm(x: Tensor, packed: Packed, wide: torch.dtype = torch.float64) -> Tensor:
    """y[m, n] = x[m, k] @ W[n, k].T with everything in `wide`; never rounded to 16 bits."""
    return x.to(wide) @ dequantize(packed, torch.float64).to(wide).mT


def int4_grouped_mm(
    x: Tensor, packed: Packed, offsets: Tensor, wide: torch.dtype = torch.float64
) -> Tensor:
    """Rows offsets[e-1]:offsets[e] of x [t, k] times expert e of W [e, n, k]; rows past the last
    offset are zero."""
    W_enk = dequantize(packed, torch.float64).to(wide)
    y = x.new_zeros(x.shape[0], packed.n, dtype=wide)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        y[start:end] = x[start:end].to(wide) @ W_enk[expert].mT
        start = end
    return y
