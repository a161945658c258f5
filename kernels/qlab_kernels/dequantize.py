"""W[..., n, k] = (code - z) * s, dense, from packed int4 weights: what large numbers of tokens
multiply with the library's matmul."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlab_kernels import reference
from qlab_kernels.device import reads_packed, setting, stored
from qlab_kernels.layout import Packed
from qlab_kernels.tile import codes, in_order, load_halves

BK, WARPS = 128, 8  # a program's width and its warps: with four of them, some compilers spill


@triton.jit
def dequantize_kernel(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    y_ptr,
    N,
    K,
    K_PAD,
    N_PAD,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BK: tl.constexpr,
    DTYPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    SEQUENCE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Grid (tiles of BK along k, tiles of 64 rows, experts). Computed in fp32, rounded once: equal
    to the reference bit for bit."""
    block_k = tl.program_id(0)
    block_n = tl.program_id(1)
    expert = tl.program_id(2).to(tl.int64)
    KB: tl.constexpr = BK // 64
    rn = block_n * 64 + tl.arange(0, 64)
    rk = block_k * BK + tl.arange(0, BK)
    atom = (
        expert * (N_PAD // 64) * (K_PAD // 64) + block_n.to(tl.int64) * (K_PAD // 64) + block_k * KB
    )
    live = block_k * KB + tl.arange(0, KB)[:, None] < K_PAD // 64
    words = tl.load(
        words_ptr + atom * 2048 + tl.arange(0, KB)[:, None] * 2048 + tl.arange(0, 2048)[None, :],
        mask=live,
        other=0,
    )
    if LAYOUT == "rows":
        pairs = tl.join((words & 15).to(tl.int8), (words >> 4).to(tl.int8)).reshape(KB, 64, 64)
        w = (pairs.trans(1, 0, 2).reshape(64, BK) - 8).to(tl.float32)
    else:
        w = in_order(codes(words, SEQUENCE, COMPUTE), 1, KB, LAYOUT).to(tl.float32)
    row = (rk // GROUP if GROUP > 0 else rk * 0)[None, :]
    # The last tile may lack atoms: their rows read the last group.
    row = tl.minimum(row, (K_PAD // GROUP if GROUP > 0 else 1) - 1)
    first = expert * (N_PAD // 2) * (K_PAD // GROUP if GROUP > 0 else 1)
    if ZEROS:
        w -= load_halves(zeros_ptr + first, row, rn[:, None], N_PAD, DTYPE).to(tl.float32)
    w *= load_halves(scales_ptr + first, row, rn[:, None], N_PAD, DTYPE).to(tl.float32)
    y_tile = y_ptr + expert * N * K + (block_n * 64).to(tl.int64) * K
    inside = (rn < N)[:, None] & (rk < K)[None, :]
    tl.store(
        y_tile + tl.arange(0, 64)[:, None] * K + rk[None, :],
        w.to(y_ptr.dtype.element_ty),
        mask=inside,
    )


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """W[..., n, k] in `dtype`. Capabilities without Triton compute it in plain torch."""
    if not reads_packed(packed):
        return reference.dequantize(packed, dtype)
    experts = packed.words.shape[:-3]
    y = torch.empty((*experts, packed.n, packed.k), dtype=stored(dtype), device=packed.words.device)
    scales = packed.scales.view(torch.int32)
    zeros = scales if packed.zeros is None else packed.zeros.view(torch.int32)
    constants = setting(packed.scales, packed)
    half = tl.bfloat16 if packed.scales.dtype == torch.bfloat16 else tl.float16
    grid = (triton.cdiv(packed.padded_k, BK), packed.padded_n // 64, experts.numel())
    with torch.cuda.device_of(y):
        dequantize_kernel[grid](
            packed.words,
            scales,
            zeros,
            y,
            packed.n,
            packed.k,
            packed.padded_k,
            packed.padded_n,
            ZEROS=packed.zeros is not None,
            BK=BK,
            DTYPE=half,
            num_warps=WARPS,
            **constants,
        )
    return y.to(dtype)
