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

from qlab.algebra.products import product_dtype
from qlab.bench.contenders import (
    BESIDE_DENSE,
    CONTENDERS,
    LIBRARY,
    OURS,
    Case,
    Unavailable,
    prepare,
)
from qlab.errors import QlabError
from qlab.files.record import versions
from qlab.lowering.devices import device_label, device_named
from qlab.lowering.tuning.random_weight import random_weight
from qlab.lowering.tuning.shapes import Form, Shape, check
from qlab.lowering.tuning.timing import (
    copy_rate,
    graph_microseconds,
    last_cache,
    matmul_rate,
    microseconds,
)
from qlab.lowering.tuning.tune import tune_shapes
from qlab.lowering.weights import cpu
from qlab.lowering.weights.int4 import implementation
from qlab.lowering.weights.nibbles import planes_of

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
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise QlabError(f"contender {unknown[0]!r} is unknown; known are {', '.join(CONTENDERS)}")
    where = device_named(device)
    if tune:
        tune_shapes(
            shapes, tokens, Form(group, zeros), dtype=dtype, device=where, budget=budget, said=said
        )
    cases = [Case(n=n, k=k, dtype=dtype, group=group, zeros=zeros, device=where) for n, k in shapes]
    rates = _rates(cases[0])
    said(
        f"{device_label(where)}: copies {rates['copy_gbps']:.0f} GB/s, multiplies "
        f"{rates['matmul_tflops']:.2f} TFLOP/s"
    )
    rows, absent = _measure_all(cases, names, tokens, rates, seconds, said)
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
        "device": _device_record(where),
        "measured": _method_record(where, seconds),
    }


def _rates(case: Case) -> dict[str, float]:
    """The rates of the device: of copies, and of the library's dense product."""
    rates = [matmul_rate(case.device, dtype) for dtype in _arithmetics(case)]
    return {"copy_gbps": copy_rate(case.device), "matmul_tflops": max(rates)}


