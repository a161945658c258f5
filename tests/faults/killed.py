"""kill -9 at any moment of a run, after which it goes on to the same bytes."""

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from killing import KILLED, finish, start

from faults import Case, Trial
from faults.events import WRITING, each_event, killing
from faults.runs import Run, converting, model_free, quantizing, quietly
from faults.sound import refuse_half, resumed


def killed_once(run: Run, out: Path, draw: random.Random, **options: bool) -> bool:
    """Start a run and kill it, at an event or at an instant of its usual time; whether it was
    killed before its end."""
    seconds, events = run.noted()
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


def trial(runs: Sequence[Run], draw: random.Random, folder: Path) -> str:
    """One run of these, killed up to three times in a row, and resumed."""
    run = draw.choice(runs)
    out = folder / run.output
    times = int(killed_once(run, out, draw))
    refuse_half(run, out)
    while 0 < times < 3 and draw.random() < 0.3:
        times += killed_once(run, out, draw, resume=True)
        refuse_half(run, out)
    resumed(run, out)
    return f"resumed to the same bytes after kill {times}" if times else "ended before the kill"


def case(name: str, runs: Callable[[Path], list[Run]], bounded: int) -> Case:
    """Kills of these runs."""

    def make(folder: Path) -> Trial:
        return partial(trial, runs(folder))

    return Case(name=name, make=make, bounded=bounded)


CASES = (
    case("kill -9 of quantize", quantizing, bounded=1),
    case("kill -9 of model-free", model_free, bounded=3),
    case("kill -9 of convert", converting, bounded=1),
)
