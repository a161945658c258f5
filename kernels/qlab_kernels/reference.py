"""The same products in plain torch, on any device: what the kernels are checked against, and the
path of devices without Triton."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlab_kernels.layout import Packed, unpack

if TYPE_CHECKING:
    from qlab_kernels.cached import Cached
    from qlab_kernels.hadamard import Factors


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


def hadamard(x: Tensor, factors: "Factors", wide: torch.dtype = torch.float64) -> Tensor:
    """y[m, n] = x @ M with everything in `wide`: the core, then one addition and one subtraction
    for every pair and doubling."""
    y = x.to(wide)
    if factors.before is not None:
        y = y * factors.before.to(wide)
    if factors.core is not None:
        y = y.reshape(-1, factors.core_size) @ factors.core.to(wide)
    for i in range(factors.doublings):
        pairs = y.reshape(-1, 2, factors.core_size << i)
        y = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1)
    y = y.reshape(x.shape) * factors.scale
    return y if factors.behind is None else y * factors.behind.to(wide)


def attend(
    q: Tensor,
    keys: "Cached",
    values: "Cached",
    lengths: Tensor,
    *,
    scale: float | None = None,
    cap: float | None = None,
    window: int | None = None,
    starts: Tensor | None = None,
    pages: Tensor | None = None,
) -> Tensor:
    """y [b, heads, t, dv] in fp64: dequantized, scored, weighted and summed there (`attend.attend`
    has the arguments)."""
    from qlab_kernels.cached import numbers

    heads, t, d = q.shape[1:]
    k, v = numbers(keys, torch.float64), numbers(values, torch.float64)
    if pages is not None:
        k, v = (x[pages.long()].transpose(1, 2).flatten(2, 3) for x in (k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    s = q.double() @ k.mT * (d**-0.5 if scale is None else scale)
    s = s if cap is None else cap * torch.tanh(s / cap)
    n = torch.arange(k.shape[2], device=q.device)
    own = lengths.long()[:, None] - t + torch.arange(t, device=q.device)
    seen = n <= own[..., None]
    if window is not None:
        seen &= n > own[..., None] - window
    if starts is not None:
        seen &= n >= starts.long()[:, None, None]
    p = s.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return p @ v
