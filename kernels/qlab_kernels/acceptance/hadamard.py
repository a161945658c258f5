"""The cases of products with Hadamard matrices: every order, in every configuration.

Bits are compared for integers, whose sums are exact in fp32; numbers at random come behind, within
a bound of rounding.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qlab_kernels import reference
from qlab_kernels.acceptance import Case
from qlab_kernels.capability import Capability
from qlab_kernels.config import candidates
from qlab_kernels.families.hadamard import refusal
from qlab_kernels.hadamard import Factors, hadamard, problem

ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0.0}
SUMS = 2.0**-20  # of fp32, relative to the sum of magnitudes


# doublings and core, of which 12, 20, 28 and 36 are the orders of Paley's matrices
ORDERS = ((12, 1), (6, 1), (10, 1), (7, 12), (8, 20), (9, 28), (8, 36))


@dataclass(frozen=True)
class Rows:
    """m rows of core << doublings channels. core: of -1 and 1 at random; a kernel may not rely on
    orthogonal rows. which: of the candidates, in turn."""

    m: int
    doublings: int
    core: int
    before: bool
    behind: bool
    dtype: str
    which: int = 0
    integers: bool = False
    seed: int = 0
    cc: Capability = (9, 0)


def operands(rows: Rows, device: torch.device) -> tuple[Tensor, Factors]:
    """x [m, n] and the factors of a matrix."""
    rng = torch.Generator().manual_seed(rows.seed)

    def signs(*shape: int) -> Tensor:
        return (torch.randint(2, shape, generator=rng).half() * 2 - 1).to(device)

    n = rows.core << rows.doublings
    factors = Factors(
        doublings=rows.doublings,
        scale=1.0 if rows.integers else 0.37,
        core=signs(rows.core, rows.core) if rows.core > 1 else None,
        before=signs(n) if rows.before else None,
        behind=signs(n) if rows.behind else None,
    )
    x = torch.randn(rows.m, n, generator=rng, dtype=torch.float32)
    if rows.integers:
        x = torch.randint(-127, 128, (rows.m, n), generator=rng).float()
    return x.to(device, getattr(torch, rows.dtype)), factors


def excess(rows: Rows, device: torch.device) -> float:
    """max |y - y64| over what rounding y and fp32 sums explain; for integers 0 or infinity, since
    their results are rounded once."""
    x, factors = operands(rows, device)
    configs = candidates(problem(x, factors, rows.cc, ""))
    y = hadamard(x, factors, configs[rows.which % len(configs)])
    expected = reference.hadamard(x, factors)
    assert y.dtype == x.dtype and y.shape == x.shape
    if rows.integers:
        return 0.0 if torch.equal(y, expected.to(y.dtype)) else math.inf
    magnitude = x.double().abs().sum(1, keepdim=True) * factors.scale
    allowed = 1.01 * ROUNDING[rows.dtype] * expected.abs() + SUMS * magnitude + 1e-7
    return float(((y.double() - expected).abs() / allowed).max()) if y.numel() else 0.0


def cases(cc: Capability) -> list[Case]:
    """What runs by default for every order and dtype, integers first; then the other candidates."""
    able = [
        (order, dtype)
        for order in ORDERS
        for dtype in ("bfloat16", "float16", "float32")
        if refusal(cc, dtype, order[1] << order[0], order[1]) is None
    ]
    listed = [_case(cc, *kind, integers, 0) for integers in (True, False) for kind in able]
    return listed + [_case(cc, *kind, True, which) for which in (1, 2) for kind in able]


def _case(cc: Capability, order: tuple[int, int], dtype: str, integers: bool, which: int) -> Case:
    rows = Rows(37, *order, True, True, dtype, which, integers, cc=cc)
    numbers = "integers" if integers else "numbers"
    name = f"{numbers} {dtype} {order[1] << order[0]} as 2^{order[0]} x {order[1]}, {which}"
    return Case(name=name, excess=partial(excess, rows))
