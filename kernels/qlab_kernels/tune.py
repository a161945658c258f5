"""Tuning: the cost model prunes, successive halving times what is left, the winner goes into the
cache.

    3 repetitions of each kept candidate -> 10 of the best 4 -> 50 of the best 2

It ends early at the time budget, within 3 % of the floor, or when ten repetitions did not change
the leader. `measure` is handed in and is the only thing that touches a device.
"""

import fcntl
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch

from qlab_kernels import cache
from qlab_kernels.config import Config, Problem, moved
from qlab_kernels.cost import prune
from qlab_kernels.entries import CacheError, Entry, file_name, versions

Measure = Callable[[Config, int], float]  # (config, repetitions) -> median microseconds
ROUNDS = ((3, 4), (10, 2), (50, 1))  # (repetitions, how many go on)
NEAR_FLOOR = 1.03
# A leader that was first before and is this much faster needs ten repetitions only.
CLEAR_LEAD = 1.05
POLL = 0.1  # seconds between two attempts at another process's lock


@dataclass(frozen=True)
class Timing:
    """What tuning learnt of one candidate: microseconds at the most repetitions it got, or why it
    could not run."""

    config: Config
    us: float
    reps: int
    failure: str = ""


def tune(
    p: Problem,
    measure: Measure,
    budget_s: float,
    *,
    floor_us: float = 0.0,
    retune: bool = False,
    keep: int = 16,
    wait_s: float = 600.0,
    clock: Callable[[], float] = time.monotonic,
    said: Callable[[Timing], object] = lambda _: None,
) -> Entry:
    """The fastest configuration for `p`, from the user's cache if it was measured before, else
    timed now and stored.

    budget_s: seconds for this problem; what is best by then wins, and two candidates are always
    timed. floor_us: a time that nothing beats. retune: time again what was measured. keep:
    candidates that the cost model leaves. said: is told of every timing. m counts as its bucket, so
    `measure` must time p.bucket tokens. Only one process of a machine tunes an operator at a time;
    others wait up to wait_s and use what it found.

    Raises:
        CacheError: when the result could not be kept, while torch.compile traces or a CUDA graph
        records, when another process
            does not finish, or when no candidate runs.
    """
    _refuse_inside_capture()
    p = replace(p, m=p.bucket)
    known = None if retune else cache.fresh(p)
    if known:
        return known
    cache.require_writable()
    with _only_tuner(cache.folder() / file_name(p.op, p.cc), wait_s):
        known = None if retune else cache.fresh(p)
        if known:  # the process that had the lock has timed it
            return known
        timings = halve(prune(p, keep), measure, clock() + budget_s, floor_us, clock, said)
        best = min(timings, key=lambda t: (math.isinf(t.us), -t.reps, t.us))
        if math.isinf(best.us):
            raise CacheError(
                f"none of {len(timings)} candidates ran for n={p.n}, k={p.k}, m={p.m}: "
                f"{best.failure}"
            )
        gbps, today = round(moved(p) / best.us * 1e-3, 1), date.today().isoformat()
        entry = Entry(
            best.config,
            round(best.us, 3),
            gbps,
            len(timings),
            p.device,
            *versions(),
            "measured",
            today,
        )
        cache.store(p, entry)
    return entry


def halve(
    configs: list[Config],
    measure: Measure,
    until: float,
    floor_us: float,
    clock: Callable[[], float],
    said: Callable[[Timing], object],
) -> list[Timing]:
    """Successive halving. Returns the last timing of every candidate that was timed; the winner has
    the most repetitions of them."""
    last: dict[Config, Timing] = {}
    field = configs
    for reps, survivors in ROUNDS:
        leader = field[0]
        for config in field:
            if len(last) > 1 and clock() >= until:  # one alone would win whatever it takes
                return list(last.values())
            timing = last[config] = _time(config, reps, measure)
            said(timing)
            if timing.us <= floor_us * NEAR_FLOOR:
                return [t for t in last.values() if t is not timing] + [
                    replace(timing, reps=ROUNDS[-1][0])
                ]
        field = sorted((c for c in field if math.isfinite(last[c].us)), key=lambda c: last[c].us)[
            :survivors
        ]
        settled = (
            reps > ROUNDS[0][0]
            and len(field) > 1
            and field[0] == leader
            and last[field[1]].us > CLEAR_LEAD * last[leader].us
        )
        if not field or settled:
            break
    return list(last.values())


def _time(config: Config, reps: int, measure: Measure) -> Timing:
    """A candidate that cannot be compiled or launched loses; an interrupt or a broken device ends
    the tuning."""
    try:
        us = float(measure(config, reps))
    except Exception as error:  # compilers fail in many ways
        if isinstance(error, getattr(torch, "AcceleratorError", ())):
            raise
        return Timing(
            config,
            math.inf,
            reps,
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        )
    return Timing(config, us if us > 0 else math.inf, reps, "" if us > 0 else f"a time of {us}")


def _refuse_inside_capture() -> None:
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or capturing:
        raise CacheError(
            "nothing can be tuned while torch.compile traces or a CUDA graph records: tune "
            "before, with `qlab tune`"
        )


@contextmanager
def _only_tuner(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the tuning lock of an operator; the kernel drops it when its holder dies."""
    name = path.with_name(f".{path.name}.tuning")
    with open(name, "a") as sidecar:
        started = time.monotonic()
        while True:
            try:
                fcntl.flock(sidecar, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - started > wait_s:
                    raise CacheError(
                        f"another process has been tuning for {wait_s:.0f} s (it holds {name}): "
                        "wait for it; until then lookups give the nearest or the heuristic "
                        "configuration"
                    ) from None
                time.sleep(POLL)
        yield
