"""One int4 product for every shape and number of tokens: qlab beside everything else that
multiplies the same weight here.

    GB/s          bytes that the product must move (its own weights once, x, y) over its time
    % of floor    max(those bytes / measured copy bandwidth, 2 m n k / measured matmul rate) over
                  its time
    ratio         a baseline's time over qlab's: above 1, qlab is faster

Times are medians on a cold cache; on a GPU also inside a CUDA graph.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich import box
from rich.table import Table

from qlab.algebra.products import product_dtype
from qlab.bench.contenders import (
    BESIDE_DENSE,
    CONTENDERS,
    DENSE,
    LIBRARY,
    OURS,
    Case,
    Unavailable,
    prepare,
)
from qlab.errors import QlabError
from qlab.files.record import versions
from qlab.lowering.model import device_named
from qlab.lowering.tuning.timing import (
    copy_rate,
    device_label,
    graph_microseconds,
    last_cache,
    matmul_rate,
    microseconds,
)
from qlab.lowering.tuning.tune import Form, Shape, check, random_weight, tune_shapes
from qlab.lowering.weights import cpu

SHAPES = "4096x4096,4096x14336,14336x4096,8192x8192,8192x28672,16384x16384"
SHAPES_CPU = "4096x4096"
TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096"
REPS = 50


def compare_matmuls(
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    *,
    dtype: str = "bfloat16",
    group: int = 128,
    zeros: bool = False,
    device: torch.device | str = "cpu",
    names: Sequence[str] = tuple(CONTENDERS),
    tune: bool = False,
    budget: float = 10.0,
    seconds: float = 1.0,
    said: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Time every contender of `names` for every shape and number of tokens; the record says what
    could not take part, and why.

    seconds: at most for one median. tune: measure the configurations first, `budget` seconds each,
    and keep them.
    """
    check(shapes, tokens, dtype, group)
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise QlabError(f"contender {unknown[0]!r} is unknown; known are {', '.join(CONTENDERS)}")
    where = device_named(device)
    if tune:
        tune_shapes(
            shapes, tokens, Form(group, zeros), dtype=dtype, device=where, budget=budget, said=said
        )
    cases = [Case(n, k, dtype, group, zeros, where) for n, k in shapes]
    rates = {
        "copy_gbps": copy_rate(where),
        "matmul_tflops": max(matmul_rate(where, d) for d in _arithmetics(cases[0])),
    }
    said(
        f"{device_label(where)}: copies {rates['copy_gbps']:.0f} GB/s, multiplies "
        f"{rates['matmul_tflops']:.2f} TFLOP/s"
    )
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    with torch.no_grad():
        for case in cases:
            for name in names:
                found: list[dict[str, Any]] = []
                try:
                    for row in _measure(name, case, tokens, rates, seconds):
                        found.append(row)
                except Unavailable as why:
                    absent[name] = str(why)
                if found:
                    said(
                        f"{case.n}x{case.k} {name}: "
                        + ", ".join(f"{row['us']:.1f}" for row in found)
                        + " us"
                    )
                rows += found
                gc.collect()
    _add_ratios(rows)
    return {
        "shapes": [list(shape) for shape in shapes],
        "tokens": list(tokens),
        "dtype": dtype,
        "group": group,
        "zeros": zeros,
        "rows": rows,
        "absent": absent,
        "rates": rates,
        "losses": losses(rows),
        "versions": _versions(),
        "device": {
            "type": where.type,
            "name": device_label(where),
            "threads": torch.get_num_threads(),
            "last_cache": last_cache(where),
        },
        "measured": {
            "statistic": "median",
            "repetitions": REPS,
            "seconds": seconds,
            "cache": "cold: rotated copies of the weight"
            + (", a cleared buffer" if where.type == "cuda" else ""),
        },
    }


