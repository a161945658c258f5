"""int4 matmul of up to 8 tokens on the CUDA cores, for 7.5: Triton emits no tensor-core code there,
and no bf16."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlab_kernels.config import Config
from qlab_kernels.device import operands, setting
from qlab_kernels.layout import Packed


@triton.jit
def scaled_codes(words, POWER: tl.constexpr):
    """The nibbles at bit log2(POWER) as fp32 (q - 8) * POWER."""
    return ((words & (15 * POWER)) | 0x4B000000).to(tl.float32, bitcast=True) - (
        8388608.0 + 8.0 * POWER
    )


@triton.jit(do_not_specialize=["M"])
def int4_mm_fma_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    y_ptr,
    M,
    N,
    K,
    N_PAD,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid (tiles of n). x: fp32 planes [M, 9, K/8] of `planes`; words: int32 of the layout "rows",
    8 codes along k each.

    No integer is converted: nibble q at bit 4i under the exponent of 2**23 reads 2**23 + q * 16**i,
    and x carries the 16**-i. Groups are multiples of 8, so one word has one scale.
    """
    WORDS: tl.constexpr = BK // 8
    block_n = tl.program_id(0)
    rn = block_n * BN + tl.arange(0, BN)
    rm = tl.arange(0, BM)
    k8 = tl.arange(0, WORDS)
    K8 = K // 8
    words_ptr += (block_n * BN // 64).to(tl.int64) * (K // 64 * 512) + block_n * BN % 64 * 8
    words_ptrs = (
        words_ptr + tl.arange(0, BN)[None, :, None] * 8 + (k8 // 8 * 512 + k8 % 8)[None, None, :]
    )
    x_ptrs = x_ptr + rm[:, None, None] * (9 * K8) + k8[None, None, :]
    live = (rm < M)[:, None, None]
    acc = tl.zeros((BM, BN, WORDS), tl.float32)
    for tile in range(0, K // BK):
        words = tl.load(words_ptrs)
        part = tl.zeros((BM, BN, WORDS), tl.float32)
        for i in tl.static_range(8):
            half = words if i < 4 else words >> 16
            nibble = scaled_codes(half, 16 ** (i % 4))
            x = tl.load(x_ptrs + i * K8, mask=live, other=0.0)
            part += nibble * x
        row = (tile * BK + k8 * 8) // GROUP if GROUP > 0 else k8 * 0
        at = row[None, None, :] * N_PAD + rn[None, :, None]
        if ZEROS:
            total = tl.load(x_ptrs + 8 * K8, mask=live, other=0.0)
            part -= tl.load(zeros_ptr + at).to(tl.float32) * total
        acc += part * tl.load(scales_ptr + at).to(tl.float32)
        words_ptrs += BK * 8
        x_ptrs += WORDS
    y = tl.sum(acc, axis=2)
    tl.store(
        y_ptr + rm[:, None] * N + rn[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=(rm < M)[:, None] & (rn < N)[None, :],
    )


def planes(x: Tensor) -> Tensor:
    """x [m, k] -> fp32 [m, 9, k/8]: plane i < 8 is x[:, 8j + i] * 16**-(i % 4), exactly; plane 8 is
    the sum over i."""
    by_word = x.float().unflatten(1, (-1, 8))
    # Made on the device: a CUDA graph captures no copy from the host.
    powers = 1 << (torch.arange(8, device=x.device) % 4 * 4)
    return (
        torch.cat((by_word / powers, by_word.sum(-1, keepdim=True)), -1)
        .transpose(1, 2)
        .contiguous()
    )


def int4_mm_fma(x: Tensor, packed: Packed, config: Config) -> Tensor:
    """y[m, n] in x's dtype, all products and sums in fp32; m is at most config.bm."""
    x, _, _ = operands(x, packed)
    y = x.new_empty(x.shape[0], packed.n)
    zeros = packed.scales if packed.zeros is None else packed.zeros
    with torch.cuda.device_of(x):
        int4_mm_fma_kernel[(packed.padded_n // config.bn,)](
            planes(x),
            packed.words.view(torch.int32),
            packed.scales,
            zeros,
            y,
            x.shape[0],
            packed.n,
            packed.padded_k,
            packed.padded_n,
            GROUP=setting(x, packed)["GROUP"],
            ZEROS=packed.zeros is not None,
            BM=config.bm,
            BN=config.bn,
            BK=config.bk,
            num_warps=config.warps,
        )
    return y
