"""kill -9 of the processes that `qlab work` shares a run among: those that go on, and those that
begin later, make the bytes of one process."""

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from killing import KILLED, finish, start
from model_folders import prose

import qlab.cli
from faults import Case, Trial
from faults.events import WRITING, each_event, killing
from faults.runs import model_in, quietly, there
from qlab.cli.working import work
from qlab.files.place import WORK

AT_ONCE = 3  # processes at most
CALIBRATED = ("--inputs", "reference", "--samples", "4", "--length", "16")
RUNS = {
    "data-free": ("--method", "rtn"),
    "of stored statistics": ("--method", "gptq", *CALIBRATED),
    "from files": ("--model-free",),
}


def command(folder: Path, words: Sequence[str], out: Path) -> None:
    """`qlab quantize` with these words, in a process of its own."""

    def run() -> None:
        data = ("--calib", str(folder / "text.txt")) if "--samples" in words else ()
        model = str(folder / "model")
        sys.argv = ["qlab", "quantize", model, "--spec", "int4-g16", "--out", str(out), *data]
        sys.argv += words
        try:
            qlab.cli.main()
        except SystemExit as end:
            os._exit(int(end.code or 0))

    code = finish(start(quietly(run)))
    assert code == 0, f"qlab quantize {' '.join(words)} ended with {code}"


def killed(jobs: Path, shards: Sequence[tuple[int, int]], draw: random.Random) -> int:
    """Processes that work at once, each of which is killed at a moment, or not; how many were."""
    seconds = draw.uniform(0, 2)
    pids = [start(quietly(partial(dying, jobs, shard, draw.randint(1, 200)))) for shard in shards]
    time.sleep(seconds)
    os.kill(draw.choice(pids), signal.SIGKILL)
    ended = [finish(pid) for pid in pids]
    assert set(ended) <= {0, KILLED}, f"work ended with {ended}"
    return ended.count(KILLED)


def dying(jobs: Path, shard: tuple[int, int], n: int) -> None:
    """The work of a shard, killed at its n-th event where it has so many."""
    each_event(jobs.parent, WRITING, killing(n))
    work(jobs, shard=shard)


def trial(
    folder: Path, expected: dict[str, dict[str, bytes]], draw: random.Random, place: Path
) -> str:
    """A run that is shared by processes that are killed, up to three times, and one that is not."""
    name = draw.choice([*RUNS])
    jobs, out = place / "jobs", place / "out"
    command(folder, (*RUNS[name], "--jobs", str(jobs)), out)
    count = 0
    for _ in range(draw.randint(1, 3)):
        of = draw.randint(1, AT_ONCE)
        shards = [(draw.randint(1, of), of) for _ in range(of)]
        count += killed(jobs, shards, draw)
        here = {file: data for file, data in there(out).items() if not file.startswith(WORK)}
        assert not out.exists() or here == expected[name], f"{name}: half a run is in place"
    ended = finish(start(quietly(lambda: work(jobs))))
    assert ended == 0, f"{name}: work behind {count} kills ended with {ended}"
    here = there(out)
    names = here.keys() | expected[name].keys()
    others = sorted(file for file in names if here.get(file) != expected[name].get(file))
    assert not others, f"{name}: {others} are not what one process writes"
    beside = sorted(path.name for path in place.iterdir() if path not in (jobs, out))
    assert not beside, f"{name}: {beside} are left beside the output"
    return f"the same bytes after kill {count}"


def make(folder: Path) -> Trial:
    """A model, and what one process makes of it by each run."""
    folder = folder / "work"
    model_in(folder)
    (folder / "text.txt").write_text(prose(4096))
    for name, words in RUNS.items():
        command(folder, words, folder / "alone" / name)
    return partial(trial, folder, {name: there(folder / "alone" / name) for name in RUNS})


# tests/cli/test_working.py kills a few.
CASES = (Case(name="kill -9 of work", make=make, bounded=0),)