def _arithmetics(case: Case) -> set[torch.dtype]:
    """The dtypes that a product of many tokens may be computed in there."""
    return {
        case.torch_dtype,
        product_dtype(torch.empty(4096, 1, dtype=case.torch_dtype, device=case.device)),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = versions()
    for package in ("triton", "gemlite", "torchao"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _measure(
    name: str, case: Case, tokens: Sequence[int], rates: Mapping[str, float], seconds: float
) -> Iterator[dict[str, Any]]:
    products = prepare(name, case)
    for m in tokens:
        x = torch.randn(m, case.k, device=case.device, dtype=case.torch_dtype)
        calls = [partial(product, x) for product in products]
        how = _how(case, m, name == BESIDE_DENSE) if name in (OURS, BESIDE_DENSE) else {}
        dense = name == LIBRARY or (
            name == BESIDE_DENSE and how["config"]["kind"] in ("dense", "dequant")
        )
        try:
            us = microseconds(calls, REPS, case.device, seconds)
        except Exception as error:
            # a contender that stops at some number of tokens takes nobody's figures with it
            raise Unavailable(
                f"failed at {m} tokens of {case.n}x{case.k}: {type(error).__name__}: "
                f"{str(error)[:200]}"
            ) from error
        moved = (case.dense_bytes if dense else case.int4_bytes) + 2.0 * m * (case.n + case.k)
        operations = 2.0 * m * case.n * case.k
        floor = max(moved / rates["copy_gbps"] * 1e-3, operations / rates["matmul_tflops"] * 1e-6)
        yield {
            "contender": name,
            "n": case.n,
            "k": case.k,
            "m": m,
            "us": us,
            "graph_us": _in_graph(calls, case.device, seconds),
            "gbps": moved / us * 1e-3,
            "tflops": operations / us * 1e-6,
            "floor_us": floor,
            "percent_of_floor": 100 * floor / us,
            **how,
        }


def _in_graph(
    calls: Sequence[Callable[[], Any]], device: torch.device, seconds: float
) -> float | None:
    """Not every library can be captured; what cannot has no such figure."""
    try:
        return graph_microseconds(calls, device, seconds)
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None


def _how(case: Case, m: int, dense_copy: bool) -> dict[str, Any]:
    """The configuration that ran, and where it came from."""
    from qlab_kernels import cache
    from qlab_kernels.config import Config, Problem

    held = random_weight(1, case.k, case.group, case.zeros, torch.device("cpu")).planes(
        case.device
    )  # of one row: how a row is cut
    if case.device.type == "cuda":
        cc = torch.cuda.get_device_capability(case.device)
        found = cache.lookup(
            Problem(
                "int4_mm",
                cc,
                device_label(case.device),
                case.dtype,
                held.group,
                case.zeros,
                case.n,
                case.k,
                m,
            )
        )
        return {"config": asdict(found.config), "source": found.source, "stale": found.stale}
    product = (
        m,
        case.torch_dtype,
        dense_copy,
        -(-case.n // cpu.ROWS) * cpu.ROWS,
        held.q.shape[1],
        held.group,
        case.zeros,
    )
    found, kind = cache.lookup(cpu.problem(*product)), cpu.kind(*product)
    return {"config": asdict(Config(kind)), "source": found.source, "stale": found.stale}


def _add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Give qlab's rows `ratio`: every other contender's time over qlab's."""
    for row in rows:
        if row["contender"] == OURS:
            row["ratio"] = {
                o["contender"]: o["us"] / row["us"]
                for o in rows
                if o is not row and _place(o) == _place(row)
            }


def _place(row: Mapping[str, Any]) -> tuple[int, int, int]:
    return row["n"], row["k"], row["m"]


def losses(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where qlab's int4 is slower than the library's dense matmul, and by how much: {n, k, m,
    times} with times > 1."""
    return [
        {"n": row["n"], "k": row["k"], "m": row["m"], "times": 1 / row["ratio"][LIBRARY]}
        for row in rows
        if row.get("ratio", {}).get(LIBRARY, 1.0) < 1.0
    ]


def verdict(record: Mapping[str, Any]) -> list[str]:
    """In sentences: where int4 loses to the library's dense matmul, where it loses to another int4,
    who could not take part."""
    library = f"the library's {record['dtype']} matmul"
    ours = [row for row in record["rows"] if "ratio" in row]
    said = []
    for n, k in record["shapes"]:
        here = [row for row in ours if (row["n"], row["k"]) == (n, k) and LIBRARY in row["ratio"]]
        lost = [
            f"{1 / row['ratio'][LIBRARY]:.2f} times its time at {row['m']}"
            for row in here
            if row["ratio"][LIBRARY] < 1
        ]
        if lost:
            said.append(
                f"{n}x{k}: int4 loses to {library} at {len(lost)} of {len(here)} numbers of "
                f"tokens: {', '.join(lost)}"
            )
        elif here:
            said.append(f"{n}x{k}: int4 is nowhere slower than {library}")
    for row in ours:
        faster = {
            name: ratio for name, ratio in row["ratio"].items() if ratio < 1 and name not in DENSE
        }
        if faster:
            best = min(faster, key=faster.__getitem__)
            said.append(
                f"{row['n']}x{row['k']} at {row['m']}: {best} is faster, qlab takes "
                f"{1 / faster[best]:.2f} times its time"
            )
    return said + [f"{name} {why}" for name, why in record["absent"].items()]


def table(record: Mapping[str, Any]) -> Table:
    """One line for each shape and number of tokens: qlab's figures, then every baseline's time and
    its ratio to qlab's."""
    others = list(
        dict.fromkeys(row["contender"] for row in record["rows"] if row["contender"] != OURS)
    )
    rates = record["rates"]
    drawn = Table(
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title=(
            f"{record['device']['name']}: {record['dtype']} x int4, groups of "
            f"{record['group']}{', zeros' if record['zeros'] else ''}; copies "
            f"{rates['copy_gbps']:.0f} GB/s, multiplies {rates['matmul_tflops']:.2f} TFLOP/s"
        ),
    )
    for name in ("n x k", "m", "how", "us", "graph us", "GB/s", "TFLOP/s", "% of floor", *others):
        drawn.add_column(
            name, justify="left" if name in ("n x k", "how") else "right", overflow="fold"
        )
    by_place = {(row["contender"], *_place(row)): row for row in record["rows"]}
    for n, k in record["shapes"]:
        for m in record["tokens"]:
            baselines = [by_place.get((name, n, k, m)) for name in others]
            row = by_place.get((OURS, n, k, m))
            figures = _figures(row) if row else ["-"] * 6
            times = [
                f"{b['us']:.1f}" + (f" ({b['us'] / row['us']:.2f}x)" if row else "") if b else "-"
                for b in baselines
            ]
            drawn.add_row(f"{n}x{k}", str(m), *figures, *times)
    drawn.caption = (
        "us: median on a cold cache; a baseline's (x) is its time over qlab's: above 1, qlab is "
        "faster"
    )
    return drawn


def _figures(row: Mapping[str, Any]) -> list[str]:
    c = row["config"]
    tile = f" {c['bm']}x{c['bn']}x{c['bk']}" if c["bm"] else ""
    split = f"/{c['split']}" if c["split"] > 1 else ""
    how = f"{c['kind']}{tile}{split} ({row['source']}{', stale' if row['stale'] else ''})"
    graph = "-" if row["graph_us"] is None else f"{row['graph_us']:.1f}"
    return [
        how,
        f"{row['us']:.1f}",
        graph,
        f"{row['gbps']:.1f}",
        f"{row['tflops']:.3f}",
        f"{row['percent_of_floor']:.0f}",
    ]
