"""The launch of attention over a quantized cache, a plain function of tensors and a
configuration."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlab_kernels.cache_attention import cache_attention_kernel, combine_kernel
from qlab_kernels.cached import Cached, decoding
from qlab_kernels.capability import Capability, KernelError
from qlab_kernels.device import interpreted, stored
from qlab_kernels.families.cache_attention import (
    OPERATORS,
    REGISTERS,
    padded,
    positions_tuned,
)
from qlab_kernels.problem import Config, Problem

_TL = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
COMBINING_WARPS = 4


def attend(
    q: Tensor,
    keys: Cached,
    values: Cached,
    lengths: Tensor,
    config: Config,
    *,
    scale: float | None = None,
    cap: float | None = None,
    window: int | None = None,
    starts: Tensor | None = None,
    pages: Tensor | None = None,
) -> Tensor:
    """y [b, heads, t, dv] in q's dtype for q [b, heads, t, d], the queries of the last t positions
    of every sequence.

    lengths: int32 [b], positions of every sequence, its queries' own included. scale: of scores,
    1 / sqrt(d) by default; cap: scores s become cap tanh(s / cap); window: how many positions a
    query sees, its own included; starts: int32 [b], the first position that exists. pages: int32
    [b, pages], where the positions of a sequence are in codes [pages, h, positions of a page, ...].
    A query that sees no position has 0. Sums are fp32, and weights have q's dtype.
    """
    check(q, keys, values, lengths, starts, pages)
    b, heads, t, d = q.shape
    h = keys.codes.shape[1]
    rows, dv = heads // h * t, values.channels
    y = q.new_empty(b, h, rows, dv, dtype=stored(q.dtype))
    sums = q.new_empty(b * h, config.split, rows, dv, dtype=torch.float32)
    tops = q.new_empty(b * h, config.split, rows, dtype=torch.float32)
    totals = torch.empty_like(tops)
    if not y.numel():
        return y.view(b, heads, t, dv).to(q.dtype)
    with torch.cuda.device_of(q):
        grid = (b * h, triton.cdiv(rows, config.bm), config.split)
        cache_attention_kernel[grid](
            q.contiguous(),
            *_tensors(keys),
            *_tensors(values),
            lengths,
            lengths if starts is None else starts,
            lengths if pages is None else pages,
            sums,
            tops,
            totals,
            1 / math.sqrt(d) if scale is None else scale,
            0.0 if cap is None else cap,
            0 if window is None else window,
            h,
            t,
            rows,
            0 if pages is None else pages.stride(0),
            *_strides(keys),
            *_strides(values),
            **constants(q.dtype, keys, values),
            CAPPED=cap is not None,
            WINDOWED=window is not None,
            STARTED=starts is not None,
            PAGE=0 if pages is None else keys.codes.shape[2],
            BM=config.bm,
            BN=config.bn,
            STAGES=config.stages,
            num_warps=config.warps,
            maxnreg=REGISTERS,
        )
        combine_kernel[(b * h, rows)](
            sums,
            tops,
            totals,
            y,
            rows,
            config.split,
            DV=dv,
            PADDED=padded(dv),
            MOST=triton.next_power_of_2(config.split),
            num_warps=COMBINING_WARPS,
        )
    return y.view(b, heads, t, dv).to(q.dtype)


def _tensors(cached: Cached) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as bytes, scales, and zeros (the scales again where there are none)."""
    codes = cached.codes.view(torch.uint8) if cached.format == "fp8" else cached.codes
    return codes, cached.scales, cached.scales if cached.zeros is None else cached.zeros


def _strides(cached: Cached) -> tuple[int, ...]:
    """Those of sequences or pages, heads and positions, of codes and of scales."""
    return (*cached.codes.stride()[:3], *cached.scales.stride()[:3])


def constants(dtype: torch.dtype, keys: Cached, values: Cached) -> dict[str, Any]:
    """The kernel's constants that the operands decide. The interpreter, which has no arithmetic in
    bf16, multiplies in fp32."""
    compute = torch.float32 if interpreted() and dtype == torch.bfloat16 else dtype
    of_keys = _constants(compute, keys.format, keys.channels, keys.group)
    of_values = _constants(compute, values.format, values.channels, values.group)
    return {
        "D": keys.channels,
        "DV": values.channels,
        "COMPUTE": _TL[compute],
        "K_ZEROS": keys.zeros is not None,
        "V_ZEROS": values.zeros is not None,
        **{f"K_{name}": value for name, value in of_keys.items()},
        **{f"V_{name}": value for name, value in of_values.items()},
    }


def _constants(compute: torch.dtype, format: Any, channels: int, group: int) -> Mapping[str, Any]:
    width = -(-channels // 2) if format == "int4" else channels
    offset, unit = decoding(format, compute)
    return {
        "WIDTH": width,
        "PADDED": padded(width),
        "FORMAT": format,
        "OFFSET": offset,
        "UNIT": unit,
        "GROUP": group,
    }


def problem(
    q: Tensor, keys: Cached, cc: Capability, device: str, positions: int | None = None
) -> Problem:
    """The key in the config cache; KernelError where the device has no kernel. positions: of a
    sequence at most, where codes are in pages."""
    b, heads, t, d = q.shape
    h, n = keys.codes.shape[1:3]
    asked = Problem(
        op=OPERATORS[keys.format],
        cc=cc,
        device=device,
        dtype=str(q.dtype).removeprefix("torch."),
        group=keys.group or d,
        zeros=keys.zeros is not None,
        n=positions_tuned(n if positions is None else positions),
        k=d,
        m=heads // h * t,
        experts=b * h,
    )
    return asked


def check(
    q: Tensor,
    keys: Cached,
    values: Cached,
    lengths: Tensor,
    starts: Tensor | None,
    pages: Tensor | None,
) -> None:
    """Refuse operands that do not fit each other."""
    if q.ndim != 4 or q.shape[-1] != keys.channels or q.shape[1] % keys.codes.shape[1]:
        raise KernelError(
            f"queries are [b, heads, tokens, {keys.channels}] with a multiple of "
            f"{keys.codes.shape[1]} heads, not {tuple(q.shape)}"
        )
    if keys.codes.shape[:3] != values.codes.shape[:3]:
        raise KernelError(
            f"keys {tuple(keys.codes.shape)} and values {tuple(values.codes.shape)} differ in "
            "sequences, heads or positions"
        )
    if pages is None and len(q) != len(keys.codes):
        raise KernelError(f"{len(q)} sequences of queries and {len(keys.codes)} of keys")
    if pages is not None and (pages.ndim != 2 or len(pages) != len(q) or pages.stride(1) != 1):
        raise KernelError(f"a page table is [{len(q)}, pages], not {tuple(pages.shape)}")
    for name, counts in (("lengths", lengths), ("starts", starts), ("pages", pages)):
        if counts is not None and (counts.dtype != torch.int32 or len(counts) != len(q)):
            raise KernelError(
                f"{name} are int32, one for each of {len(q)} sequences, not {counts.dtype} "
                f"{tuple(counts.shape)}"
            )
    for name, cached in (("keys", keys), ("values", values)):
        strides = (cached.codes.stride(3), cached.scales.stride(3))
        if strides[0] != 1 or (cached.group and strides[1] != 1):
            raise KernelError(f"channels of {name} do not lie one behind the other in memory")
