"""The cases of int8 x int8: products whose sums are exact, so that bits are compared, in every
tile, with and without zero points, for rows and groups, and for experts."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qlab_kernels.acceptance import Case, Form
from qlab_kernels.capability import Capability
from qlab_kernels.config import BUCKETS, Config, Problem, candidates, heuristic
from qlab_kernels.families.int8_int8 import fused
from qlab_kernels.int8_int8 import Int8Rows, Int8Weight, int8_int8, int8_int8_grouped
from qlab_kernels.reference_int8 import product

N, K = 200, 640
ENDS = (0, 3, 50, 50, 51, 200)  # of the experts' rows: some have none
TIMED = (Form(op="int8_int8_mm", dtype="bfloat16", group=2**20),)  # one scale per row


@dataclass(frozen=True, kw_only=True)
class Int8Product:
    """A product; `config` holds the arguments of Config.

    groups: of k channels in a row. zeros, row_zeros: whether weights and activations have zero
    points. tokens: whether each row of activations has a scale of its own. ends: of the experts'
    rows, for the grouped product.
    """

    m: int
    n: int
    k: int
    config: tuple
    groups: int = 1
    zeros: bool = False
    row_zeros: bool = False
    tokens: bool = True
    bias: bool = False
    dtype: str = "bfloat16"
    ends: tuple[int, ...] = ()
    seed: int = 0


def operands(case: Int8Product, device: torch.device) -> tuple[Int8Rows, Int8Weight, Tensor | None]:
    """(rows, weight, bias) of a case, the codes over their whole range."""
    rng = torch.Generator().manual_seed(case.seed)
    lead = (len(case.ends),) if case.ends else ()

    def codes(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8).to(device)

    def numbers(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=rng, dtype=torch.float32) + 0.5).to(device)

    words = codes(*lead, case.groups, case.n, case.k)
    zeros = codes(*words.shape[:-1]).int() if case.zeros else None
    sums = None
    if case.row_zeros:
        sums = words.sum(-1, dtype=torch.int32) - (0 if zeros is None else case.k * zeros)
    rows = case.m if case.tokens else 1
    p = codes(case.m, case.groups * case.k)
    row_zeros = codes(rows, 1) if case.row_zeros else None
    bias = numbers(case.n).to(getattr(torch, case.dtype)) if case.bias else None
    weight = Int8Weight(words, numbers(*words.shape[:-1]), zeros, sums)
    return Int8Rows(p, numbers(rows, 1), row_zeros), weight, bias


def expected(rows: Int8Rows, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """y [m, n] in fp32."""
    words, scales, zeros, sums = weight
    y = product(rows.p, rows.scales, rows.zeros, words, scales, zeros, sums)
    return y if bias is None else y + bias.float()


def excess(case: Int8Product, device: torch.device) -> float:
    """0 where the kernel gives the reference's bits, rounded once, else infinity."""
    rows, weight, bias = operands(case, device)
    config, dtype = Config(*case.config), getattr(torch, case.dtype)
    if not case.ends:
        y = int8_int8(rows, weight, bias, dtype, config)
        right = expected(rows, weight, bias).to(dtype)
    else:
        ends = torch.tensor(case.ends, dtype=torch.int32, device=device)
        y = int8_int8_grouped(rows, weight, ends, dtype, config)
        right = _of_experts(case, rows, weight).to(dtype)
    return 0.0 if y.dtype == dtype and torch.equal(y, right) else math.inf


def _of_experts(case: Int8Product, rows: Int8Rows, weight: Int8Weight) -> Tensor:
    """y [m, n] in fp32, expert by expert."""
    parts = []
    for e, (start, end) in enumerate(zip((0, *case.ends), case.ends)):
        own = slice(start, end) if len(rows.scales) == case.m else slice(None)
        zeros = None if rows.zeros is None else rows.zeros[own]
        mine = Int8Rows(rows.p[start:end], rows.scales[own], zeros)
        parts.append(expected(mine, _expert(weight, e), None))
    return torch.cat(parts)


def _expert(weight: Int8Weight, e: int) -> Int8Weight:
    zeros, sums = (None if t is None else t[e] for t in (weight.zeros, weight.sums))
    return Int8Weight(weight.words[e], weight.scales[e], zeros, sums)


def cases(cc: Capability) -> list[Case]:
    """What the heuristic takes for few, some and many tokens; experts; every tile."""
    if not fused(cc):
        return []
    defaults = [heuristic(_problem(cc, m)) for m in (1, 16, 64, 256, 4096)]
    tiles: dict[Config, Config] = {}
    for m in BUCKETS:
        for c in (c for c in candidates(_problem(cc, m)) if c.kind != "library"):
            tiles.setdefault(replace(c, kind="gemm", split=1), c)
    configs = dict.fromkeys([*defaults, *tiles.values()])
    listed = [_product(c) for c in configs]
    p = Problem("int8_int8_grouped_mm", cc, "", "bfloat16", K, False, N, K, ENDS[-1], len(ENDS))
    several = Problem("int8_int8_mm", cc, "", "bfloat16", K // 2, True, N, K, 64)
    others = [_experts(heuristic(p)), _groups(heuristic(several))]
    seldom = [replace(case, tuned=True) for case in listed[len(set(defaults)) :]]
    return [*listed[: len(set(defaults))], *others, *seldom]


def _problem(cc: Capability, m: int) -> Problem:
    return Problem("int8_int8_mm", cc, "", "bfloat16", K, False, N, K, m)


def _product(c: Config) -> Case:
    one = Int8Product(m=1, n=N, k=K, config=_arguments(c))
    runs = [
        one,
        replace(one, m=c.bm - 3, zeros=True, row_zeros=True, bias=True),
        replace(one, m=2 * c.bm + 1, tokens=False, k=K - 24, dtype="float16"),
    ]
    return Case(
        name=f"{_name(c)} {N}x{K}",
        excess=partial(_largest, runs),
        kernels=6 if c.split > 1 else 3,
    )


def _experts(c: Config) -> Case:
    one = Int8Product(m=ENDS[-1], n=N, k=K, config=_arguments(c), ends=ENDS)
    runs = [one, replace(one, zeros=True, row_zeros=True, groups=2, k=K // 2)]
    return Case(name=f"experts {_name(c)}", excess=partial(_largest, runs), kernels=2)


def _groups(c: Config) -> Case:
    one = Int8Product(m=c.bm + 1, n=N, k=K // 2, groups=2, config=_arguments(c))
    runs = [one, replace(one, zeros=True, row_zeros=True)]
    return Case(name=f"groups {_name(c)}", excess=partial(_largest, runs), kernels=2)


def _arguments(c: Config) -> tuple:
    return c.kind, c.bm, c.bn, c.bk, c.split, c.warps, c.stages


def _name(c: Config) -> str:
    tile = f"{c.bm}x{c.bn}x{c.bk}"
    return f"{c.kind} {tile} split {c.split} warps {c.warps} stages {c.stages}"


def _largest(runs: list[Int8Product], device: torch.device) -> float:
    return max(excess(one, device) for one in runs)


# ---------------------------------------------------------------- products to time
def timed(p: Problem, device: torch.device, seed: int) -> Callable[[Config], Tensor]:
    """config -> y of a random linear [n, k], for activations that are codes already."""
    one = Int8Product(m=p.m, n=p.n, k=p.k, config=(), zeros=p.zeros, dtype=p.dtype, seed=seed)
    rows, weight, _ = operands(one, device)
    return partial(int8_int8, rows, weight, None, getattr(torch, p.dtype))
