"""Activations to 8-bit floats (e4m3) in one kernel: each token, or each group of its channels, by
its own range, or all by a scale that is fixed.

    s = max|x| / 448,  p = e4m3(clamp(x / s, -448, 448))       ties go to the even code

Zeros are positive; a range of zeros has the scale 2^-23. Divisions are those of IEEE 754.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # channels of a program at a time
LARGEST = tl.constexpr(448.0)
EPSILON = tl.constexpr(2.0**-23)
EVEN = tl.constexpr(12582912.0)  # 1.5 * 2^23: numbers below 2^22 lose their fraction behind it


@triton.jit
def e4m3(v):
    """The bits of v as e4m3, uint8; beyond +-448 it saturates, NaN stays.

    A number of the binade 2^e has steps of 2^(e - 3), those below 2^-6 of 2^-9. The code counts
    steps, so that rounding up to the next binade carries by itself. Triton's interpreter rounds
    casts to e4m3 otherwise than a GPU does.
    """
    size = tl.minimum(tl.abs(v), LARGEST)
    e = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    steps = (size * ((130 - e) << 23).to(tl.float32, bitcast=True) + EVEN) - EVEN
    code = ((e + 6) << 3) + steps.to(tl.int32)
    code = tl.where(v == v, code, 0x7F)
    return tl.where(v < 0, code | 0x80, code).to(tl.uint8)


@triton.jit
def round_fp8_kernel(
    x_ptr,
    p_ptr,
    scales_ptr,
    K,
    CHANNELS,
    FIXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (rows, groups of CHANNELS). x [rows, K] to codes; FIXED: the one scale is read, else
    scales [rows, groups] are written."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    x_ptr += row * K + group * CHANNELS
    p_ptr += row * K + group * CHANNELS
    k = tl.arange(0, BLOCK)
    if FIXED:
        s = tl.load(scales_ptr)
    else:
        absolute = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, CHANNELS, BLOCK):
            x = tl.load(x_ptr + start + k, mask=start + k < CHANNELS, other=0.0).to(tl.float32)
            absolute = tl.maximum(absolute, tl.abs(x))
        s = tl.div_rn(tl.max(absolute, 0), LARGEST)
        s = tl.where(s == 0, EPSILON, s)
        tl.store(scales_ptr + row * tl.num_programs(1) + group, s)
    for start in range(0, CHANNELS, BLOCK):
        x = tl.load(x_ptr + start + k, mask=start + k < CHANNELS, other=0.0).to(tl.float32)
        p = e4m3(tl.div_rn(x, tl.zeros_like(x) + s))
        tl.store(p_ptr + start + k, p, mask=start + k < CHANNELS)


def round_fp8(
    x: Tensor, group: int | None = None, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(codes e4m3 [m, k], scales fp32 [m, 1] or [m, k / group]) of x [m, k]; with `scales` [1, 1],
    these for all tokens. `group` divides k."""
    m, k = x.shape
    channels, fixed = group or k, scales is not None
    p = torch.empty(m, k, dtype=torch.uint8, device=x.device)
    if scales is None:
        scales = torch.empty(m, k // channels, dtype=torch.float32, device=x.device)
    scales = scales.float()
    if m > 0:
        with torch.cuda.device_of(x):
            round_fp8_kernel[(m, k // channels)](
                x.contiguous(),
                p,
                scales,
                k,
                channels,
                FIXED=fixed,
                BLOCK=min(BLOCK, triton.next_power_of_2(channels)),
            )
    return p.view(torch.float8_e4m3fn), scales
