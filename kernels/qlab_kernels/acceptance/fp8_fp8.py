"""The cases of fp8 x fp8: every tile, with scales of rows and of blocks, and experts.

Small integers under powers of two make sums exact, so that bits are compared; numbers at random
come behind, within a bound of rounding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qlab_kernels import reference_fp8
from qlab_kernels.acceptance import Case, Form
from qlab_kernels.capability import Capability
from qlab_kernels.config import BUCKETS, Config, Problem, candidates, heuristic
from qlab_kernels.families.fp8_fp8 import BLOCK, FIRST
from qlab_kernels.fp8_fp8 import Fp8Rows, Fp8Weight, fp8_fp8, fp8_fp8_grouped

N, K = 200, 640
ENDS = (0, 3, 50, 50, 51, 200)  # of the experts' rows: some have none
# one scale per row, and one per block
TIMED = tuple(Form(op="fp8_fp8_mm", dtype="bfloat16", group=group) for group in (2**20, BLOCK))
E4M3 = torch.float8_e4m3fn
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
# A tensor core of 9.0 adds 32 products and its sum with about 14 bits of the largest of them
# (arXiv:2412.19437, section 3.5.2): what it cuts off is at most this share of them.
INSIDE = 2.0**-9


@dataclass(frozen=True, kw_only=True)
class Fp8Product:
    """A product; `config` holds the arguments of Config.

    blocks: whether scales are those of blocks. tokens: whether each row of activations has a scale
    of its own. padding: of W, in both axes. ends: of the experts' rows. exact: integers, whose sums
    have no rounding errors.
    """

    m: int
    n: int
    k: int
    config: tuple
    blocks: bool = False
    tokens: bool = True
    bias: bool = False
    dtype: str = "bfloat16"
    padding: int = 0
    ends: tuple[int, ...] = ()
    exact: bool = True
    seed: int = 0


def operands(case: Fp8Product, device: torch.device) -> tuple[Fp8Rows, Fp8Weight, Tensor | None]:
    """(rows, weight, bias) of a case."""
    rng = torch.Generator().manual_seed(case.seed)
    lead = (len(case.ends),) if case.ends else ()
    n, k = case.n + case.padding, case.k + case.padding

    def codes(*shape: int) -> Tensor:
        if case.exact:
            return torch.randint(-4, 5, shape, generator=rng).float()
        return torch.randn(*shape, generator=rng, dtype=torch.float32) * 16

    def scales(*shape: int) -> Tensor:
        if case.exact:
            return 2.0 ** torch.randint(-2, 3, shape, generator=rng).float()
        return torch.rand(*shape, generator=rng, dtype=torch.float32) + 0.5

    words, p = codes(*lead, n, k).to(E4M3), codes(case.m, case.k).to(E4M3)
    words[..., case.n :, :], words[..., :, case.k :] = 0, 0
    blocks = math.ceil(case.k / BLOCK)
    if case.blocks:
        of_weight, of_rows = (
            scales(*lead, math.ceil(case.n / BLOCK), blocks),
            scales(case.m, blocks),
        )
    else:
        of_weight, of_rows = scales(*lead, n), scales(case.m if case.tokens else 1, 1)
    bias = codes(case.n).to(getattr(torch, case.dtype)) if case.bias else None
    rows = Fp8Rows(p.to(device), of_rows.to(device))
    weight = Fp8Weight(words.to(device), of_weight.to(device), case.n)
    return rows, weight, None if bias is None else bias.to(device)


def excess(case: Fp8Product, device: torch.device) -> float:
    """max |y - y64| over what is allowed, rounding y and sums; 0 or infinity for exact operands."""
    rows, weight, bias = operands(case, device)
    config, dtype = Config(*case.config), getattr(torch, case.dtype)
    if case.ends:
        ends = torch.tensor(case.ends, dtype=torch.int32, device=device)
        y = fp8_fp8_grouped(rows, weight, ends, dtype, config)
    else:
        y = fp8_fp8(rows, weight, bias, dtype, config)
    right = _by_experts(reference_fp8.product, case, rows, weight)
    if bias is not None:
        right = right + bias.double()
    assert y.dtype == dtype and y.shape == right.shape
    if case.exact:
        return 0.0 if torch.equal(y, right.to(dtype)) else math.inf
    size = _by_experts(reference_fp8.magnitude, case, rows, weight)
    size = size if bias is None else size + bias.double().abs()
    allowed = 1.01 * UNIT[case.dtype] * right.abs() + INSIDE * size + 1e-7
    return float(((y.double() - right).abs() / allowed).max()) if y.numel() else 0.0


def _by_experts(
    product: Callable[..., Tensor], case: Fp8Product, rows: Fp8Rows, weight: Fp8Weight
) -> Tensor:
    """y [m, n] in float64 by a function of the reference, expert by expert."""
    if not case.ends:
        return product(*rows, *weight)
    parts = []
    for e, (start, end) in enumerate(zip((0, *case.ends), case.ends)):
        p, t = (part if len(part) < case.m else part[start:end] for part in rows)
        parts.append(product(p, t, weight.words[e], weight.scales[e], weight.n))
    return torch.cat(parts)


def cases(cc: Capability) -> list[Case]:
    """What the heuristic takes for few, some and many tokens; experts; every tile."""
    if cc < FIRST:
        return []
    forms = (K, BLOCK)
    problems = [_problem(cc, m, group) for group in forms for m in (1, 16, 64, 256, 4096)]
    defaults = dict.fromkeys((p.group, heuristic(p)) for p in problems)
    tiles: dict[tuple[int, Config], Config] = {}
    for p in (_problem(cc, m, group) for group in forms for m in BUCKETS):
        for c in (c for c in candidates(p) if c.kind != "library"):
            tiles.setdefault((p.group, replace(c, kind="gemm", split=1)), c)
    others = [(group, c) for (group, _), c in tiles.items() if (group, c) not in defaults]
    experts = [_experts(cc, group) for group in forms]
    seldom = [replace(_product(*one), tuned=True) for one in others]
    return [*(_product(*one) for one in defaults), *experts, *seldom]


def _problem(cc: Capability, m: int, group: int) -> Problem:
    return Problem("fp8_fp8_mm", cc, "", "bfloat16", group, False, N, K, m)


def _product(group: int, c: Config) -> Case:
    one = Fp8Product(m=1, n=N, k=K, config=_arguments(c), blocks=group == BLOCK)
    # blocks have all their channels
    ragged = replace(one, m=2 * c.bm + 1, bias=True, dtype="float16", padding=8)
    ragged = ragged if one.blocks else replace(ragged, tokens=False, k=K - 24)
    runs = [one, replace(one, m=c.bm - 3), ragged, replace(ragged, exact=False)]
    return Case(
        name=f"{_name(c)} {_form(group)} {N}x{K}",
        excess=partial(_largest, runs),
        kernels=4 if c.split > 1 else 2,
    )


def _experts(cc: Capability, group: int) -> Case:
    p = Problem("fp8_fp8_grouped_mm", cc, "", "bfloat16", group, False, N, K, ENDS[-1], len(ENDS))
    c = heuristic(p)
    one = Fp8Product(
        m=ENDS[-1], n=N, k=K, config=_arguments(c), ends=ENDS, blocks=group == BLOCK, padding=8
    )
    runs = [one, replace(one, exact=False)]
    return Case(name=f"experts {_name(c)} {_form(group)}", excess=partial(_largest, runs))


def _arguments(c: Config) -> tuple:
    return c.kind, c.bm, c.bn, c.bk, c.split, c.warps, c.stages


def _form(group: int) -> str:
    return "blocks" if group == BLOCK else "rows"


def _name(c: Config) -> str:
    tile = f"{c.bm}x{c.bn}x{c.bk}"
    return f"{c.kind} {tile} split {c.split} warps {c.warps} stages {c.stages}"


def _largest(runs: list[Fp8Product], device: torch.device) -> float:
    return max(excess(one, device) for one in runs)


# ---------------------------------------------------------------- products to time
def timed(p: Problem, device: torch.device, seed: int) -> Callable[[Config], Tensor]:
    """config -> y of a random linear [n, k], for activations that are codes already."""
    blocks = p.group == BLOCK
    one = Fp8Product(
        m=p.m, n=p.n, k=p.k, config=(), blocks=blocks, dtype=p.dtype, exact=False, seed=seed
    )
    rows, weight, _ = operands(one, device)
    return partial(fp8_fp8, rows, weight, None, getattr(torch, p.dtype))
