"""int4 weights times activations of 8 bits: y[m, n] = t (p[m, k] @ W[n, k].T) + b, with or without
a split of k."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlab_kernels.device import stored
from qlab_kernels.device8 import Activations, admit, constants, x_and_weight
from qlab_kernels.int4_mm import SUMMED, sum_parts_kernel
from qlab_kernels.layout import Packed
from qlab_kernels.problem import Config
from qlab_kernels.tile8 import finished, product


@triton.jit(do_not_specialize=["M", "SPLIT"])
def int4_a8_mm_kernel(
    x_ptr,
    t_ptr,
    sums_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    N_PAD,
    SPLIT,
    UNIT: tl.constexpr,
    FIXED: tl.constexpr,
    BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    NUMBERS: tl.constexpr,
    LAYOUT: tl.constexpr,
    SEQUENCE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (tiles of m, fastest, x tiles of n, SPLIT). y: [M, N], or fp32 partial products [SPLIT,
    M, N]. sums: [K / GROUP, M].

    Part p of a split takes the k tiles p, p + SPLIT, ...: any number of them, so that no tail is
    dropped.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    tiles_m = tl.cdiv(M, BM)
    block_m = (tile % tiles_m).to(tl.int64)
    block_n = (tile // tiles_m).to(tl.int64)
    rm = tl.arange(0, BM)
    live = rm < M - block_m * BM
    rn = tl.arange(0, BN) + (tile // tiles_m) * BN
    acc = product(
        x_ptr + block_m * BM * K + rm * K,
        live,
        words_ptr + block_n * BN * K // 2,
        scales_ptr,
        zeros_ptr,
        sums_ptr + block_m * BM,
        rm,
        rn,
        K,
        N_PAD,
        M,
        part,
        SPLIT,
        GROUP,
        ZEROS,
        BM,
        BN,
        BK,
        NUMBERS,
        LAYOUT,
        SEQUENCE,
        STAGES,
    )
    t_tile = t_ptr + (0 if FIXED else block_m * BM)
    acc = finished(acc, t_tile, bias_ptr, rm, live, rn, N, part, UNIT, FIXED, BIAS)
    y_tile = y_ptr + (part.to(tl.int64) * M + block_m * BM) * N
    tl.store(
        y_tile + rm[None, :] * N + rn[:, None],
        acc.to(y_ptr.dtype.element_ty),
        mask=live[None, :] & (rn < N)[:, None],
    )


def int4_a8_mm(
    x: Activations, packed: Packed, bias: Tensor | None, dtype: torch.dtype, config: Config
) -> Tensor:
    """y [m, n] = t (p @ W.T) + b in `dtype`.

    Groups are summed in fp32, and so are the parts of a split, by a second kernel: the result does
    not depend on the order of programs.

    Raises:
        KernelError: for weights of another device, and a kind that is no tile of this kernel.
    """
    admit(x, packed, config)
    m, split = len(x.p), config.split
    y = x.p.new_empty(m, packed.n, dtype=stored(dtype))
    if not m:
        return y.to(dtype)
    parts = y if split == 1 else y.new_empty(split, m, packed.n, dtype=torch.float32)
    grid = (triton.cdiv(m, config.bm) * (packed.padded_n // config.bn), split)
    with torch.cuda.device_of(x.p):
        int4_a8_mm_kernel[grid](
            *x_and_weight(x, packed),
            x.t if bias is None else bias,
            parts,
            m,
            packed.n,
            packed.padded_k,
            packed.padded_n,
            split,
            BIAS=bias is not None,
            **constants(x.t, packed, config),
        )
        if split > 1:
            sum_parts_kernel[(triton.cdiv(y.numel(), SUMMED),)](
                parts, y, y.numel(), split, PARTS=triton.next_power_of_2(split), BLOCK=SUMMED
            )
    return y.to(dtype)
