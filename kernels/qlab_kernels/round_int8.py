"""Activations to int8 codes in one kernel: each token by its own range, or all by a scale that is
fixed.

    symmetric:  s = max|x| / reach                    reach = (qmax - qmin) / 2
    else:       s = (max x - min x) / (qmax - qmin),  z = round(qmin - min x / s)
    p = clamp(round(x / s + z), qmin, qmax)           ties go to the even code

Ranges include 0. A token of zeros has the scale 2^-23. Divisions are those of IEEE 754.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # channels of a program at a time
EVEN = tl.constexpr(12582912.0)  # 1.5 * 2^23: numbers below 2^22 lose their fraction behind it
EPSILON = tl.constexpr(2.0**-23)


@triton.jit
def nearest(v, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """The nearest integer within QMIN..QMAX, the even one of two, in fp32."""
    return (tl.clamp(v, QMIN, QMAX) + EVEN) - EVEN


@triton.jit
def round_int8_kernel(
    x_ptr,
    p_ptr,
    scales_ptr,
    zeros_ptr,
    K,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    ZEROS: tl.constexpr,
    FIXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (rows). x [rows, K] to codes; FIXED: scales and zeros are read, else they are written
    for each row. ZEROS: whether there are zero points."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    z = 0.0
    if FIXED:
        s = tl.load(scales_ptr)
        if ZEROS:
            z = tl.load(zeros_ptr).to(tl.float32)
    else:
        least = tl.zeros((BLOCK,), tl.float32)
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            x = tl.load(x_ptr + row * K + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            least = tl.minimum(least, x)
            largest = tl.maximum(largest, x)
        low, high = tl.min(least, 0), tl.max(largest, 0)
        if ZEROS:
            s = tl.div_rn(high - low, QMAX - QMIN + 0.0)
            z = nearest(QMIN - tl.div_rn(low, tl.where(s == 0, 1.0, s)), QMIN, QMAX)
            z = tl.where(s == 0, 0.0, z)
            tl.store(zeros_ptr + row, z.to(tl.int8))
        else:
            s = tl.div_rn(tl.maximum(-low, high), (QMAX - QMIN) / 2)
        s = tl.where(s == 0, EPSILON, s)
        tl.store(scales_ptr + row, s)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + row * K + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        p = nearest(tl.div_rn(x, tl.zeros_like(x) + s) + z, QMIN, QMAX)
        tl.store(p_ptr + row * K + start + k, p.to(tl.int8), mask=start + k < K)


def round_int8(
    x: Tensor,
    bits: int,
    symmetric: bool,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes int8 [m, k], scales fp32 [m, 1], zeros int8 [m, 1] or None) of x [m, k]; with `scales`
    [1, 1], and `zeros` where not symmetric, these for all tokens."""
    (m, k), fixed = x.shape, scales is not None
    p = torch.empty(m, k, dtype=torch.int8, device=x.device)
    if scales is None:
        scales = torch.empty(m, 1, dtype=torch.float32, device=x.device)
        zeros = None if symmetric else torch.empty(m, 1, dtype=torch.int8, device=x.device)
    scales = scales.float()
    if m == 0:
        return p, scales, zeros
    with torch.cuda.device_of(x):
        round_int8_kernel[(m,)](
            x.contiguous(),
            p,
            scales,
            scales if zeros is None else zeros,
            k,
            QMIN=-(2 ** (bits - 1)),
            QMAX=2 ** (bits - 1) - 1,
            ZEROS=zeros is not None,
            FIXED=fixed,
            BLOCK=min(BLOCK, triton.next_power_of_2(k)),
        )
    return p, scales, zeros
