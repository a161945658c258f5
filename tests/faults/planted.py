"""Errors of the system at any moment: a full disk, one that fails, a mount or a quota that refuses,
a table of open files that is full."""

import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from killing import finish, start

from faults import Case, Trial
from faults.events import ERRORS, READING, WRITING, Act, each_event, failing
from faults.runs import Run, converting, model_free, quantizing, quietly
from faults.sound import refuse_half, resumed
from qlab.files.place import WORK, working

SENTENCE = re.compile(r"(QlabError|Unwritable|Unreadable): [^\n]{20,1200}")


def remembering(act: Act, out: Path, done: Path) -> Act:
    """`act`, before which the parts that are done are noted."""

    def noting(event: str) -> None:
        try:
            act(event)
        except OSError:
            done.write_text("\n".join(_done(out)))
            raise

    return noting


def _done(out: Path) -> list[str]:
    return sorted(path.name for path in (working(out) / WORK).glob("notes-*"))


def trial(runs: Sequence[Run], kinds: tuple[str, ...], draw: random.Random, folder: Path) -> str:
    """One run of these with an error at one moment, or from one on, and resumed without it."""
    run, code, lasting = draw.choice(runs), draw.choice(ERRORS), draw.random() < 0.5
    n = draw.randint(1, run.noted(kinds)[1])
    (folder / "here").mkdir()
    out, told, done = folder / "here" / run.output, folder / "told", folder / "done"

    def failing_run() -> None:
        act = remembering(failing(n, code, lasting), out, done)
        each_event(run.place(out, kinds), kinds, act)
        run.write(out)

    ended = finish(start(quietly(failing_run, told)))
    what = f"{run.name}, error {code} at {n}"
    assert ended == 0, f"{what}: ended with {ended}"
    said = told.read_text()
    assert not said or SENTENCE.fullmatch(said), f"{what}: {said}"
    refuse_half(run, out)
    lost = set(done.read_text().split("\n") if done.exists() else ()) - {"", *_done(out)}
    assert not said or not lost, f"{what}: {said}; what was done is gone: {sorted(lost)}"
    resumed(run, out)
    return "refused, then resumed to the same bytes" if said else "went on to the same bytes"


def case(name: str, runs: Callable[[Path], list[Run]], kinds: tuple[str, ...]) -> Case:
    """Errors of these events of these runs."""

    def make(folder: Path) -> Trial:
        return partial(trial, runs(folder), kinds)

    return Case(name=name, make=make, bounded=BOUNDED[runs])


KINDS = {"writing": WRITING, "reading": READING}
RUNS = {"quantize": quantizing, "model-free": model_free, "convert": converting}
BOUNDED = {quantizing: 0, model_free: 2, converting: 1}
CASES = tuple(
    case(f"an error of {doing} in {name}", runs, kinds)
    for doing, kinds in KINDS.items()
    for name, runs in RUNS.items()
)
