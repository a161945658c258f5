"""What a worker does on its device: one function for each kind of call, of values that JSON
holds."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlab.bench.contenders import LIBRARY, OURS, Case, Unavailable
from qlab.bench.gpu.device import REPS, Bench, readings
from qlab.bench.gpu.rivals import products_of, timed
from qlab.errors import QlabError, first_line
from qlab.lowering.tuning.timing import copies

COPIED = 2**30  # bytes of the plain copy
CUPTI_SECONDS = 1.0


class Wrong(QlabError):
    """A kernel computes something else than its reference."""


def harness(bench: Bench) -> dict[str, Any]:
    """An empty kernel and a plain copy in every harness, in microseconds, and the copy's GB/s."""
    size = COPIED if bench.device.type == "cuda" else 2**20
    source = torch.ones(size // 4, dtype=torch.float32, device=bench.device)
    target = torch.empty_like(source)
    small = source[: 2**20 // 4], target[: 2**20 // 4]
    calls: dict[str, Callable[[], Any]] = {
        "empty kernel": bench.empty,
        "copy of 1 MB": partial(small[1].copy_, small[0]),
        "copy": partial(target.copy_, source),
    }
    times = {name: _times(bench, [call], 1.0, True) for name, call in calls.items()}
    gbps = 2e-3 * size / times["copy"]["events_us"]
    return {"times": times, "copied_bytes": size, "copy_gbps": gbps}


def _times(
    bench: Bench, calls: Sequence[Callable[[], Any]], seconds: float, profiled: bool
) -> dict[str, Any]:
    """Microseconds in every harness."""
    return {
        "events_us": bench.events(calls, REPS, seconds),
        "graph_us": bench.graph(calls, seconds),
        "cupti_us": bench.cupti(calls, CUPTI_SECONDS) if profiled else None,
    }


def check(bench: Bench, family: str, name: str) -> dict[str, float]:
    """One case of a family of kernels. Wrong where it is not what the reference computes."""
    from qlab_kernels.acceptance import check as excess_of

    excess = excess_of(family, name, bench.capability, bench.device)
    if not excess <= 1:
        raise Wrong(f"{excess:.3g} times what rounding explains")
    return {"excess": excess}


# ---------------------------------------------------------------- tuning
def warm(bench: Bench, config: Mapping[str, Any], **place: Any) -> None:
    """Compile a configuration by one product: Triton keeps it on the disk for every process."""
    from qlab_kernels.acceptance import timed as product_of
    from qlab_kernels.config import Config

    product_of(_problem(bench, **place), bench.device, 0)(Config(**config))


def tune(bench: Bench, keep: int, **place: Any) -> dict[str, Any]:
    """The fastest of the `keep` configurations that the cost model leaves, kept in the config cache
    and exported beside it."""
    from qlab_kernels import cache, transfer
    from qlab_kernels.acceptance import timed as product_of
    from qlab_kernels.config import moved
    from qlab_kernels.tune import Timing
    from qlab_kernels.tune import tune as tuned

    p = _problem(bench, **place)
    products = [product_of(p, bench.device, seed) for seed in range(copies(moved(p), bench.device))]
    timings: list[Timing] = []

    def measure(config: Any, reps: int) -> float:
        calls = [partial(product, config) for product in products]
        return bench.events(calls, reps, float("inf"))

    entry = tuned(p, measure, float("inf"), keep=keep, said=timings.append)
    transfer.export(exported(cache.folder()))
    failures = [f"{t.config}: {t.failure}" for t in timings if t.failure]
    return {**entry.json(), "timings": len(timings), "failures": failures}


def exported(folder: Path) -> Path:
    """The file beside a folder of configurations that holds all of them."""
    return folder.with_name(folder.name + ".json")


def _problem(bench: Bench, **place: Any) -> Any:
    from qlab_kernels.config import Problem

    return Problem(cc=bench.capability, device=bench.name, **place)


# ---------------------------------------------------------------- times
@torch.no_grad()
def product(
    bench: Bench,
    *,
    rival: str,
    n: int,
    k: int,
    dtype: str,
    tokens: Sequence[int],
    seconds: float,
    profiled: bool,
) -> dict[str, Any]:
    """Times of one contender's product for numbers of tokens, or why it is absent. Where it stops
    at some number, `error` says so beside the times before."""
    case = Case(n=n, k=k, dtype=dtype, group=128, zeros=False, device=bench.device)
    result: dict[str, Any] = {"rival": rival, "n": n, "k": k, "rows": []}
    try:
        products = products_of(rival, case)
    except Unavailable as why:
        # the two that the goals compare are never absent: they fail
        return {**result, "error" if rival in (OURS, LIBRARY) else "absent": str(why)}
    for m in tokens:
        x = torch.randn(m, k, device=bench.device, dtype=case.torch_dtype)
        try:
            calls = [timed(one, x) for one in products]
            times = _times(bench, calls, seconds, profiled)
        except Exception as error:
            if isinstance(error, getattr(torch, "AcceleratorError", ())):
                raise
            said = f"at {m} tokens: {type(error).__name__}: {first_line(error)}"
            return {**result, "error": said}
        result["rows"].append({"m": m, **times})
    return result


def row(
    bench: Bench,
    *,
    weights: str,
    inputs: str | None,
    n: int,
    k: int,
    tokens: Sequence[int],
    seconds: float,
) -> dict[str, Any]:
    """One weight by every row of the table of kernels that takes it."""
    from qlab.bench.rows import measure

    where = str(bench.device)
    return measure([(weights, inputs)], [(n, k)], tokens, where, seconds, lambda _: None)


def generate(bench: Bench, engines: Sequence[str], prompt: int, new: int) -> dict[str, Any]:
    """Prefill and decode of the demo model in int4, beside itself in bfloat16."""
    from qlab.bench.generate import measure
    from qlab.bench.gpu.model import quantized_demo

    with quantized_demo() as (folder, described):
        record = measure(folder, engines, prompt=prompt, new=new, device=bench.device.type)
    return {**record, "model": described}


def clocks(bench: Bench) -> dict[str, Any]:
    """What nvidia-smi reads of the device now."""
    return {"name": bench.name, "capability": list(bench.capability), "readings": readings()}


JOBS: dict[str, Callable[..., Any]] = {
    "harness": harness,
    "check": check,
    "warm": warm,
    "tune": tune,
    "product": product,
    "row": row,
    "generate": generate,
    "clocks": clocks,
}
