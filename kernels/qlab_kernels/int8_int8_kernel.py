"""The Triton kernels of int8 weights and int8 activations: exact sums in int32, with scales, zero
points and bias behind them; see `int8_int8`."""

import triton
import triton.language as tl

from qlab_kernels.rows import expert_tile


@triton.jit
def integer_sums(
    x_rows,
    live,
    words_ptr,
    rn,
    K,
    first,
    step,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """int32 sums q p.T [BN, BM] over the k tiles first, first + step, ... of K channels.

    x_rows: pointers [BM] to rows of codes, read where `live`. words_ptr: this block of n, rows of K
    codes; rn: [BN] rows of it that exist. WHOLE: tiles of BK divide K.
    """
    rk = tl.arange(0, BK)
    w_ptrs = words_ptr + rn[:, None] * K + (first * BK + rk)[None, :]
    x_ptrs = x_rows[None, :] + (first * BK + rk)[:, None]
    acc = tl.zeros((BN, BM), tl.int32)
    for tile in tl.range(first, tl.cdiv(K, BK), step, num_stages=STAGES):
        if WHOLE:
            w = tl.load(w_ptrs)
            x = tl.load(x_ptrs, mask=live[None, :], other=0)
        else:
            inside = rk < K - tile * BK
            w = tl.load(w_ptrs, mask=inside[None, :], other=0)
            x = tl.load(x_ptrs, mask=live[None, :] & inside[:, None], other=0)
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        w_ptrs += step * BK
        x_ptrs += step * BK
    return acc


@triton.jit
def scaled(
    exact,
    column,
    inside,
    rm,
    live,
    scales_ptr,
    zeros_ptr,
    sums_ptr,
    row_zeros_ptr,
    row_sums_ptr,
    group,
    C,
    ZEROS: tl.constexpr,
    SUMS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """s_n (exact - z_n sum p - y_m sums_n) [BN, BM] in fp32.

    column: where the rows of W have their scales. rm: the rows of x, behind the pointers to what
    rows have. ZEROS, SUMS: whether weights, and activations, have zero points. TOKENS: whether each
    row has a scale and a zero point of its own.
    """
    if ZEROS:
        z = tl.load(zeros_ptr + column, mask=inside, other=0)
        exact -= z[:, None] * tl.load(row_sums_ptr + rm * C + group, mask=live, other=0)[None, :]
    if SUMS:
        total = tl.load(sums_ptr + column, mask=inside, other=0)
        y = tl.load(row_zeros_ptr + (rm if TOKENS else rm * 0), mask=live, other=0)
        exact -= total[:, None] * y.to(tl.int32)[None, :]
    return exact.to(tl.float32) * tl.load(scales_ptr + column, mask=inside, other=0.0)[:, None]


@triton.jit
def store_rows(
    acc,
    rm,
    live,
    rn,
    row_scales_ptr,
    bias_ptr,
    y_ptr,
    N,
    TOKENS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """y[rm, rn] = t acc + b, rounded once."""
    acc *= tl.load(row_scales_ptr + (rm if TOKENS else rm * 0), mask=live, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y_ptr + rm[None, :] * N + rn[:, None],
        acc.to(y_ptr.dtype.element_ty),
        mask=live[None, :] & (rn < N)[:, None],
    )


@triton.jit(do_not_specialize=["M", "E", "C", "SPLIT"])
def int8_int8_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    sums_ptr,
    row_scales_ptr,
    row_zeros_ptr,
    row_sums_ptr,
    bias_ptr,
    offsets_ptr,
    y_ptr,
    M,
    E,
    N,
    K,
    C,
    WIDTH,
    SPLIT,
    ZEROS: tl.constexpr,
    SUMS: tl.constexpr,
    TOKENS: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (tiles of m, fastest, x tiles of n, SPLIT). C groups of K channels; WIDTH = C K.

    PARTS: y is int32 sums [SPLIT, M, N], of k tiles p, p + SPLIT, ... each, for one group. GROUPS:
    whether C is more than one. EXPERTS: 0, or E rounded up to a power of two; then the tiles of m
    are those of experts, found from `offsets` on the device, so that the host waits for nothing.
    """
    tiles_m = tl.num_programs(0) // tl.cdiv(N, BN)
    tile = tl.program_id(0) % tiles_m
    block_n = tl.program_id(0) // tiles_m
    part = tl.program_id(1)
    rm = tl.arange(0, BM)
    if EXPERTS > 0:
        expert, start, rows = expert_tile(offsets_ptr, tile, E, EXPERTS, BM)
        if expert >= E:
            return
        live = rm < rows
        words_ptr += expert.to(tl.int64) * N * WIDTH
        columns = expert * C * N
    else:
        start = tile * BM
        live = rm < M - start
        columns = 0
    first_row = start.to(tl.int64)
    if TOKENS:
        row_scales_ptr += first_row
        row_zeros_ptr += first_row
    row_sums_ptr += first_row * C
    rn = block_n * BN + tl.arange(0, BN)
    inside = rn < N
    near = tl.minimum(tl.arange(0, BN), N - 1 - block_n * BN)
    words_ptr += block_n.to(tl.int64) * BN * K
    x_rows = x_ptr + first_row * WIDTH + rm * WIDTH
    y_ptr += (part.to(tl.int64) * M + first_row) * N
    if PARTS:
        sums = integer_sums(
            x_rows, live, words_ptr, near, K, part, SPLIT, BM, BN, BK, WHOLE, STAGES
        )
        tl.store(
            y_ptr + rm[None, :] * N + rn[:, None],
            sums,
            mask=live[None, :] & inside[:, None],
        )
    elif GROUPS:
        acc = tl.zeros((BN, BM), tl.float32)
        for group in range(C):
            exact = integer_sums(
                x_rows + group * K, live, words_ptr, near, K, 0, 1, BM, BN, BK, WHOLE, STAGES
            )
            acc += scaled(
                exact,
                columns + group * N + rn,
                inside,
                rm,
                live,
                scales_ptr,
                zeros_ptr,
                sums_ptr,
                row_zeros_ptr,
                row_sums_ptr,
                group,
                C,
                ZEROS,
                SUMS,
                TOKENS,
            )
            words_ptr += N.to(tl.int64) * K
        store_rows(acc, rm, live, rn, row_scales_ptr, bias_ptr, y_ptr, N, TOKENS, BIAS)
    else:
        exact = integer_sums(x_rows, live, words_ptr, near, K, 0, 1, BM, BN, BK, WHOLE, STAGES)
        acc = scaled(
            exact,
            columns + rn,
            inside,
            rm,
            live,
            scales_ptr,
            zeros_ptr,
            sums_ptr,
            row_zeros_ptr,
            row_sums_ptr,
            0,
            C,
            ZEROS,
            SUMS,
            TOKENS,
        )
        store_rows(acc, rm, live, rn, row_scales_ptr, bias_ptr, y_ptr, N, TOKENS, BIAS)


@triton.jit(do_not_specialize=["M", "SPLIT"])
def int8_parts_kernel(
    parts_ptr,
    scales_ptr,
    zeros_ptr,
    sums_ptr,
    row_scales_ptr,
    row_zeros_ptr,
    row_sums_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    SPLIT,
    ZEROS: tl.constexpr,
    SUMS: tl.constexpr,
    TOKENS: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid (tiles of n, tiles of m). The parts [SPLIT, M, N] of a product added, in any order the
    same, and what follows the sums."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    first_row = tl.program_id(1).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    inside, live = rn < N, rm < M - first_row
    parts_ptr += first_row * N
    if TOKENS:
        row_scales_ptr += first_row
        row_zeros_ptr += first_row
    row_sums_ptr += first_row
    y_ptr += first_row * N
    exact = tl.zeros((BN, BM), tl.int32)
    for part in range(SPLIT):
        exact += tl.load(
            parts_ptr + part * M.to(tl.int64) * N + rm[None, :] * N + rn[:, None],
            mask=live[None, :] & inside[:, None],
            other=0,
        )
    acc = scaled(
        exact,
        rn,
        inside,
        rm,
        live,
        scales_ptr,
        zeros_ptr,
        sums_ptr,
        row_zeros_ptr,
        row_sums_ptr,
        0,
        1,
        ZEROS,
        SUMS,
        TOKENS,
    )
    store_rows(acc, rm, live, rn, row_scales_ptr, bias_ptr, y_ptr, N, TOKENS, BIAS)
