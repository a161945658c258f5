"""x [m, n] times a scaled Hadamard matrix in O(n log n), one program for a few rows.

    M = scale diag(before) (H_2 (x) ... (x) H_2 (x) C) diag(behind),  H_2 = [[1, 1], [1, -1]]

The core C is a product on the tensor cores. Its entries are signs, so that products of x in 16 bits
are exact and sums are fp32; x in fp32 counts with 22 bits there (three products in tf32). Every H_2
is one addition and one subtraction of a pair in fp32, in registers: Triton exchanges pairs between
threads by shuffles and shared memory. The result is rounded once.
Sources: Sylvester 1867; Fino and Algazi 1976 (fast Walsh-Hadamard transform); Paley 1933 for cores.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlab_kernels.capability import KernelError
from qlab_kernels.device import interpreted, stored
from qlab_kernels.families.hadamard import OPERATOR, padded_core, refusal
from qlab_kernels.problem import Config, Problem

_TL = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A scaled Hadamard matrix [n, n] in factors.

    core: [c, c] of signs, or None for a power of two. before, behind: signs [n], or None where all
    are 1. These three may have any floating-point dtype; float16 takes the fewest bytes.
    """

    doublings: int
    scale: float
    core: Tensor | None = None
    before: Tensor | None = None
    behind: Tensor | None = None

    @property
    def core_size(self) -> int:
        return 1 if self.core is None else len(self.core)

    @property
    def n(self) -> int:
        return self.core_size << self.doublings


@triton.jit
def butterfly(x, ROWS: tl.constexpr, APART: tl.constexpr, N: tl.constexpr):
    """x [ROWS, N] -> sums and differences of the columns that are APART from each other."""
    pairs = x.reshape(ROWS, N // (2 * APART), 2, APART).trans(0, 1, 3, 2)
    first, second = tl.split(pairs)
    return tl.join(first + second, first - second).trans(0, 1, 3, 2).reshape(ROWS, N)


@triton.jit(do_not_specialize=["M", "scale"])
def hadamard_kernel(
    x_ptr,
    before_ptr,
    core_ptr,
    behind_ptr,
    y_ptr,
    scale,
    M,
    DOUBLINGS: tl.constexpr,
    CORE: tl.constexpr,
    PADDED: tl.constexpr,
    BEFORE: tl.constexpr,
    BEHIND: tl.constexpr,
    BM: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Grid (tiles of rows). x, y [M, N] with N = CORE << DOUBLINGS; a program has PADDED columns
    for every core, of which CORE exist."""
    N: tl.constexpr = CORE << DOUBLINGS
    WIDTH: tl.constexpr = PADDED << DOUBLINGS
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.arange(0, WIDTH)
    channel = column // PADDED * CORE + column % PADDED
    exists = column % PADDED < CORE
    at = rows[:, None] * N + channel[None, :]
    live = (rows < M)[:, None] & exists[None, :]
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    if BEFORE:
        x *= tl.load(before_ptr + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    if CORE > 1:
        i = tl.arange(0, PADDED)
        inside = (i < CORE)[:, None] & (i < CORE)[None, :]
        C = tl.load(core_ptr + i[:, None] * CORE + i[None, :], mask=inside, other=0.0)
        cores = x.to(COMPUTE).reshape(BM * WIDTH // PADDED, PADDED)
        x = tl.dot(cores, C.to(COMPUTE), input_precision="tf32x3").reshape(BM, WIDTH)
    for i in tl.static_range(DOUBLINGS):
        x = butterfly(x, BM, PADDED << i, WIDTH)
    x *= scale
    if BEHIND:
        x *= tl.load(behind_ptr + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=live)


def hadamard(x: Tensor, factors: Factors, config: Config) -> Tensor:
    """y [m, n] = x @ M in x's dtype, with fp32 sums; x is contiguous."""
    m, n = x.shape
    if n != factors.n:
        raise KernelError(f"x is [rows, {factors.n}] for this matrix, not {tuple(x.shape)}")
    y = torch.empty_like(x, dtype=stored(x.dtype))
    parts = (factors.before, factors.core, factors.behind)
    before, core, behind = (x if part is None else part for part in parts)
    with torch.cuda.device_of(x):
        hadamard_kernel[(triton.cdiv(m, config.bm),)](
            x.contiguous(),
            before,
            core,
            behind,
            y,
            factors.scale,
            m,
            **constants(x.dtype, factors, config),
            num_warps=config.warps,
        )
    return y.to(x.dtype)


def constants(dtype: torch.dtype, factors: Factors, config: Config) -> dict:
    """The kernel's constants. Its products are in fp32 where Triton is interpreted, which has no
    arithmetic in bf16."""
    return {
        "DOUBLINGS": factors.doublings,
        "CORE": factors.core_size,
        "PADDED": padded_core(factors.core_size),
        "BEFORE": factors.before is not None,
        "BEHIND": factors.behind is not None,
        "BM": config.bm,
        "COMPUTE": tl.float32 if interpreted() else _TL[dtype],
    }


def problem(x: Tensor, factors: Factors, cc: tuple[int, int], device: str) -> Problem:
    """The product's key in the config cache; KernelError where the device has no kernel for it."""
    dtype = str(x.dtype).removeprefix("torch.")
    reason = refusal(cc, dtype, factors.n, factors.core_size)
    if reason:
        raise KernelError(f"{reason}: multiply with the matrix itself")
    n, core = factors.n, factors.core_size
    return Problem(OPERATOR, cc, device, dtype, core, False, n, n, len(x))
