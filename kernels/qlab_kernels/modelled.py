"""The shipped tables as the cost model fills them: for every capability, what should be fastest on
common shapes.

They stand in until somebody measures, and say so (`source: modelled`). Every distinct kernel
variant among them has to be compiled to be checked, so for each kind of weights only a few are
used: chosen greedily to lose least against the model's best everywhere, among those that pass the
static gates.
"""

import multiprocessing
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import cache, partial
from pathlib import Path

import torch

from qlab_kernels.cache import shipped_tables
from qlab_kernels.capability import TARGETS, Capability, Target
from qlab_kernels.config import BUCKETS, GROUPED_BUCKETS, Config, Problem
from qlab_kernels.cost import DEVICES, rank, true_bytes
from qlab_kernels.entries import (
    MODEL,
    CacheError,
    Entry,
    Key,
    Table,
    capability_name,
    file_name,
    key_of,
    read,
    replace_file,
)
from qlab_kernels.static import Variant, compile_variant, faults, variant

# (n, k) of the weights
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 28672), (16384, 16384))
KINDS = (
    ("bfloat16", 128, False),
    ("bfloat16", 128, True),
    ("bfloat16", 64, False),
    ("bfloat16", 32, False),
    ("float16", 128, False),
    ("float16", 128, True),
    ("float16", 64, False),
    ("float16", 32, False),
)
MAIN = (128, False)  # group and zeros of which everything is listed
# Shapes and token counts of the other tables: `nearest` reaches the rest from these.
FEW = ((SHAPES[0], SHAPES[3]), (1, 4, 16, 32, 64, 128, 256, 1024, 4096))
# experts, n, k: the two products of Mixtral-8x7B, Qwen3-30B-A3B and DeepSeek-V3
EXPERT_SHAPES = (
    (8, 28672, 4096),
    (8, 4096, 14336),
    (128, 1536, 2048),
    (128, 2048, 768),
    (256, 4096, 7168),
    (256, 7168, 2048),
)
VARIANTS = 5  # of a kind: 8 kinds x 7 capabilities stay below 250
GAIN = 0.005  # a variant that lowers the mean modelled time by less is not worth its compilation


def operators(row: Target) -> tuple[str, ...]:
    """What there is a table for: without the fused kernel, experts are multiplied one by one."""
    return ("int4_mm", "int4_grouped_mm") if row.path == "fused" else ("int4_mm",)


def problems(op: str, cc: Capability) -> list[list[Problem]]:
    """What is shipped of an operator for a capability, one list for each kind of weights."""
    dtypes = [str(dtype).removeprefix("torch.") for dtype in TARGETS[cc].dtypes]
    name = DEVICES[cc][0].name

    def listed(dtype: str, group: int, zeros: bool) -> list[Problem]:
        if op == "int4_grouped_mm":
            return [
                Problem(op, cc, name, dtype, group, zeros, n, k, m, e)
                for e, n, k in EXPERT_SHAPES
                for m in GROUPED_BUCKETS
            ]
        shapes, tokens = (SHAPES, BUCKETS) if (group, zeros) == MAIN else FEW
        return [
            Problem(op, cc, name, dtype, group, zeros, n, k, m) for n, k in shapes for m in tokens
        ]

    kinds = [kind for kind in KINDS if op == "int4_mm" or kind[1:] == MAIN]
    return [listed(*kind) for kind in kinds if kind[0] in dtypes]


# One problem's (microseconds, config, what it compiles), fastest first.
Ranked = Sequence[tuple[float, Config, Variant | None]]


def choose(rows: Sequence[Ranked], most: int) -> list[tuple[float, Config]]:
    """For each row the best (microseconds, config) among at most `most` compiled variants, which
    all rows share."""

    def best(row: Ranked, allowed: Sequence[Variant | None]) -> tuple[float, Config]:
        return next(((us, c) for us, c, v in row if v in allowed), row[-1][:2])

    def loss(allowed: Sequence[Variant | None]) -> float:
        return sum(best(row, allowed)[0] / row[0][0] for row in rows) / len(rows)

    allowed: list[Variant | None] = [None]  # a dequantization compiles nothing of its shape
    menu = list(dict.fromkeys(v for row in rows for *_, v in row if v))
    for _ in range(min(most, len(menu))):
        least = min(menu, key=lambda v: loss([*allowed, v]))
        if loss(allowed) - loss([*allowed, least]) < GAIN:
            break
        allowed.append(least)
    return [best(row, allowed) for row in rows]


