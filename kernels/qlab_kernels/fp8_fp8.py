"""8-bit floats (e4m3) beside 8-bit floats: sums in fp32, with scales and bias in the same kernel.

    x_mk = p_mk t_m,  W_nk = q_nk s_n:            x @ W.T + b = t_m s_n sum_k p q + b
    x_mk = p_mk t_mc, W_nk = q_nk s_ac, k in c:   x @ W.T + b = sum_c t_mc s_ac sum_(k in c) p q + b

Scales of blocks, 128 x 128 of W and 128 channels of a token, multiply the sum of each block in fp32
(DeepSeek-V3, arXiv:2412.19437, section 3.3.2).
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from qlab_kernels.capability import KernelError
from qlab_kernels.config import Config
from qlab_kernels.device import stored
from qlab_kernels.fp8_fp8_kernel import fp8_fp8_kernel, fp8_parts_kernel
from qlab_kernels.rows import compiler_options

BLOCK = 128
SUMMED = 32  # rows of W in a program of the kernel that adds the parts of a split


class Fp8Weight(NamedTuple):
    """W [n, k], or [e, n, k] of experts. words: e4m3 [..., n', k'], padded. scales: fp32 [..., n']
    of rows, or [..., n / 128, k / 128] of blocks. n: without padding; k is that of the rows."""

    words: Tensor
    scales: Tensor
    n: int

    @property
    def in_blocks(self) -> bool:
        """Whether scales are those of blocks."""
        return self.scales.dim() == self.words.dim()


class Fp8Rows(NamedTuple):
    """Activations in codes. p: e4m3 [m, k]. scales: fp32 [m, 1], [1, 1] or, of blocks, [m,
    k / 128]."""

    p: Tensor
    scales: Tensor


def fp8_fp8(
    rows: Fp8Rows, weight: Fp8Weight, bias: Tensor | None, dtype: torch.dtype, config: Config
) -> Tensor:
    """y [m, n] = x @ W.T + b in `dtype`, in a configuration of kind gemm or split_k. The result
    does not depend on the order of programs.

    Raises:
        KernelError: for operands that do not fit each other, and other kinds.
    """
    if config.kind not in ("gemm", "split_k"):
        raise KernelError(f"8-bit floats are multiplied by gemm or split_k, not by {config.kind}")
    m, n = len(rows.p), weight.n
    y = rows.p.new_empty(m, n, dtype=stored(dtype))
    if m == 0 or config.split == 1:
        return _launched(rows, weight, bias, None, y, config).to(dtype)
    parts = rows.p.new_empty(config.split, m, n, dtype=torch.float32)
    _launched(rows, weight, bias, None, parts, config)
    bm = min(16, triton.next_power_of_2(m))
    with torch.cuda.device_of(rows.p):
        fp8_parts_kernel[(triton.cdiv(n, SUMMED), triton.cdiv(m, bm))](
            parts,
            weight.scales,
            rows.scales,
            weight.scales if bias is None else bias,
            y,
            m,
            n,
            config.split,
            ROWS=not weight.in_blocks,
            TOKENS=len(rows.scales) > 1,
            BIAS=bias is not None,
            BM=bm,
            BN=SUMMED,
        )
    return y.to(dtype)


def fp8_fp8_grouped(
    rows: Fp8Rows, weight: Fp8Weight, offsets: Tensor, dtype: torch.dtype, config: Config
) -> Tensor:
    """Rows offsets[e-1]:offsets[e] of x times expert e of W [e, n', k'] -> [m, n] in `dtype`.

    offsets: int32 [e] on the device of the codes, ascending ends; the last is m. Rows past it, if
    any, are left undefined.

    Raises:
        KernelError: for operands that do not fit each other, and any kind but gemm.
    """
    if config.kind != "gemm":
        raise KernelError(f"experts are multiplied by the one kind gemm, not {config.kind}")
    if weight.words.dim() != 3 or tuple(offsets.shape) != (len(weight.words),):
        raise KernelError(
            "weights of experts are [experts, n, k] with one end per expert, not "
            f"{tuple(weight.words.shape)} and {tuple(offsets.shape)}"
        )
    y = rows.p.new_empty(len(rows.p), weight.n, dtype=stored(dtype))
    return _launched(rows, weight, None, offsets, y, config).to(dtype)


def _launched(
    rows: Fp8Rows,
    weight: Fp8Weight,
    bias: Tensor | None,
    offsets: Tensor | None,
    y: Tensor,
    config: Config,
) -> Tensor:
    """y, written by the kernel: results, or the parts of a split."""
    (m, k), (padded_n, padded_k), n = rows.p.shape, weight.words.shape[-2:], weight.n
    _check(rows, weight, config)
    if m == 0:
        return y
    experts = 0 if offsets is None else len(offsets)
    tiles = m // config.bm + min(experts, m) if experts else triton.cdiv(m, config.bm)
    with torch.cuda.device_of(rows.p):
        fp8_fp8_kernel[(tiles * triton.cdiv(n, config.bn), config.split)](
            rows.p.contiguous(),
            weight.words,
            weight.scales,
            rows.scales.contiguous(),
            weight.scales if bias is None else bias,
            weight.scales if offsets is None else offsets,
            y,
            m,
            experts,
            n,
            k,
            padded_n,
            padded_k,
            weight.scales.shape[-1],
            config.split,
            BLOCK=BLOCK if weight.in_blocks else 0,
            TOKENS=len(rows.scales) > 1,
            BIAS=bias is not None,
            PARTS=config.split > 1,
            EXPERTS=triton.next_power_of_2(experts) if experts else 0,
            WHOLE=k % config.bk == 0,
            BM=config.bm,
            BN=config.bn,
            BK=config.bk,
            STAGES=config.stages,
            **compiler_options(rows.p, config),
        )
    return y


def _check(rows: Fp8Rows, weight: Fp8Weight, config: Config) -> None:
    (m, k), (padded_n, padded_k) = rows.p.shape, weight.words.shape[-2:]
    if not (k <= padded_k and weight.n <= padded_n):
        raise KernelError(
            f"codes [{m}, {k}] and {weight.n} rows do not fit weights padded to {padded_n}x"
            f"{padded_k}"
        )
    if not weight.in_blocks:
        return
    blocks = (triton.cdiv(weight.n, BLOCK), triton.cdiv(k, BLOCK))
    if tuple(weight.scales.shape[-2:]) != blocks or tuple(rows.scales.shape) != (m, blocks[1]):
        raise KernelError(
            f"a product {m}x{weight.n}x{k} in blocks of {BLOCK} has scales {blocks} and "
            f"{(m, blocks[1])}, not {tuple(weight.scales.shape[-2:])} and "
            f"{tuple(rows.scales.shape)}"
        )
    if BLOCK % config.bn or BLOCK % config.bk:
        raise KernelError(
            f"tiles of {config.bn}x{config.bk} straddle blocks of {BLOCK}: take bn and bk of at "
            f"most {BLOCK}"
        )
