"""Which arithmetic multiplies 16-bit matrices on this processor: the same sums in fp32, at the rate that it has for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


@cache
def bf16_units() -> bool:
    """Whether this processor has matrix units for bf16 (AMX)."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def product_dtype(x: Tensor) -> torch.dtype:
    """What to multiply x [..., k] by a matrix in, before one rounding to x's own dtype; sums are fp32 either way.

    Without such units a processor takes up to twice as long for 16-bit matrices as for fp32 copies of them, without AVX-512 ten
    times, once there are rows enough to make up for the copies.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16) or (x.dtype == torch.bfloat16 and bf16_units()):
        return x.dtype
    rows = x.numel() // max(x.shape[-1], 1)
    return torch.float32 if rows >= _rows_worth_copies() else x.dtype


@cache
def _rows_worth_copies() -> int:
    return 256 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8


@contextmanager
def exact_bf16_products(dtype: torch.dtype) -> Iterator[None]:
    """Lets a processor with matrix units for bf16 multiply fp32 copies of bf16 numbers there: exact, summed in fp32."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
        yield
    finally:
        matmul.fp32_precision = before
