"""How long a run will take on this machine: work counted from shapes, divided by rates that short
probes measure.

    seconds = products / rate + fp32 / rate of fp32 + elements / rate of elements + calls * time of
    a call + bytes / rate of bytes

Products are those of forward passes in the dtype of calibration; statistics and solvers multiply in
fp32; elements are weights times the passes that rounding and grid searches make over them; calls
are small operations, such as those on one column. What a stage does per weight [o, k] is WORK,
fitted to measured runs of one block; a stage of another name counts as UNKNOWN.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch

from qlab.algebra.graph import Code, by_source
from qlab.algebra.products import product_dtype
from qlab.algebra.transform import Stage, Transform
from qlab.data.calibration import Data
from qlab.driver.batches import BATCH_TOKENS

# Of the estimate, in processor time of one thread on the demo: rtn took 1.4, hqq 1.2, gptq on 4,096
# tokens 0.6.
SPREAD = (0.5, 2.0)
TRACING = 1.0  # seconds to trace one structure of block
SQUARED = ("second_moment", "drift")  # statistics that are a product of k^2 for every token
PASSES_OVER_FILES = 3  # weights are hashed, read, and certified


@dataclass(frozen=True)
class Effort:
    """Of one stage on one weight [o, k]: passes over its elements, fp32 products of o k^2 and (per
    input) of k^3, calls per column."""

    elements: float
    rows: float
    square: float
    columns: float


# Stage, and whether it observes -> effort: fitted to all methods on blocks of hidden sizes 256 to
# 1024 within 0.7 to 1.3 of what was measured, in processor time of one thread.
WORK: Mapping[tuple[str, bool], Effort] = {
    ("rtn", False): Effort(elements=2.7, rows=0.0, square=0.07, columns=1.7),
    ("rtn", True): Effort(elements=73.0, rows=0.76, square=0.03, columns=7.4),
    ("hqq", False): Effort(elements=980.0, rows=0.0, square=0.0, columns=7.6),
    ("awq_scale", True): Effort(elements=0.0, rows=0.88, square=0.0, columns=37.0),
    ("gptq", True): Effort(elements=0.0, rows=3.4, square=0.0, columns=20.0),
    ("aim_at_reference", True): Effort(elements=0.0, rows=0.3, square=0.5, columns=1.2),
}
UNKNOWN = Effort(
    elements=100.0, rows=1.0, square=0.5, columns=10.0
)  # a stage of one's own that rounds
NOTHING = Effort(elements=0.0, rows=0.0, square=0.0, columns=0.0)


def effort_of(stage: Stage) -> Effort:
    """What the stage does per weight."""
    return WORK.get((stage.name, bool(stage.needs)), UNKNOWN if stage.spec else NOTHING)


@dataclass(frozen=True, kw_only=True)
class Work:
    """products, float32: multiply-adds. elements, calls, bytes: see above. programs: structures of
    blocks, which are traced. dtype: of the products."""

    products: float
    float32: float
    elements: float
    calls: float
    bytes: float
    programs: int
    dtype: torch.dtype

    def seconds(self) -> float:
        """On the processor of this machine, where nothing else runs on it."""
        return (
            TRACING * self.programs
            + self.products / product_rate(self.dtype)
            + self.float32 / product_rate(torch.float32)
            + self.elements / element_rate()
            + self.calls * call_seconds()
            + self.bytes / byte_rate()
        )


def work_of(
    codes: Mapping[str, Code],
    shapes: Mapping[str, torch.Size],
    data: Data | None,
    recipe: Transform,
    passes: int,
    calibrate_all_experts: bool,
    dtype: torch.dtype,
    stored: int,
) -> Work:
    """The work of a recipe. data: None where nothing is observed. passes: over the data. stored:
    bytes of the model's files."""
    products = float32 = elements = calls = 0.0
    observed = [need for stage in recipe for need in stage.needs if need in SQUARED]
    for path, code in codes.items():
        if data is not None and code.sites:
            hidden = shapes[f"{path}.{code.sites[0].path}"][-1]
            products += (
                passes * data.count * data.longest * hidden
            )  # attention's scores and values, half of which are masked
            calls += passes * math.ceil(data.count / BATCH_TOKENS) * len(code.graph.nodes)
        for sites in by_source(code.sites).values():
            weights = {site: shapes[f"{path}.{site.path}"] for site in sites}
            *experts, _, k = weights[sites[0]]
            count = experts[0] if experts else 1
            if data is not None:
                visits = (
                    1 if not experts else count if calibrate_all_experts else sites[0].choices
                )  # of a token
                rows = data.count * visits
                products += passes * rows * sum(shape.numel() / count for shape in weights.values())
                float32 += len(set(observed)) * rows * k**2
            for stage in recipe:
                touched = [
                    shape
                    for site, shape in weights.items()
                    if stage.touches(f"{path}.{site.path}", site)
                ]
                effort, size = effort_of(stage), sum(map(torch.Size.numel, touched))
                elements += effort.elements * size
                float32 += effort.rows * size * k + (effort.square * count * k**3 if touched else 0)
                calls += effort.columns * count * k * len(touched)
    return Work(
        products=products,
        float32=float32,
        elements=elements,
        calls=calls,
        bytes=PASSES_OVER_FILES * stored,
        programs=len({id(code) for code in codes.values()}),
        dtype=dtype,
    )


def _fastest(run: Callable[[], object], times: int = 3) -> float:
    run()
    took = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        took.append(time.perf_counter() - started)
    return max(min(took), 1e-7)


@cache
def product_rate(dtype: torch.dtype) -> float:
    """Multiply-adds a second of products of many rows, as calibration makes them."""
    x = torch.ones(512, 512, dtype=dtype)
    wide = product_dtype(x)
    return x.numel() * len(x) / _fastest(lambda: (x.to(wide) @ x.to(wide).mT).to(dtype))


@cache
def element_rate() -> float:
    """Elements a second that are scaled, rounded and clamped in fp32."""
    x = torch.ones(512, 512, dtype=torch.float32)
    return x.numel() / _fastest(lambda: (x * 1.5).round_().clamp_(-8, 7))


@cache
def call_seconds() -> float:
    """Of one small operation."""
    x = torch.ones(64, dtype=torch.float32)
    return _fastest(lambda: [x.add(1.0) for _ in range(200)]) / 200


@cache
def byte_rate() -> float:
    """Bytes a second that are hashed, which takes longer than reading them again."""
    block = bytes(1 << 22)
    return len(block) / _fastest(partial(_hash, block))


def _hash(block: bytes) -> None:
    hashlib.sha256(block).digest()


def said(seconds: float) -> str:
    """Seconds in words, to two figures."""
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{float(f'{seconds / unit:.2g}'):g} {name}"
    return f"{float(f'{seconds:.2g}'):g} s"