def chosen(
    op: str, cc: Capability, refused: Container[Variant] = ()
) -> list[tuple[Problem, float, Config]]:
    """(problem, modelled microseconds, config) for all that is shipped of an operator, without the
    `refused` variants."""
    triples = []
    for kind, ranked in _ranked(op, cc):
        rows = [[pair for pair in row if pair[2] not in refused] for row in ranked]
        triples += [(p, *pair) for p, pair in zip(kind, choose(rows, VARIANTS))]
    return triples


@cache
def _ranked(op: str, cc: Capability) -> list[tuple[list[Problem], list[Ranked]]]:
    return [
        (kind, [[(us, c, variant(p, c)) for us, c in rank(p)] for p in kind])
        for kind in problems(op, cc)
    ]


def variants(op: str, cc: Capability, refused: Container[Variant] = ()) -> set[Variant]:
    """The distinct compilations among `chosen`."""
    compilations = (variant(p, c) for p, _, c in chosen(op, cc, refused))
    return {v for v in compilations if v is not None}


def refusals(v: Variant) -> list[str]:
    """Compile a variant and hold it against the gates; what it fails, in words."""
    try:
        return faults(v, compile_variant(v))
    except Exception as error:  # a compiler that fails is one more reason
        return [f"{type(error).__name__}: {error}"]


def table(
    op: str, cc: Capability, gate: Callable[[Iterable[Variant]], Iterable[list[str]]]
) -> Table:
    """The shipped table of an operator for a capability: only variants that pass `gate`, a map of
    `refusals` over variants."""
    seen: set[Variant] = set()
    refused: set[Variant] = set()
    while True:
        new = sorted(variants(op, cc, refused) - seen, key=repr)
        if not new:
            break
        seen |= set(new)
        refused |= {v for v, wrong in zip(new, gate(new)) if wrong}
    today, name = date.today().isoformat(), DEVICES[cc][0].name
    version = torch.__version__.split("+")[0]
    entries: dict[Key, Entry] = {}
    for p, us, config in chosen(op, cc, refused):
        gbps = round(true_bytes(p) / us * 1e-3)
        entries[key_of(p, MODEL)] = Entry(
            config, round(us, 1), gbps, 0, name, None, version, "modelled", today
        )
    shared = {
        "device": name,
        "triton": None,
        "torch": version,
        "source": "modelled",
        "date": today,
        "trials": 0,
    }
    return Table({"op": op, "capability": capability_name(cc), **shared}, entries)


def problem_of(op: str, cc: Capability, key: Key) -> Problem:
    """A problem that has this key."""
    group = key.k if key.group == "row" else int(key.group[1:])
    return Problem(
        op, cc, key.device, key.dtype, group, key.zeros, key.n, key.k, key.m, key.experts
    )


def shipped() -> list[tuple[Problem, Entry]]:
    """Every entry of the files that this package ships."""
    capabilities = {capability_name(cc): cc for cc in TARGETS}
    return [
        (problem_of(table.meta["op"], capabilities[table.meta["capability"]], key), entry)
        for table in shipped_tables().values()
        for key, entry in table.entries.items()
    ]


def shipped_variants() -> set[Variant]:
    """The distinct compilations that the shipped files need."""
    compilations = (variant(p, entry.config) for p, entry in shipped())
    return {v for v in compilations if v is not None}


def _refuse_foreign(path: Path) -> None:
    try:
        read(path)
    except (ValueError, OSError) as error:
        raise CacheError(
            f"{path} exists and is no table of configurations ({error}): choose another folder"
        ) from error


def write(folder: Path, workers: int = 1) -> list[Path]:
    """Write all tables into `folder`, every variant in them compiled and checked; returns their
    paths. Replaces tables alone."""
    for op, cc in ((op, cc) for cc, row in TARGETS.items() for op in operators(row)):
        _refuse_foreign(folder / file_name(op, cc))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for op, cc in ((op, cc) for cc, row in TARGETS.items() for op in operators(row)):
            path = folder / file_name(op, cc)
            replace_file(path, table(op, cc, partial(pool.map, refusals)).json())
            paths.append(path)
    return paths
