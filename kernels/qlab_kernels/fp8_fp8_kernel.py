"""The Triton kernels of 8-bit floats beside 8-bit floats; see `fp8_fp8`."""

import triton
import triton.language as tl

from qlab_kernels.rows import expert_tile


@triton.jit
def float_sums(
    x_rows,
    live,
    words_ptr,
    rn,
    scales_ptr,
    row_scales,
    K,
    W_STRIDE,
    first,
    step,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """fp32 y.T [BN, BM] over the k tiles first, first + step, ... of K channels.

    x_rows: pointers [BM] to rows of codes, read where `live`. words_ptr: this block of n, rows of
    W_STRIDE codes; rn: [BN] rows of it that exist. BLOCK: 0, or channels under one scale, of which
    BN rows of W have the same at `scales_ptr`, one after the other, and rows of x theirs at the
    pointers `row_scales`. WHOLE: tiles of BK divide K.

    Each tile's sum is added to an fp32 accumulator of its own: the tensor cores of 9.0 keep fewer
    bits of theirs.
    """
    rk = tl.arange(0, BK)
    w_ptrs = words_ptr + rn[:, None] * W_STRIDE + (first * BK + rk)[None, :]
    x_ptrs = x_rows[None, :] + (first * BK + rk)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for tile in tl.range(first, tl.cdiv(K, BK), step, num_stages=STAGES):
        if WHOLE:
            w = tl.load(w_ptrs)
            x = tl.load(x_ptrs, mask=live[None, :], other=0.0)
        else:
            inside = rk < K - tile * BK
            w = tl.load(w_ptrs, mask=inside[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=live[None, :] & inside[:, None], other=0.0)
        if BLOCK > 0:
            block = tile // (BLOCK // BK)
            t = tl.load(row_scales + block, mask=live, other=0.0)
            acc += tl.dot(w, x) * (t * tl.load(scales_ptr + block))[None, :]
        else:
            acc += tl.dot(w, x)
        w_ptrs += step * BK
        x_ptrs += step * BK
    return acc


@triton.jit
def store_floats(
    acc,
    rm,
    live,
    rn,
    column,
    scales_ptr,
    row_scales_ptr,
    bias_ptr,
    y_ptr,
    N,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """y[rm, rn] = t s acc + b, rounded once. ROWS: whether scales of rows follow the sums, those of
    W at `column`."""
    if ROWS:
        acc *= tl.load(row_scales_ptr + (rm if TOKENS else rm * 0), mask=live, other=0.0)[None, :]
        acc *= tl.load(scales_ptr + column, mask=rn < N, other=0.0)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y_ptr + rm[None, :] * N + rn[:, None],
        acc.to(y_ptr.dtype.element_ty),
        mask=live[None, :] & (rn < N)[:, None],
    )


@triton.jit(do_not_specialize=["M", "E", "C", "SPLIT"])
def fp8_fp8_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    row_scales_ptr,
    bias_ptr,
    offsets_ptr,
    y_ptr,
    M,
    E,
    N,
    K,
    W_ROWS,
    W_STRIDE,
    C,
    SPLIT,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (tiles of m, fastest, x tiles of n, SPLIT). W has W_ROWS rows of W_STRIDE codes, of
    which N and K count. C: blocks of channels in a row, where scales are those of blocks.

    PARTS: y is fp32 sums [SPLIT, M, N], of k tiles p, p + SPLIT, ... each. EXPERTS: 0, or E rounded
    up to a power of two; then the tiles of m are those of experts, found from `offsets` on the
    device, so that the host waits for nothing.
    """
    tiles_m = tl.num_programs(0) // tl.cdiv(N, BN)
    tile = tl.program_id(0) % tiles_m
    block_n = tl.program_id(0) // tiles_m
    part = tl.program_id(1)
    rm = tl.arange(0, BM)
    rn = block_n * BN + tl.arange(0, BN)
    column = rn
    if EXPERTS > 0:
        expert, start, rows = expert_tile(offsets_ptr, tile, E, EXPERTS, BM)
        if expert >= E:
            return
        live = rm < rows
        words_ptr += expert.to(tl.int64) * W_ROWS * W_STRIDE
        if BLOCK > 0:
            scales_ptr += expert * tl.cdiv(N, BLOCK) * C
        else:
            column = expert * W_ROWS + rn
    else:
        start = tile * BM
        live = rm < M - start
    first_row = start.to(tl.int64)
    if BLOCK > 0:
        row_scales_ptr += first_row * C
        scales_ptr += (block_n * BN // BLOCK) * C
    elif TOKENS:
        row_scales_ptr += first_row
    y_ptr += (part.to(tl.int64) * M + first_row) * N
    acc = float_sums(
        x_ptr + first_row * K + rm * K,
        live,
        words_ptr + block_n.to(tl.int64) * BN * W_STRIDE,
        tl.minimum(tl.arange(0, BN), N - 1 - block_n * BN),
        scales_ptr,
        row_scales_ptr + rm * C,
        K,
        W_STRIDE,
        part,
        SPLIT,
        BLOCK,
        BM,
        BN,
        BK,
        WHOLE,
        STAGES,
    )
    store_floats(
        acc,
        rm,
        live,
        rn,
        column,
        scales_ptr,
        row_scales_ptr,
        bias_ptr,
        y_ptr,
        N,
        BLOCK == 0 and not PARTS,
        TOKENS,
        BIAS and not PARTS,
    )


@triton.jit(do_not_specialize=["M", "SPLIT"])
def fp8_parts_kernel(
    parts_ptr,
    scales_ptr,
    row_scales_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    SPLIT,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid (tiles of n, tiles of m). The parts [SPLIT, M, N] of a product added in order, and what
    follows the sums."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    first_row = tl.program_id(1).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    live = rm < M - first_row
    parts_ptr += first_row * N
    if TOKENS:
        row_scales_ptr += first_row
    acc = tl.zeros((BN, BM), tl.float32)
    for part in range(SPLIT):
        acc += tl.load(
            parts_ptr + part * M.to(tl.int64) * N + rm[None, :] * N + rn[:, None],
            mask=live[None, :] & (rn < N)[:, None],
            other=0.0,
        )
    store_floats(
        acc,
        rm,
        live,
        rn,
        rn,
        scales_ptr,
        row_scales_ptr,
        bias_ptr,
        y_ptr + first_row * N,
        N,
        ROWS,
        TOKENS,
        BIAS,
    )