def _measure_all(
    cases: Sequence[Case],
    names: Sequence[str],
    tokens: Sequence[int],
    rates: Mapping[str, float],
    seconds: float,
    said: Callable[[str], object],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of all contenders, and why some do not take part in all of it."""
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    with torch.no_grad():
        for case in cases:
            for name in names:
                measured: list[dict[str, Any]] = []
                try:
                    for row in _measure(name, case, tokens, rates, seconds):
                        measured.append(row)
                except Unavailable as why:
                    absent[name] = str(why)
                if measured:
                    times = ", ".join(f"{row['us']:.1f}" for row in measured)
                    said(f"{case.n}x{case.k} {name}: {times} us")
                rows += measured
                gc.collect()
    _add_ratios(rows)
    return rows, absent


def _device_record(device: torch.device) -> dict[str, Any]:
    return {
        "type": device.type,
        "name": device_label(device),
        "threads": torch.get_num_threads(),
        "last_cache": last_cache(device),
    }


def _method_record(device: torch.device, seconds: float) -> dict[str, Any]:
    cleared = ", a cleared buffer" if device.type == "cuda" else ""
    return {
        "statistic": "median",
        "repetitions": REPS,
        "seconds": seconds,
        "cache": f"cold: rotated copies of the weight{cleared}",
    }


def _arithmetics(case: Case) -> set[torch.dtype]:
    """The dtypes that a product of many tokens may be computed in there."""
    return {
        case.torch_dtype,
        product_dtype(torch.empty(4096, 1, dtype=case.torch_dtype, device=case.device)),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    known = versions()
    for package in ("triton", "gemlite", "torchao"):
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = "not installed"
    return known


def _measure(
    name: str, case: Case, tokens: Sequence[int], rates: Mapping[str, float], seconds: float
) -> Iterator[dict[str, Any]]:
    """A contender's rows for one weight, one for each number of tokens."""
    products = prepare(name, case)
    for m in tokens:
        x = torch.randn(m, case.k, device=case.device, dtype=case.torch_dtype)
        calls = [partial(product, x) for product in products]
        how = _how(case, m, name == BESIDE_DENSE) if name in (OURS, BESIDE_DENSE) else {}
        try:
            us = microseconds(calls, REPS, case.device, seconds)
        except Exception as error:
            # a contender that stops at some number of tokens takes nobody's figures with it
            raise Unavailable(
                f"failed at {m} tokens of {case.n}x{case.k}: {type(error).__name__}: "
                f"{str(error)[:200]}"
            ) from error
        weight_bytes = case.dense_bytes if _is_dense(name, how) else case.int4_bytes
        bytes_moved = weight_bytes + 2.0 * m * (case.n + case.k)
        operations = 2.0 * m * case.n * case.k
        copying_us = bytes_moved / rates["copy_gbps"] * 1e-3
        multiplying_us = operations / rates["matmul_tflops"] * 1e-6
        floor_us = max(copying_us, multiplying_us)
        yield {
            "contender": name,
            "n": case.n,
            "k": case.k,
            "m": m,
            "us": us,
            "graph_us": _in_graph(calls, case.device, seconds),
            "gbps": bytes_moved / us * 1e-3,
            "tflops": operations / us * 1e-6,
            "floor_us": floor_us,
            "percent_of_floor": 100 * floor_us / us,
            **how,
        }


def _is_dense(name: str, how: Mapping[str, Any]) -> bool:
    """Whether a product reads the weight in 16 bits."""
    if name == BESIDE_DENSE:
        return how["config"]["kind"] in ("dense", "dequant")
    return name == LIBRARY


def _in_graph(
    calls: Sequence[Callable[[], Any]], device: torch.device, seconds: float
) -> float | None:
    """Microseconds inside a CUDA graph, or None where the library cannot be captured."""
    try:
        return graph_microseconds(calls, device, seconds)
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None


def _how(case: Case, m: int, dense_copy: bool) -> dict[str, Any]:
    """The configuration that ran, and where it came from."""
    from qlab_kernels import cache
    from qlab_kernels.config import Config, Problem

    one_row = random_weight(1, case.k, case.group, case.zeros, torch.device("cpu"))
    whole_rows = implementation(case.device).WHOLE_ROWS
    planes = planes_of("the weight", one_row, whole_rows=whole_rows)  # shows how a row is cut
    if case.device.type == "cuda":
        problem = Problem(
            op="int4_mm",
            cc=torch.cuda.get_device_capability(case.device),
            device=device_label(case.device),
            dtype=case.dtype,
            group=planes.group,
            zeros=case.zeros,
            n=case.n,
            k=case.k,
            m=m,
        )
        entry = cache.lookup(problem)
        return {"config": asdict(entry.config), "source": entry.source, "stale": entry.stale}
    n, k = -(-case.n // cpu.ROWS) * cpu.ROWS, planes.q.shape[1]
    product = (m, case.torch_dtype, dense_copy, n, k, planes.group, case.zeros)
    entry, kind = cache.lookup(cpu.problem(*product)), cpu.kind(*product)
    return {"config": asdict(Config(kind)), "source": entry.source, "stale": entry.stale}


def _add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Give qlab's rows `ratio`: every other contender's time over qlab's."""
    for row in rows:
        if row["contender"] == OURS:
            rivals = [other for other in rows if other is not row and place(other) == place(row)]
            row["ratio"] = {rival["contender"]: rival["us"] / row["us"] for rival in rivals}


def place(row: Mapping[str, Any]) -> tuple[int, int, int]:
    """The product that a row is about: n, k and m."""
    return row["n"], row["k"], row["m"]


def losses(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where qlab's int4 is slower than the library's dense matmul, and by how much: {n, k, m,
    times} with times > 1."""
    return [
        {"n": row["n"], "k": row["k"], "m": row["m"], "times": 1 / row["ratio"][LIBRARY]}
        for row in rows
        if row.get("ratio", {}).get(LIBRARY, 1.0) < 1.0
    ]
