"""int8 weights and int8 activations: exact sums in int32, with scales, zero points and bias in the
same kernel.

    x_mk = (p_mk - y_m) t_m,  W_nk = (q_nk - z_nc) s_nc  in the group c of channel k
    x @ W.T + b = t_m sum_c s_nc [sum_k p q - z_nc sum_k p - y_m (sum_k q - g z_nc)] + b

Weights stay as they are written, rows of int8 one group after the other: tensor cores take both
operands with k adjacent. Products and sums in fp32 are not fused, so that every configuration
gives the bits of `reference_int8.product`.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from qlab_kernels.capability import KernelError
from qlab_kernels.config import Config
from qlab_kernels.device import stored
from qlab_kernels.int8_int8_kernel import int8_int8_kernel, int8_parts_kernel
from qlab_kernels.rows import compiler_options

SUMMED = 32  # rows of W in a program of the kernel that adds the parts of a split


class Int8Weight(NamedTuple):
    """W [n, k], or [e, n, k] of experts, in c groups of g channels. words: int8 [..., c, n, g].
    scales: fp32 [..., c, n]. zeros, sums: int32 alike or None; sums hold sum_k q - g z."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    sums: Tensor | None


class Int8Rows(NamedTuple):
    """Activations in codes. p: int8 [m, k]. scales: fp32 [m, 1] or [1, 1]. zeros: int8 alike, or
    None."""

    p: Tensor
    scales: Tensor
    zeros: Tensor | None


def int8_int8(
    rows: Int8Rows, weight: Int8Weight, bias: Tensor | None, dtype: torch.dtype, config: Config
) -> Tensor:
    """y [m, n] = x @ W.T + b in `dtype`, for W [c, n, g], in a configuration of kind gemm or
    split_k.

    Raises:
        KernelError: for operands that do not fit each other, and other kinds.
    """
    groups, n, _ = weight.words.shape
    if config.kind not in ("gemm", "split_k") or (config.split > 1 and groups > 1):
        raise KernelError(
            f"a weight in {groups} groups is multiplied by gemm"
            f"{'' if groups > 1 else ' or split_k'}, not by {config.kind}"
        )
    m = len(rows.p)
    y = rows.p.new_empty(m, n, dtype=stored(dtype))
    if m == 0 or config.split == 1:
        return _launched(rows, weight, bias, None, y, config).to(dtype)
    parts = rows.p.new_empty(config.split, m, n, dtype=torch.int32)
    _launched(rows, weight, bias, None, parts, config)
    bm = min(16, triton.next_power_of_2(m))
    operands = _operands(rows, weight, bias, weight.scales)
    with torch.cuda.device_of(rows.p):
        int8_parts_kernel[(triton.cdiv(n, SUMMED), triton.cdiv(m, bm))](
            parts,
            *operands[2:9],
            y,
            m,
            n,
            config.split,
            **_said(rows, weight, bias),
            BM=bm,
            BN=SUMMED,
            enable_fp_fusion=False,
        )
    return y.to(dtype)


def int8_int8_grouped(
    rows: Int8Rows, weight: Int8Weight, offsets: Tensor, dtype: torch.dtype, config: Config
) -> Tensor:
    """Rows offsets[e-1]:offsets[e] of x times expert e of W [e, c, n, g] -> [m, n] in `dtype`.

    offsets: int32 [e] on the device of the codes, ascending ends; the last is m. Rows past it, if
    any, are left undefined.

    Raises:
        KernelError: for operands that do not fit each other, and any kind but gemm.
    """
    if config.kind != "gemm":
        raise KernelError(f"experts are multiplied by the one kind gemm, not {config.kind}")
    if weight.words.dim() != 4 or tuple(offsets.shape) != (len(weight.words),):
        raise KernelError(
            "weights of experts are [experts, groups, n, channels] with one end per expert, not "
            f"{tuple(weight.words.shape)} and {tuple(offsets.shape)}"
        )
    y = rows.p.new_empty(len(rows.p), weight.words.shape[-2], dtype=stored(dtype))
    return _launched(rows, weight, None, offsets, y, config).to(dtype)


def _launched(
    rows: Int8Rows,
    weight: Int8Weight,
    bias: Tensor | None,
    offsets: Tensor | None,
    y: Tensor,
    config: Config,
) -> Tensor:
    """y, written by the kernel: results, or the parts of a split."""
    m, width = rows.p.shape
    groups, n, k = weight.words.shape[-3:]
    if width != groups * k:
        raise KernelError(f"codes are [tokens, {groups * k}] for these weights, not {m}x{width}")
    if m == 0:
        return y
    experts = 0 if offsets is None else len(offsets)
    tiles = m // config.bm + min(experts, m) if experts else triton.cdiv(m, config.bm)
    with torch.cuda.device_of(rows.p):
        int8_int8_kernel[(tiles * triton.cdiv(n, config.bn), config.split)](
            *_operands(rows, weight, bias, weight.scales if offsets is None else offsets),
            y,
            m,
            experts,
            n,
            k,
            groups,
            width,
            config.split,
            **_said(rows, weight, bias),
            GROUPS=groups > 1,
            PARTS=config.split > 1,
            EXPERTS=triton.next_power_of_2(experts) if experts else 0,
            WHOLE=k % config.bk == 0,
            BM=config.bm,
            BN=config.bn,
            BK=config.bk,
            STAGES=config.stages,
            **compiler_options(rows.p, config),
            enable_fp_fusion=False,
        )
    return y


def _operands(
    rows: Int8Rows, weight: Int8Weight, bias: Tensor | None, offsets: Tensor
) -> tuple[Tensor, ...]:
    """The tensors of a launch, the scales in the place of those that there are none of."""
    groups, k = weight.words.shape[-3], weight.words.shape[-1]
    nothing = weight.scales
    p = rows.p.contiguous()
    row_sums = nothing
    if weight.zeros is not None:
        row_sums = p.view(-1, groups, k).sum(-1, dtype=torch.int32)
    return (
        p,
        weight.words,
        weight.scales,
        nothing if weight.zeros is None else weight.zeros,
        nothing if weight.sums is None else weight.sums,
        rows.scales,
        nothing if rows.zeros is None else rows.zeros,
        row_sums,
        nothing if bias is None else bias,
        offsets,
    )


def _said(rows: Int8Rows, weight: Int8Weight, bias: Tensor | None) -> dict[str, bool]:
    """The constants that the operands decide."""
    return {
        "ZEROS": weight.zeros is not None,
        "SUMS": weight.sums is not None,
        "TOKENS": len(rows.scales) > 1,
        "BIAS": bias is not None,
    }
