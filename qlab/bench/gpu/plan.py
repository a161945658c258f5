"""Which steps prove and time a GPU, in order of value, and the seconds that each should take.

Seconds come from a cost model: kernels that are compiled, on all workers at once; products at their
modelled time, repeated as the harnesses repeat them; and constants for what cannot be modelled,
estimates until a device has run them. A step that does not fit into what is left is skipped, and a
smaller one behind it may still run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from qlab.bench.gpu.device import REPS
from qlab.bench.gpu.rivals import RIVALS
from qlab.bench.rows import FORMS

if TYPE_CHECKING:
    from qlab_kernels.acceptance import Case, Form
    from qlab_kernels.capability import Capability
    from qlab_kernels.config import Config, Problem

SHAPES = ((8192, 8192), (4096, 4096), (4096, 14336))  # (n, k)
GOAL_SHAPE, MORE_SHAPE = SHAPES[:2]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GOAL_TOKENS = (1, 2, 4, 8, 16, 64)
OTHER_TOKENS = tuple(m for m in TOKENS if m not in GOAL_TOKENS)
GOAL_FAMILY = "int4"
# of the table of kernels, by weights and inputs
ROWS = (
    *FORMS,
    ("int4-g128", "int8-channel"),
    ("int4-g128", "fp8-channel"),
    ("mxfp8", None),
    ("nvfp4", None),
)
ROW_SHAPE, ROW_TOKENS = (4096, 4096), (1, 16, 256)
GOAL_RIVALS = ("qlab", "library")
TITLES = {GOAL_RIVALS: "goals", RIVALS: "all"}
ENGINES = ("bf16 eager", "bf16 compiled", "qlab compiled")
PROMPT, NEW = 512, 128
CHUNK = 24  # cases of one step: what a full step's place may be given to
KEEP = 6  # candidates that the cost model leaves for the clock
TIMED_SECONDS = 0.3  # at most, for one median

# Estimates, in seconds.
START = 25.0  # a worker: imports, a context, the first launch; all start at once
READ = 0.5  # nvidia-smi and a step's files
COMPILE = 3.0  # one kernel on one core
CHECK = 0.7  # a case beside its compilation: operands, launches, the reference in float64
PREPARE = 2.0  # copies of a weight and their packing, and the check of a product
HARNESS = 8.0
PROFILE = 1.5  # a profile of one product
ROW = 4.0  # weights of one form on the host, by every kernel that takes them
QUANTIZE = 25.0  # the demo model rounded, on the host
ENGINE = {"bf16 eager": 12.0, "bf16 compiled": 60.0, "qlab compiled": 70.0}
FLUSH = 250.0  # microseconds to clear the cache before a timed call


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call on a device, whose result is written when it exists. key: unique in its step."""

    key: str
    job: str
    arguments: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """Calls that are planned together.

    ahead: compilations, on all workers, before the calls; their results are of no interest.
    spread: whether the calls go to all workers, which only what is not timed may.
    """

    name: str
    calls: tuple[Call, ...]
    ahead: tuple[Call, ...] = ()
    spread: bool = False


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a plan depends on. workers: processes that compile and check at once."""

    name: str
    capability: Capability
    workers: int


@dataclass
class _Compiled:
    """The kernels that steps so far have compiled: a split or another size is no other kernel."""

    seen: set[tuple[Any, ...]] = field(default_factory=set)

    def new(self, p: Problem, c: Config) -> bool:
        tile = (p.op, p.dtype, p.group, p.zeros, c.bm, c.bn, c.bk, c.warps, c.stages, c.scale_on)
        fresh = c.kind not in ("dequant", "library") and tile not in self.seen
        self.seen.add(tile)
        return fresh


def seconds(step: Step, workers: int, done: Sequence[str] = ()) -> float:
    """What is left of a step should take; 0 where all of it is done."""
    left = [call.seconds for call in step.calls if call.key not in done]
    if not left:
        return 0.0
    batches = math.ceil(len(step.ahead) / workers)
    longest = max((call.seconds for call in step.ahead), default=0.0)
    working = max(sum(left) / workers, max(left)) if step.spread else sum(left)
    return READ + batches * longest + working


def fitting(
    steps: Sequence[Step], workers: int, budget: float, done: Callable[[Step], Sequence[str]]
) -> tuple[list[Step], list[Step]]:
    """(steps that fit into `budget` seconds in their order, steps that do not). The start of the
    workers is paid first."""
    fit: list[Step] = []
    skipped: list[Step] = []
    left = budget - START
    for step in steps:
        needed = seconds(step, workers, done(step))
        (fit if needed <= left else skipped).append(step)
        left -= needed if needed <= left else 0.0
    return fit, skipped


@cache
def steps(facts: Facts) -> tuple[Step, ...]:
    """All steps, the most valuable first: harnesses; assembly bit for bit; the kernels of the
    products that have goals, and these tuned and timed; the kernels of other families; every other
    shape and number of tokens; other precisions; generation; the products of other families tuned;
    other configurations."""
    from qlab_kernels.acceptance import FAMILIES, forms

    compiled = _Compiled()
    others = [family for family in FAMILIES if family != GOAL_FAMILY]
    families = GOAL_FAMILY, *others
    main, *more = [form for family in families for form in forms(family, facts.capability)]
    return (
        Step(name="harness", calls=(_call("harness", "harness", HARNESS),)),
        *_checks(facts, FAMILIES, "assembly", lambda case: case.assembly),
        *_checks(facts, (GOAL_FAMILY,), "kernels", _runs_untuned),
        _tuning(facts, main, GOAL_SHAPE, GOAL_TOKENS, compiled),
        _products(facts, main, GOAL_SHAPE, GOAL_TOKENS, GOAL_RIVALS),
        *_checks(facts, others, "kernels", _runs_untuned),
        *_other_products(facts, main, compiled),
        *(_row(weights, inputs) for weights, inputs in ROWS),
        _generation(),
        *(_tuning(facts, form, MORE_SHAPE, GOAL_TOKENS, compiled) for form in more),
        *_checks(facts, FAMILIES, "other configurations", lambda case: case.tuned),
    )


def _call(key: str, job: str, expected: float, **arguments: Any) -> Call:
    return Call(key=key, job=job, arguments=arguments, seconds=expected)


# ---------------------------------------------------------------- bits
def _runs_untuned(case: Case) -> bool:
    return not case.assembly and not case.tuned


def _checks(
    facts: Facts, families: Iterable[str], title: str, chosen: Callable[[Case], bool]
) -> Iterator[Step]:
    """The chosen cases of the families, in steps of CHUNK."""
    from qlab_kernels.acceptance import cases

    for family in families:
        calls = [
            _call(
                case.name,
                "check",
                case.kernels * COMPILE + CHECK,
                family=family,
                name=case.name,
            )
            for case in cases(family, facts.capability)
            if chosen(case)
        ]
        chunks = [tuple(calls[i : i + CHUNK]) for i in range(0, len(calls), CHUNK)]
        for number, chunk in enumerate(chunks, 1):
            yield Step(name=f"bits {family} {title} {number}", calls=chunk, spread=True)


# ---------------------------------------------------------------- tuning and products
def _problem(facts: Facts, form: Form, shape: tuple[int, int], m: int) -> Problem:
    from qlab_kernels.config import Problem

    place = (form.op, facts.capability, facts.name)
    return Problem(*place, form.dtype, form.group, form.zeros, *shape, m)


def _tuning(
    facts: Facts,
    form: Form,
    shape: tuple[int, int],
    tokens: Sequence[int],
    compiled: _Compiled,
) -> Step:
    from qlab_kernels.cost import library, prune

    problems = [_problem(facts, form, shape, m) for m in tokens]
    calls, ahead = [], []
    for p in problems:
        configs = prune(p, KEEP)
        repeated = sum(3 * (library(p) + FLUSH) for _ in configs) + 140 * (library(p) + FLUSH)
        expected = PREPARE + 1e-6 * repeated
        arguments = {"op": p.op, "dtype": p.dtype, "group": p.group, "zeros": p.zeros}
        place = {**arguments, "n": p.n, "k": p.k, "m": p.m}
        calls.append(_call(f"{p.m} tokens", "tune", expected, **place, keep=KEEP))
        ahead += [
            _call(f"{p.m} tokens {c}", "warm", COMPILE, **place, config=vars(c))
            for c in configs
            if compiled.new(p, c)
        ]
    size = f"{shape[0]}x{shape[1]}"
    scales = "rows" if form.group >= shape[1] else f"g{form.group}"
    name = f"tune {form.op} {form.dtype} {scales} {size} {tokens[0]} to {tokens[-1]}"
    return Step(name=name, calls=tuple(calls), ahead=tuple(ahead))


def _products(
    facts: Facts,
    form: Form,
    shape: tuple[int, int],
    tokens: Sequence[int],
    rivals: tuple[str, ...],
) -> Step:
    """Products of such weights; those of the goals also under the profiler."""
    from qlab_kernels.cost import library

    n, k = shape
    title = TITLES.get(rivals, "rivals")
    profiled = rivals == GOAL_RIVALS
    repeated = sum(2 * REPS * (library(_problem(facts, form, shape, m)) + FLUSH) for m in tokens)
    expected = PREPARE + 1e-6 * repeated + (PROFILE * len(tokens) if profiled else 0.0)
    arguments = {
        "n": n,
        "k": k,
        "dtype": form.dtype,
        "tokens": list(tokens),
        "seconds": TIMED_SECONDS,
        "profiled": profiled,
    }
    calls = [_call(rival, "product", expected, rival=rival, **arguments) for rival in rivals]
    name = f"products {n}x{k} {tokens[0]} to {tokens[-1]}, {title}"
    return Step(name=name, calls=tuple(calls))


def _other_products(facts: Facts, form: Form, compiled: _Compiled) -> Iterator[Step]:
    """The rivals at the goals, then every shape at every number of tokens, tuned before."""
    others = tuple(name for name in RIVALS if name not in GOAL_RIVALS)
    yield _products(facts, form, GOAL_SHAPE, GOAL_TOKENS, others)
    for shape in SHAPES:
        tokens = OTHER_TOKENS if shape == GOAL_SHAPE else TOKENS
        yield _tuning(facts, form, shape, tokens, compiled)
        yield _products(facts, form, shape, tokens, RIVALS)


# ---------------------------------------------------------------- rows and generation
def _row(weights: str, inputs: str | None) -> Step:
    n, k = ROW_SHAPE
    call = _call(
        "times",
        "row",
        ROW,
        weights=weights,
        inputs=inputs,
        n=n,
        k=k,
        tokens=list(ROW_TOKENS),
        seconds=TIMED_SECONDS,
    )
    return Step(name=f"row {weights} x {inputs or 'bfloat16'}", calls=(call,))


def _generation() -> Step:
    expected = QUANTIZE + sum(ENGINE[name] for name in ENGINES)
    call = _call("rates", "generate", expected, engines=list(ENGINES), prompt=PROMPT, new=NEW)
    return Step(name="generate", calls=(call,))
