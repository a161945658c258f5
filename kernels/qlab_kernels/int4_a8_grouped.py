"""int4 weights times activations of 8 bits in a mixture of experts: tokens sorted by expert, each
multiplied with its own expert's weights."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlab_kernels.capability import KernelError
from qlab_kernels.device import stored
from qlab_kernels.device8 import Activations, admit, constants, x_and_weight
from qlab_kernels.layout import Packed
from qlab_kernels.problem import Config
from qlab_kernels.rows import expert_tile
from qlab_kernels.tile8 import finished, product


@triton.jit(do_not_specialize=["T", "E"])
def int4_a8_grouped_mm_kernel(
    x_ptr,
    t_ptr,
    sums_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    offsets_ptr,
    y_ptr,
    T,
    E,
    N,
    K,
    N_PAD,
    EXPERTS: tl.constexpr,
    UNIT: tl.constexpr,
    FIXED: tl.constexpr,
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
    """Grid (an upper bound of the tiles of m, tiles of n). Each program finds its expert from
    `offsets` on the device, so that the host waits for nothing; EXPERTS is E rounded up to a power
    of two. sums: [K / GROUP, T]."""
    tile = tl.program_id(0)
    block_n = tl.program_id(1)
    expert, row, left = expert_tile(offsets_ptr, tile, E, EXPERTS, BM)
    if expert >= E:
        return
    rm = tl.arange(0, BM)
    live = rm < left
    rn = tl.arange(0, BN) + block_n * BN
    words_ptr += expert.to(tl.int64) * N_PAD * (K // 2) + block_n.to(tl.int64) * BN * (K // 2)
    scale_rows = expert.to(tl.int64) * (K // GROUP if GROUP > 0 else 1) * N_PAD
    acc = product(
        x_ptr + row.to(tl.int64) * K + rm * K,
        live,
        words_ptr,
        scales_ptr + scale_rows,
        zeros_ptr + scale_rows,
        sums_ptr + row,
        rm,
        rn,
        K,
        N_PAD,
        T,
        0,
        1,
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
    t_tile = t_ptr + (0 if FIXED else row)
    acc = finished(acc, t_tile, t_ptr, rm, live, rn, N, 0, UNIT, FIXED, False)
    y_tile = y_ptr + row.to(tl.int64) * N
    tl.store(
        y_tile + rm[None, :] * N + rn[:, None],
        acc.to(y_ptr.dtype.element_ty),
        mask=live[None, :] & (rn < N)[:, None],
    )


def int4_a8_grouped_mm(
    x: Activations, packed: Packed, offsets: Tensor, dtype: torch.dtype, config: Config
) -> Tensor:
    """Rows offsets[e-1]:offsets[e] of x [s, k] times expert e of W [e, n, k] -> y [s, n] in
    `dtype`.

    offsets: int32 [e] on x's device, ascending ends; the last is s. Rows past it, if any, are left
    undefined.

    Raises:
        KernelError: for operands that do not fit each other or this device, and any kind but gemm.
    """
    admit(x, packed, config)
    experts = packed.words.shape[0]
    if packed.words.dim() != 4 or tuple(offsets.shape) != (experts,):
        raise KernelError(
            "grouped weights are packed [experts, ...] with one end per expert, not "
            f"{tuple(packed.words.shape)} and {tuple(offsets.shape)}"
        )
    if config.kind != "gemm":
        raise KernelError(f"the grouped product has the one kind gemm, not {config.kind}")
    s = len(x.p)
    y = x.p.new_empty(s, packed.n, dtype=stored(dtype))
    if not s:
        return y.to(dtype)
    grid = (s // config.bm + min(experts, s), packed.padded_n // config.bn)
    with torch.cuda.device_of(x.p):
        int4_a8_grouped_mm_kernel[grid](
            *x_and_weight(x, packed),
            offsets,
            y,
            s,
            experts,
            packed.n,
            packed.padded_k,
            packed.padded_n,
            EXPERTS=triton.next_power_of_2(experts),
            **constants(x.t, packed, config),
        )
    return y.to(dtype)
