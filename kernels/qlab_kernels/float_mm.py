"""y[m, n] = x[m, k] @ W[n, k].T for weights of 4- and 8-bit floats (e2m1, e4m3) beside 16-bit
activations, and the same for the experts of a mixture. Weights are dequantized in registers.

NVFP4, MXFP4 and MXFP8 (OCP Microscaling Formats 1.0) have scales of 8 bits for 16 or 32
neighbouring weights, which multiply the weight. Scales of wider groups multiply the fp32 sums, and
the factor of a row multiplies its result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlab_kernels.capability import KernelError, target
from qlab_kernels.config import Config
from qlab_kernels.device import interpreted, options, stored
from qlab_kernels.float_layout import PackedFloats
from qlab_kernels.float_tile import float_product
from qlab_kernels.int4_mm import SUMMED, sum_parts_kernel
from qlab_kernels.rows import expert_tile


@triton.jit(do_not_specialize=["M", "SPLIT"])
def float_mm_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    factors_ptr,
    y_ptr,
    M,
    N,
    K,
    N_PAD,
    SPLIT,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    LAYOUT: tl.constexpr,
    SEQUENCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (tiles of m, fastest, x tiles of n, SPLIT). y: [M, N], or fp32 partial products [SPLIT,
    M, N]."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    tiles_m = tl.cdiv(M, BM)
    block_m = (tile % tiles_m).to(tl.int64)
    block_n = (tile // tiles_m).to(tl.int64)
    rm = tl.arange(0, BM)
    live = rm < M - block_m * BM
    rn = tl.arange(0, BN) + (tile // tiles_m) * BN
    acc = float_product(
        x_ptr + block_m * BM * K + rm * K,
        live,
        words_ptr + block_n * BN * K * BITS // 8,
        scales_ptr,
        factors_ptr,
        rn,
        K,
        N_PAD,
        part,
        SPLIT,
        BITS,
        GROUP,
        BM,
        BN,
        BK,
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


@triton.jit(do_not_specialize=["T", "E"])
def float_grouped_mm_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    factors_ptr,
    offsets_ptr,
    y_ptr,
    T,
    E,
    N,
    K,
    N_PAD,
    EXPERTS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    LAYOUT: tl.constexpr,
    SEQUENCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (an upper bound of the tiles of m, tiles of n). Each program finds its expert from
    `offsets` on the device; EXPERTS is E rounded up to a power of two."""
    tile = tl.program_id(0)
    block_n = tl.program_id(1)
    expert, row, left = expert_tile(offsets_ptr, tile, E, EXPERTS, BM)
    if expert >= E:
        return
    rm = tl.arange(0, BM)
    live = rm < left
    rn = tl.arange(0, BN) + block_n * BN
    one = expert.to(tl.int64)
    # rows of the scales of one expert
    if GROUP == 0:
        rows = 0
    elif GROUP <= 32:
        rows = tl.cdiv(K, 4 * GROUP)
    else:
        rows = K // GROUP
    acc = float_product(
        x_ptr + row.to(tl.int64) * K + rm * K,
        live,
        words_ptr + (one * N_PAD + block_n * BN) * K * BITS // 8,
        scales_ptr + one * rows * N_PAD,
        factors_ptr + one * N_PAD,
        rn,
        K,
        N_PAD,
        0,
        1,
        BITS,
        GROUP,
        BM,
        BN,
        BK,
        LAYOUT,
        SEQUENCE,
        COMPUTE,
        STAGES,
    )
    y_tile = y_ptr + row.to(tl.int64) * N
    tl.store(
        y_tile + rm[None, :] * N + rn[:, None],
        acc.to(y_ptr.dtype.element_ty),
        mask=live[None, :] & (rn < N)[:, None],
    )


def _operands(x: Tensor, packed: PackedFloats) -> tuple[Tensor, ...]:
    """x contiguous and padded along k, words, scales (the factors again where there are none) and
    factors."""
    if x.dim() != 2 or x.shape[1] != packed.k:
        raise KernelError(f"x is [tokens, {packed.k}] for these weights, not {tuple(x.shape)}")
    missing = packed.padded_k - packed.k
    x = torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()
    scales = packed.factors if packed.scales is None else packed.scales
    return x, packed.words, scales, packed.factors


