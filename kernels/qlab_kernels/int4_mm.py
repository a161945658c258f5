"""y[m, n] = x[m, k] @ W[n, k].T for packed int4 weights, with or without a split of k; and the
launch of every kind."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlab_kernels import dequantize as dense
from qlab_kernels import fma
from qlab_kernels.capability import KernelError
from qlab_kernels.config import Config
from qlab_kernels.device import operands, options, setting, stored
from qlab_kernels.layout import Packed
from qlab_kernels.tile import product

SUMMED = 256  # results per program of the kernel that adds the parts of a split


@triton.jit(do_not_specialize=["M", "SPLIT"])
def int4_mm_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    y_ptr,
    M,
    N,
    K,
    N_PAD,
    SPLIT,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SCALE_ON: tl.constexpr,
    LAYOUT: tl.constexpr,
    SEQUENCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (tiles of m, fastest, x tiles of n, SPLIT). y: [M, N], or fp32 partial products [SPLIT,
    M, N].

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
        rn,
        K,
        N_PAD,
        part,
        SPLIT,
        GROUP,
        ZEROS,
        BM,
        BN,
        BK,
        SCALE_ON,
        LAYOUT,
        SEQUENCE,
        COMPUTE,
        STAGES,
    )
    y_tile = y_ptr + (part.to(tl.int64) * M + block_m * BM) * N
    tl.store(
        y_tile + rm[None, :] * N + rn[:, None],
        acc.to(y_ptr.dtype.element_ty),
        mask=live[None, :] & (rn < N)[:, None],
    )


@triton.jit(do_not_specialize=["SPLIT"])
def sum_parts_kernel(parts_ptr, y_ptr, SIZE, SPLIT, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = sum over p < SPLIT of parts[p, i] in fp32, rounded once. PARTS: the power of two from
    SPLIT on."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, PARTS)
    inside = (p < SPLIT)[:, None] & (i < SIZE)[None, :]
    total = tl.sum(
        tl.load(parts_ptr + p.to(tl.int64)[:, None] * SIZE + i[None, :], mask=inside, other=0.0),
        axis=0,
    )
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=i < SIZE)


def int4_mm(x: Tensor, packed: Packed, config: Config) -> Tensor:
    """y[m, n] in x's dtype, for x [m, k] and any `config` that `legal` allows; the caller adds the
    bias.

    Products are summed in fp32, and so are the partial sums of a split, by a second kernel: the
    result does not depend on the order of programs.

    Raises:
        KernelError: for an x that does not fit the weights, and a kind that multiplies no matrices
        on a GPU.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, packed.n)
    if config.kind == "dequant":
        return x @ dense.dequantize(packed, x.dtype).T
    if config.kind == "fma":
        return fma.int4_mm_fma(x, packed, config)
    if config.kind not in ("split_k", "gemm"):
        raise KernelError(
            f"a GPU multiplies by split_k, gemm, fma or dequant, not by {config.kind}"
        )
    x, scales, zeros = operands(x, packed)
    m, split = x.shape[0], config.split
    y = x.new_empty(m, packed.n, dtype=stored(x.dtype))
    parts = y if split == 1 else x.new_empty(split, m, packed.n, dtype=torch.float32)
    grid = (triton.cdiv(m, config.bm) * (packed.padded_n // config.bn), split)
    with torch.cuda.device_of(x):
        int4_mm_kernel[grid](
            x,
            packed.words,
            scales,
            zeros,
            parts,
            m,
            packed.n,
            packed.padded_k,
            packed.padded_n,
            split,
            ZEROS=packed.zeros is not None,
            BM=config.bm,
            BN=config.bn,
            BK=config.bk,
            SCALE_ON=config.scale_on,
            STAGES=config.stages,
            **setting(x, packed),
            **options(config, packed.layout),
        )
        if split > 1:
            sum_parts_kernel[(triton.cdiv(y.numel(), SUMMED),)](
                parts, y, y.numel(), split, PARTS=triton.next_power_of_2(split), BLOCK=SUMMED
            )
    return y.to(x.dtype)
