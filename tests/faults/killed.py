"""kill -9 at any moment of a run, after which it goes on to the same bytes."""

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from killing import KILLED, finish, start
from model_folders import contents

import qlab
from faults import Case, Trial
from faults.events import WRITING, each_event, killing
from faults.runs import Run, quantizing, quietly


def killed_once(run: Run, out: Path, draw: random.Random, **options: bool) -> bool:
    """Start a run and kill it, at an event or at an instant of its usual time; whether it was
    killed before its end."""
    seconds, events = run.noted
    write = partial(run.write, out, **options)
    if draw.random() < 0.5:
        n = draw.randint(1, events)

        def dying() -> None:
            each_event(out.parent, WRITING, killing(n))
            write()

        return finish(start(quietly(dying))) == KILLED
    pid = start(quietly(write))
    time.sleep(draw.uniform(0, seconds))
    os.kill(pid, signal.SIGKILL)
    return finish(pid) == KILLED


def refuse_half(run: Run, out: Path) -> None:
    """Nothing that is opened as a model is less than the whole."""
    for folder in (out, out.with_name(out.name + ".partial")):
        try:
            qlab.open(folder)
        except qlab.QlabError:
            continue
        there = {name for name in contents(folder) if not name.startswith(".work")}
        missing = run.expected.keys() - there - {"qlab.json"}
        assert not missing, f"{folder.name} opens and lacks {sorted(missing)}"


def same_bytes(run: Run, out: Path) -> None:
    """The output is what an untroubled run writes, and nothing lies beside it."""
    there, expected = contents(out), run.expected
    others = [name for name in expected | there if there.get(name) != expected.get(name)]
    assert not others, f"{run.name}: {sorted(others)} are not what an untroubled run writes"
    beside = sorted(path.name for path in out.parent.iterdir() if path != out)
    assert not beside, f"{run.name}: {beside} are left beside the output"


def trial(runs: Sequence[Run], draw: random.Random, folder: Path) -> str:
    """One run of these, killed up to three times in a row, and resumed."""
    run, out = draw.choice(runs), folder / "out"
    times = int(killed_once(run, out, draw))
    refuse_half(run, out)
    while times and times < 3 and draw.random() < 0.3:
        times += killed_once(run, out, draw, resume=True)
        refuse_half(run, out)
    assert finish(start(quietly(partial(run.write, out, resume=True)))) == 0, (
        f"{run.name}: no resume"
    )
    same_bytes(run, out)
    return f"resumed after kill {times}, the same bytes" if times else "ended before the kill"


def case(name: str, runs: Callable[[Path], list[Run]]) -> Case:
    """Kills of these runs."""

    def make(folder: Path) -> Trial:
        return partial(trial, runs(folder))

    return Case(name=name, make=make)


CASES = (case("kill -9 of quantize", quantizing),)
