"""How long a run will take on this machine: work counted from shapes, divided by rates that short
probes measure.

    seconds = products / rate + fp32 / rate of fp32 + elements / rate of elements + calls * time of
    a call + bytes / rate of bytes

Products are those of forward passes in the dtype of calibration; statistics and solvers multiply in
fp32; elements are weights times the passes that rounding and grid searches make over them; calls
are small operations, such as those on one column. What a stage does per weight [o, k] is WORK,
fitted to measured runs of one block; a stage of another name counts as UNKNOWN.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from qlab.algebra.graph import Code, Site, by_source
from qlab.algebra.products import product_dtype
from qlab.algebra.transform import Stage
from qlab.algebra.views import WholeBlock
from qlab.algebra.windows import LOOKS
from qlab.data.calibration import Data
from qlab.driver.batches import BATCH_TOKENS
from qlab.driver.foreseen import Measured, passes_of
from qlab.driver.job import Job
from qlab.driver.sites import Sites
from qlab.files.digests import hasher

# Of the estimate, in processor time of one thread on the demo: rtn took 1.4, hqq 1.2, gptq on 4,096
# tokens 0.6.
SPREAD = (0.5, 2.0)
TRACING = 1.0  # seconds to trace one structure of block
# statistics that are a product of k^2 for every token; a held-out one, of every fourth, is not
# counted
SQUARED = ("second_moment", "drift", "drift_fitted")
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
    ("auto_round", True): Effort(elements=2.7, rows=0.0, square=0.07, columns=1.7),
    ("qat", True): Effort(elements=2.7, rows=0.0, square=0.07, columns=1.7),
    ("solver", True): Effort(elements=73.0, rows=7.0, square=1.2, columns=30.0),
    ("guidedquant", False): Effort(elements=73.0, rows=7.0, square=4.8, columns=60.0),
    ("aim_held_out", True): Effort(elements=0.0, rows=2.4, square=2.0, columns=2.0),
    ("aim_in_stream", True): Effort(elements=0.0, rows=2.4, square=2.0, columns=2.0),
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


def work_of(job: Job, sites: Sites, dtype: torch.dtype, passes: int, measured: Measured) -> Work:
    """The work of a job. dtype: of the activations. passes: over the calibration samples. measured:
    what its binds will run."""
    windows = 0 if job.data is None else job.data.count // job.data.longest
    passes += passes_of_learning(job) + passes_of(measured, windows)
    costs = list(_costs(job, sites, passes))
    return Work(
        products=sum(cost.products for cost in costs),
        float32=sum(cost.float32 for cost in costs),
        elements=sum(cost.elements for cost in costs),
        calls=sum(cost.calls for cost in costs),
        bytes=PASSES_OVER_FILES * sum(tensor.nbytes for tensor in job.model.stored.values()),
        programs=len({id(code) for code in sites.codes.values()}),
        dtype=dtype,
    )


def passes_of_learning(job: Job) -> int:
    """The passes over all windows that stages which learn take as much time as: a pass backward
    counts twice, and the loss over all windows is looked at on the way."""
    if job.observed is None:
        return 0
    views = [stage.view for stage in job.recipe]
    learning = [view for view in views if isinstance(view, WholeBlock) and view.windows]
    tokens = 3 * sum(view.windows for view in learning) * job.observed.longest
    return math.ceil(tokens / job.observed.count) + (LOOKS + 2) * len(learning)


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """What one part of a run computes, in the units of `Work`."""

    products: float = 0.0
    float32: float = 0.0
    elements: float = 0.0
    calls: float = 0.0


def _costs(job: Job, sites: Sites, passes: int) -> Iterator[_Cost]:
    """The parts of a run, block by block."""
    for path, code in sites.codes.items():
        if job.observed is not None and code.sites:
            hidden = sites.shapes[f"{path}.{code.sites[0].path}"][-1]
            yield _cost_of_passes(job.observed, code, hidden, passes)
        for sharing in by_source(code.sites).values():
            shapes = {site: sites.shapes[f"{path}.{site.path}"] for site in sharing}
            if job.observed is not None:
                yield _cost_of_source(job, job.observed, shapes, passes)
            for stage in job.recipe:
                touched = [
                    shape
                    for site, shape in shapes.items()
                    if stage.touches(f"{path}.{site.path}", site)
                ]
                if touched:
                    yield _cost_of_stage(stage, touched)


def _cost_of_passes(data: Data, code: Code, hidden: int, passes: int) -> _Cost:
    """Running a block without its linears: the scores and values of its attention, half of which
    are masked, and a call for each node of its program."""
    batches = math.ceil(data.count / BATCH_TOKENS)
    return _Cost(
        products=passes * data.count * data.longest * hidden,
        calls=passes * batches * len(code.graph.nodes),
    )


def _cost_of_source(job: Job, data: Data, shapes: Mapping[Site, torch.Size], passes: int) -> _Cost:
    """The products of linears [..., o, k] that share an input, and the statistics of that."""
    first = next(iter(shapes))
    *experts, _, k = shapes[first]
    count = experts[0] if experts else 1
    visits = 1  # of experts, by one token
    if experts:
        visits = count if job.calibrate_all_experts else first.choices
    rows = data.count * visits
    weights_of_row = sum(shape.numel() / count for shape in shapes.values())
    squared = [name for name in job.statistics if name in SQUARED]
    return _Cost(products=passes * rows * weights_of_row, float32=len(squared) * rows * k**2)


def _cost_of_stage(stage: Stage, shapes: Sequence[torch.Size]) -> _Cost:
    """One stage on weights [..., o, k] that share an input."""
    effort = effort_of(stage)
    *experts, _, k = shapes[0]
    count = experts[0] if experts else 1
    size = sum(shape.numel() for shape in shapes)
    return _Cost(
        elements=effort.elements * size,
        float32=effort.rows * size * k + effort.square * count * k**3,
        calls=effort.columns * count * k * len(shapes),
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
    hashed = hasher()
    hashed.update(block)
    hashed.digest()


def said(seconds: float) -> str:
    """Seconds in words, to two figures."""
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{float(f'{seconds / unit:.2g}'):g} {name}"
    return f"{float(f'{seconds:.2g}'):g} s"
