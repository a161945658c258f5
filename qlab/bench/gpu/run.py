"""One acceptance: the steps that fit, in order of value, each outcome written when it exists."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qlab.bench.gpu.crew import Heard
from qlab.bench.gpu.device import readings
from qlab.bench.gpu.outcome import Outcome, failure
from qlab.bench.gpu.plan import START, Call, Facts, Step, fitting, seconds
from qlab.bench.gpu.record import Record, refuse_foreign
from qlab.bench.gpu.verdict import goals
from qlab.errors import QlabError

SLACK = 4.0  # how many times its expected seconds a step may take
GRACE = 20.0  # seconds beyond what is left that the last step may take


class Workers(Protocol):
    """What an acceptance needs of a crew."""

    def start(self, limit: float) -> Outcome:
        """All workers; what the device is."""

    def run(self, calls: Sequence[Call], limit: float, heard: Heard, spread: bool) -> None:
        """All calls; `heard` is told of each."""

    def close(self) -> None:
        """End all workers."""


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """A run's result. failed: step, call and error of what went wrong; skipped: steps that did not
    fit."""

    failed: list[tuple[str, str, str]]
    skipped: list[str]
    goals: list[dict[str, Any]]
    record: dict[str, Any]


def refuse_minutes(minutes: float) -> None:
    """Refuse a time in which nothing can be measured."""
    if not minutes > 0:
        raise QlabError(f"--minutes {minutes:g} leaves no time to measure; give more than 0")


def accept(
    out: Path,
    minutes: float,
    facts: Facts,
    steps: Sequence[Step],
    crew: Workers,
    *,
    clock: Callable[[], float] = time.monotonic,
    said: Callable[[str], object] = lambda _: None,
) -> Acceptance:
    """Run what fits of `steps` and is not in `out` yet.

    A step that fails is written with its error, and the next one runs. Results stand in `out`
    whatever happens; a later call with the same `out` runs what is missing.

    Raises:
        QlabError: for a time in which no step fits, and a folder of something else.
    """
    refuse_minutes(minutes)
    refuse_foreign(out)
    until = clock() + 60 * minutes
    fit, _ = fitting(steps, facts.workers, 60 * minutes, lambda _: ())
    if not fit:
        least = START + min(seconds(step, facts.workers) for step in steps)
        raise QlabError(
            f"no step fits into {minutes:g} minutes: the smallest needs {least:.0f} s with the "
            "start of its processes; give more --minutes"
        )
    record = Record(out, facts)
    try:
        device = _started(steps, record, crew, said)
        skipped = []
        for step in steps:
            done = record.done(step)
            needed, left = seconds(step, facts.workers, done), until - clock()
            if not needed:
                said(f"{step.name}: done before")
            elif needed > left:
                said(f"{step.name}: skipped, {needed:.0f} s do not fit into {max(left, 0):.0f} s")
                skipped.append(step.name)
            else:
                _run(step, done, record, crew, (needed, min(SLACK * needed, left) + GRACE), said)
                _finish(record, steps, device, skipped, minutes)
        return _finish(record, steps, device, skipped, minutes)
    finally:
        crew.close()
        record.close()


def _started(
    steps: Sequence[Step], record: Record, crew: Workers, said: Callable[[str], object]
) -> dict[str, Any]:
    """What the device is, as the workers say; nothing is started where nothing is left to do."""
    if all(not seconds(step, 1, record.done(step)) for step in steps):
        return {}
    outcome = crew.start(SLACK * START)
    if "error" in outcome:
        raise QlabError(f"no worker gets the device: {outcome['error']}")
    device: dict[str, Any] = outcome["result"]
    said(f"{device['name']}: its processes are ready")
    return device


def _run(
    step: Step,
    done: Sequence[str],
    record: Record,
    crew: Workers,
    times: tuple[float, float],
    said: Callable[[str], object],
) -> None:
    """The calls of a step that are not done, behind their compilations. times: seconds expected,
    and at most."""
    expected, limit = times
    about = {"expected_seconds": round(expected, 1), "readings": readings()}

    def heard(call: Call, outcome: Outcome) -> None:
        record.put(step, call.key, outcome, **about)
        error = failure(outcome)
        if error:
            said(f"{step.name}, {call.key}: {error}")

    said(f"{step.name}: about {expected:.0f} s")
    if step.ahead:
        # What does not compile fails again, and is written, where it is timed.
        crew.run(step.ahead, limit, lambda call, outcome: None, spread=True)
    left = [call for call in step.calls if call.key not in done]
    crew.run(left, limit, heard, spread=step.spread)


def _finish(
    record: Record,
    steps: Sequence[Step],
    device: Mapping[str, Any],
    skipped: Sequence[str],
    minutes: float,
) -> Acceptance:
    """Everything that is known, against the goals, written as one file."""
    outcomes = {step.name: record.outcomes(step) for step in steps}
    failed = [
        (name, key, error)
        for name, calls in outcomes.items()
        for key, error in ((key, failure(outcome)) for key, outcome in calls.items())
        if error
    ]
    table = goals(steps, outcomes)
    value = {
        "minutes": minutes,
        "device": dict(device),
        "steps": outcomes,
        "skipped": list(skipped),
        "failed": [list(row) for row in failed],
        "goals": table,
    }
    record.finish(value)
    return Acceptance(failed=failed, skipped=list(skipped), goals=table, record=value)