def _setting(x: Tensor, packed: PackedFloats) -> dict:
    """The constants that the device and the weights decide."""
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    if x.dtype not in types:
        raise KernelError(
            f"kernels multiply floats of {packed.bits} bits with float16 and bfloat16, not with "
            f"{x.dtype}: cast the activations"
        )
    here = {"BITS": packed.bits, "GROUP": packed.group, "LAYOUT": packed.layout}
    if interpreted():
        compute = tl.float32 if x.dtype == torch.bfloat16 else tl.float16
        return {**here, "SEQUENCE": "plain", "COMPUTE": compute}
    if x.device.type != "cuda":
        raise KernelError(
            f"these kernels run on CUDA devices, not on {x.device}: there, "
            "qlab_kernels.reference_float_mm computes the same"
        )
    row = target(torch.cuda.get_device_capability(x.device))
    if row.path != "fused" or packed.layout != row.layout:
        raise KernelError(
            f"weights packed as {packed.layout} do not run here, which reads {row.layout}: lower "
            "them on this device"
        )
    return {**here, "SEQUENCE": row.sequence, "COMPUTE": types[x.dtype]}


def float_mm(x: Tensor, packed: PackedFloats, config: Config) -> Tensor:
    """y[m, n] in x's dtype, for x [m, k] and any legal `config`; the caller adds the bias.

    Products are summed in fp32, and so are the partial sums of a split, by a second kernel.

    Raises:
        KernelError: for an x that does not fit the weights, a device that reads another layout, and
            another kind than split_k and gemm.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, packed.n)
    if config.kind not in ("split_k", "gemm"):
        raise KernelError(f"floats are multiplied by split_k and gemm, not by {config.kind}")
    constants = _setting(x, packed)
    x, words, scales, factors = _operands(x, packed)
    m, split = x.shape[0], config.split
    y = x.new_empty(m, packed.n, dtype=stored(x.dtype))
    parts = y if split == 1 else x.new_empty(split, m, packed.n, dtype=torch.float32)
    grid = (triton.cdiv(m, config.bm) * (packed.padded_n // config.bn), split)
    with torch.cuda.device_of(x):
        float_mm_kernel[grid](
            x,
            words,
            scales,
            factors,
            parts,
            m,
            packed.n,
            packed.padded_k,
            packed.padded_n,
            split,
            BM=config.bm,
            BN=config.bn,
            BK=config.bk,
            STAGES=config.stages,
            **constants,
            **options(config, packed.layout),
        )
        if split > 1:
            sum_parts_kernel[(triton.cdiv(y.numel(), SUMMED),)](
                parts, y, y.numel(), split, PARTS=triton.next_power_of_2(split), BLOCK=SUMMED
            )
    return y.to(x.dtype)


def float_grouped_mm(x: Tensor, packed: PackedFloats, offsets: Tensor, config: Config) -> Tensor:
    """Rows offsets[e-1]:offsets[e] of x [t, k] times expert e of W [e, n, k] -> [t, n] in x's
    dtype.

    offsets: int32 [e] on x's device, ascending ends; the last is t. Rows past it, if any, are left
    undefined.

    Raises:
        KernelError: for operands that do not fit each other, and any kind but gemm.
    """
    experts = packed.words.shape[0]
    if packed.words.dim() != 4 or tuple(offsets.shape) != (experts,):
        raise KernelError(
            "grouped weights are packed [experts, ...] with one end per expert, not "
            f"{tuple(packed.words.shape)} and {tuple(offsets.shape)}"
        )
    if config.kind != "gemm":
        raise KernelError(f"experts of floats have the one kind gemm, not {config.kind}")
    t = x.shape[0]
    y = x.new_empty(t, packed.n, dtype=stored(x.dtype))
    if t == 0:
        return y.to(x.dtype)
    constants = _setting(x, packed)
    x, words, scales, factors = _operands(x, packed)
    grid = (t // config.bm + min(experts, t), packed.padded_n // config.bn)
    with torch.cuda.device_of(x):
        float_grouped_mm_kernel[grid](
            x,
            words,
            scales,
            factors,
            offsets,
            y,
            t,
            experts,
            packed.n,
            packed.padded_k,
            packed.padded_n,
            EXPERTS=triton.next_power_of_2(experts),
            BM=config.bm,
            BN=config.bn,
            BK=config.bk,
            STAGES=config.stages,
            **constants,
            **options(config, packed.layout),
        )
    return y.to(x.dtype)
