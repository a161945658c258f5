"""The shipped tables as the cost model fills them: for every capability, what should be fastest on common shapes.

They stand in until somebody measures, and say so (`source: modelled`). Every distinct kernel variant among them has to be compiled to
be checked, so for each kind of weights only a few are used: chosen greedily to lose least against the model's best everywhere.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from qlab_kernels.capability import TARGETS, Capability
from qlab_kernels.config import BUCKETS, Config, Problem
from qlab_kernels.cost import DEVICES, rank, true_bytes
from qlab_kernels.entries import MODEL, Entry, Key, Table, capability_name, file_name, key_of, replace_file

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 28672), (16384, 16384))  # n, k
KINDS = (("bfloat16", 128, False), ("bfloat16", 128, True), ("bfloat16", 64, False), ("bfloat16", 32, False),
         ("float16", 128, False), ("float16", 128, True), ("float16", 64, False), ("float16", 32, False))  # fmt: skip
MAIN = (128, False)  # group and zeros of which everything is listed
FEW = ((SHAPES[0], SHAPES[3]), (1, 4, 16, 32, 64, 128, 256, 1024, 4096))  # of the others: `nearest` reaches the rest from these
VARIANTS = 5  # of a kind: 8 kinds x 7 capabilities stay below 250
GAIN = 0.005  # a variant that lowers the mean modelled time by less is not worth its compilation


def problems(cc: Capability) -> list[list[Problem]]:
    """What is shipped for a capability, one list for each kind of weights."""
    dtypes, name = [str(dtype).removeprefix("torch.") for dtype in TARGETS[cc].dtypes], DEVICES[cc][0].name

    def listed(dtype: str, group: int, zeros: bool) -> list[Problem]:
        shapes, tokens = (SHAPES, BUCKETS) if (group, zeros) == MAIN else FEW
        return [Problem("int4_mm", cc, name, dtype, group, zeros, n, k, m) for n, k in shapes for m in tokens]

    return [listed(*kind) for kind in KINDS if kind[0] in dtypes]


def compiled(c: Config) -> Config | None:
    """What of a config decides its machine code; None for those that have none of ours."""
    return None if c.kind == "dequant" else replace(c, kind="gemm" if c.kind == "split_k" else c.kind, split=min(c.split, 2))


def choose(ranked: Sequence[Sequence[tuple[float, Config]]], most: int) -> list[tuple[float, Config]]:
    """For each problem's (microseconds, config), fastest first: the best config among at most `most` compiled variants."""
    allowed: list[Config | None] = [None]  # a dequantization needs none; where no fused kernel is legal there is nothing else

    def best(row: Sequence[tuple[float, Config]], variants: Sequence[Config | None]) -> tuple[float, Config]:
        return next((pair for pair in row if compiled(pair[1]) in variants), row[-1])

    def loss(variants: Sequence[Config | None]) -> float:
        return sum(best(row, variants)[0] / row[0][0] for row in ranked) / len(ranked)

    wanted = list(dict.fromkeys(v for row in ranked for _, c in row if (v := compiled(c))))
    for _ in range(min(most, len(wanted))):
        least = min(wanted, key=lambda v: loss([*allowed, v]))
        if loss(allowed) - loss([*allowed, least]) < GAIN:
            break
        allowed.append(least)
    return [best(row, allowed) for row in ranked]


def table(cc: Capability) -> Table:
    """The shipped table of a capability."""
    entries: dict[Key, Entry] = {}
    today, name, version = date.today().isoformat(), DEVICES[cc][0].name, torch.__version__.split("+")[0]
    for kind in problems(cc):
        for p, (us, config) in zip(kind, choose([rank(p) for p in kind], VARIANTS)):
            gbps = round(true_bytes(p) / us * 1e-3)
            entries[key_of(p, MODEL)] = Entry(config, round(us, 1), gbps, 0, name, None, version, "modelled", today)
    shared = {"device": name, "triton": None, "torch": version, "source": "modelled", "date": today, "trials": 0}
    return Table({"op": "int4_mm", "capability": capability_name(cc), **shared}, entries)


def write(folder: Path, capabilities: Iterable[Capability] = tuple(TARGETS)) -> list[Path]:
    """Write the tables of `capabilities` into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for cc in capabilities:
        path = folder / file_name("int4_mm", cc)
        replace_file(path, table(cc).json())
        paths.append(path)
    return paths
