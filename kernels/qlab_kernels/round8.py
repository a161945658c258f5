"""Activations rounded to codes of 8 bits by one kernel, with the sums that zero points of weights
need.

    t_m = max_k |x_mk| / reach,  p_mk = round(x_mk / t_m) clamped to lowest..highest
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlab_kernels.device8 import CODES, Activations, Limits, check
from qlab_kernels.layout import Packed
from qlab_kernels.layout8 import UNIT, numbers_of

BLOCK = 1024  # channels that a program rounds at once; groups divide it
EPSILON = torch.finfo(torch.float32).eps  # the scale of a token of zeros


@triton.jit
def nearest(x, step):
    """The nearest multiple of a power of two, of two the even one: past 1.5 * 2^23 steps fp32 holds
    multiples alone."""
    return (x + 12582912.0 * step) - 12582912.0 * step


@triton.jit
def round8_kernel(
    x_ptr,
    perm_ptr,
    p_ptr,
    t_ptr,
    sums_ptr,
    M,
    K,
    K_PAD,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    REACH: tl.constexpr,
    EPSILON: tl.constexpr,
    UNIT: tl.constexpr,
    FIXED: tl.constexpr,
    PERM: tl.constexpr,
    SUMS: tl.constexpr,
    GROUP: tl.constexpr,
    DIVIDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (M): a program rounds a token. p: [M, K_PAD], padded with zeros; t: [M], or [1] where it
    is FIXED; sums: [K_PAD / GROUP, M], or [1, M] of whole rows (GROUP = 0).

    DIVIDES: the scale is a quotient, as torch's on a CPU; on CUDA torch multiplies by the rounded
    reciprocal of a number.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * K
    at = tl.arange(0, BLOCK)
    if FIXED:
        t = tl.load(t_ptr)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        lost = tl.zeros((BLOCK,), tl.int32)
        for start in tl.range(0, K, BLOCK):
            x = tl.load(x_ptr + start + at, mask=start + at < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(x))
            lost += (x != x).to(tl.int32)
        absmax = tl.max(largest, 0)
        t = tl.div_rn(absmax, REACH) if DIVIDES else absmax * (1.0 / REACH)
        t = tl.where((t == 0.0) | (tl.sum(lost, 0) > 0), EPSILON, t)
        tl.store(t_ptr + row, t)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, K_PAD, BLOCK):
        k = start + at
        source = tl.load(perm_ptr + k, mask=k < K, other=0) if PERM else k
        x = tl.load(x_ptr + source, mask=k < K, other=0.0).to(tl.float32)
        steps = tl.minimum(tl.maximum(tl.div_rn(x, t), LOWEST), HIGHEST)
        if p_ptr.dtype.element_ty == tl.int8:
            steps = nearest(steps, 1.0)
            p = steps.to(tl.int8)
        else:
            # Three bits behind the first, or multiples of 2^-9; -0 where a negative number is lost.
            binade = (steps.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            size = nearest(tl.abs(steps), tl.maximum(binade, 0.015625) * 0.125)
            steps = size * tl.where(steps < 0.0, -1.0, 1.0)
            p = steps.to(tl.float8e4nv)
        tl.store(p_ptr + row * K_PAD + k, p, mask=k < K_PAD)
        if SUMS and GROUP > 0:
            of_groups = tl.sum(steps.reshape(BLOCK // GROUP, GROUP), 1) * UNIT
            group = start // GROUP + tl.arange(0, BLOCK // GROUP)
            tl.store(
                sums_ptr + group.to(tl.int64) * M + row, of_groups, mask=group < K_PAD // GROUP
            )
        elif SUMS:
            total += steps
    if SUMS and GROUP == 0:
        tl.store(sums_ptr + row, tl.sum(total, 0) * UNIT)


def round8(
    x: Tensor, t: Tensor | None, perm: Tensor | None, limits: Limits, packed: Packed
) -> Activations:
    """x [m, k] as the kernels of these weights read it. t: one scale for all of x, fp32 [1, 1], or
    None: each token has its own. perm: int64 [k], the channel of x of every code."""
    numbers = numbers_of(packed.layout)
    m, k_pad = len(x), packed.padded_k
    p = x.new_empty(m, k_pad, dtype=CODES[numbers])
    scales = x.new_empty(m, 1, dtype=torch.float32) if t is None else t
    check(p[:, : packed.k], scales, packed)
    group = 0 if packed.scales.shape[-2] == 1 else packed.group
    zeros = packed.zeros is not None
    groups = (k_pad // group if group else 1) if zeros else 0
    sums = x.new_empty(groups, m, dtype=torch.float32)
    with torch.cuda.device_of(x):
        round8_kernel[(m,)](
            x.contiguous(),
            scales if perm is None else perm,
            p,
            scales,
            sums,
            m,
            packed.k,
            k_pad,
            LOWEST=limits.lowest,
            HIGHEST=limits.highest,
            REACH=limits.reach,
            EPSILON=EPSILON,
            UNIT=UNIT[numbers],
            FIXED=t is not None,
            PERM=perm is not None,
            SUMS=zeros,
            GROUP=group,
            DIVIDES=x.device.type == "cpu",
            BLOCK=BLOCK,
        )
    return Activations(p, scales, sums)
