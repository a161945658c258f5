"""What surrounds a run changes: the disk is full, the model is touched, the clock jumps, another
run comes, nobody may write."""

import ctypes
import os
import random
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from killing import finish, start

from faults import Case, Trial
from faults.events import READING, each_event
from faults.killed import killed_once
from faults.runs import Run, converting, model_free, quantizing, quietly, there
from faults.sound import refuse_half, resumed

SENTENCE = re.compile(r"(QlabError|Unwritable|Unreadable): [^\n]{20,1200}")
NOBODY = 65534  # the user id of nobody


def refusal(act: Callable[[], object], folder: Path) -> str:
    """What `act`, in a process of its own, refuses in one sentence; empty where it does its
    work."""
    told = folder / "told"
    code = finish(start(quietly(act, told)))
    assert code == 0, f"ended with {code}"
    said = told.read_text()
    told.unlink()
    assert not said or SENTENCE.fullmatch(said), said
    return said


# ------------------------------------------------------------------ a full disk
@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[str]:
    """A folder that holds so many bytes: a file system of its own where this process may mount one,
    else a limit on every file."""
    folder.mkdir()
    system = ctypes.CDLL(None, use_errno=True)
    arguments = [b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()]
    if system.mount(*arguments) == 0:
        try:
            yield "tmpfs"
        finally:
            system.umount2(os.fsencode(folder), 2)
    else:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, most))
        try:
            yield "RLIMIT_FSIZE"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def full(runs: Sequence[Run], draw: random.Random, folder: Path) -> str:
    """A run on a disk that is too small for it, which goes on when it is copied to another one."""
    run = draw.choice(runs)
    needs = sum(map(len, run.expected.values()))
    with small_disk(folder / "disk", max(4096, int(needs * draw.uniform(0, 1.5)))) as kind:
        out = folder / "disk" / run.output
        said = refusal(partial(run.write, out), folder)
        refuse_half(run, out)
        if not said:
            resumed(run, out)
            return f"fits ({kind})"
        # copying needs its own right to the file system, which is gone behind this block
        shutil.copytree(folder / "disk", folder / "larger")
    resumed(run, folder / "larger" / run.output)
    return f"refused, then resumed to the same bytes on a larger disk ({kind})"


# ------------------------------------------------------------------ the model is touched
def _truncate(file: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def _change(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data) // 2, len(data))] ^= 0x55
    file.write_bytes(data)


def _replace(file: Path, draw: random.Random) -> None:
    shutil.copyfile(file, new := file.with_suffix(".new"))
    _change(new, draw)
    os.replace(new, file)


def _swap(file: Path, draw: random.Random) -> None:
    others = [path for path in file.parent.glob(f"*{file.suffix}") if path != file]
    if not others:
        return _replace(file, draw)
    other, away = draw.choice(others), file.with_suffix(".away")
    os.replace(file, away)
    os.replace(other, file)
    os.replace(away, other)


def touched(runs: Sequence[Run], draw: random.Random, folder: Path) -> str:
    """A file of weights is truncated, changed, replaced or swapped while the model is read."""
    run, harm = draw.choice(runs), draw.choice((_truncate, _change, _replace, _swap))
    expected, events = run.expected, run.noted(READING)[1]
    kept = {path: path.read_bytes() for path in run.source.iterdir() if path.is_file()}
    file = draw.choice([path for path in kept if path.suffix in (".safetensors", ".gguf")])
    n, count = draw.randint(1, events), 0
    (folder / "here").mkdir()
    out = folder / "here" / run.output

    def act(event: str) -> None:
        nonlocal count
        count += 1
        if count == n:
            harm(file, draw)

    def troubled() -> None:
        each_event(run.source, READING, act)
        run.write(out)

    try:
        said = refusal(troubled, folder)
        read_what_was = said or there(out) == expected
        if not read_what_was:  # it may have read the new file alone, from its beginning on
            again = folder / "again"
            again.mkdir()
            assert not refusal(partial(run.write, again / run.output), folder)
            here, new = there(out), there(again / run.output)
            mixed = sorted(name for name in new if here.get(name) != new[name])
            what = f"{run.name}, {harm.__name__[1:]} {file.name} at {n}"
            assert not mixed, f"{what}: {mixed} are of neither model"
            return "is of the model as it was changed"
    finally:
        for path, data in kept.items():
            path.write_bytes(data)
    refuse_half(run, out)
    if not said:
        return "is of the model as it was"
    resumed(run, out)
    return "refused, then resumed to the same bytes"


# ------------------------------------------------------------------ the clock
def jumping(runs: Sequence[Run], draw: random.Random, folder: Path) -> str:
    """The clock of the day jumps forth and back at every look."""
    run, real = draw.choice(runs), time.time
    seed = draw.random()

    def troubled() -> None:
        leaps = random.Random(seed)
        time.time = lambda: real() + leaps.choice((-1e9, -3600, 0, 3600, 1e9))
        time.time_ns = lambda: int(time.time() * 1e9)
        run.write(folder / run.output)

    assert not refusal(troubled, folder), f"{run.name} refuses a clock that jumps"
    resumed(run, folder / run.output)
    return "the same bytes"


# ------------------------------------------------------------------ another run
def at_once(runs: Sequence[Run], draw: random.Random, folder: Path) -> str:
    """Three runs begin on one output at one moment."""
    run = draw.choice(runs)
    (folder / "here").mkdir()
    out, reading, writing = folder / "here" / run.output, *os.pipe()
    told = [folder / f"told-{i}" for i in range(3)]

    def waiting(resume: bool) -> None:
        os.close(writing)
        os.read(reading, 1)  # until the writing end is closed
        run.write(out, resume=resume)

    pids = [start(quietly(partial(waiting, resume=draw.random() < 0.5), file)) for file in told]
    os.close(writing)
    codes = [finish(pid) for pid in pids]
    os.close(reading)
    assert codes == [0, 0, 0], codes
    said = list(filter(None, (file.read_text() for file in told)))
    assert len(said) < 3, f"{run.name}: nobody went through: {said}"
    assert all(SENTENCE.fullmatch(text) for text in said), said
    resumed(run, out)
    return f"one whole output, {len(said)} refused"


# ------------------------------------------------------------------ no permission
def forbidden(runs: Sequence[Run], draw: random.Random, folder: Path) -> str:
    """A user who may write nothing there begins a run, or goes on with a killed or a finished
    one."""
    run, state = draw.choice(runs), draw.choice(("begun", "finished", "not begun"))
    (folder / "here").mkdir()
    out = folder / "here" / run.output
    if state == "finished":
        resumed(run, out)
    while state == "begun" and not killed_once(run, out, draw):
        out.unlink() if out.is_file() else shutil.rmtree(out)
    before = there(out.parent)
    _let_enter(run.source)
    _let_enter(out.parent)
    modes = {path: path.stat().st_mode for path in (out.parent, *out.parent.rglob("*"))}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def as_nobody() -> None:
        run.write(folder / run.output)  # imports what it needs, while it may
        if os.getuid() == 0:  # to whom nothing is forbidden
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        run.write(out, resume=True)

    said = refusal(as_nobody, folder)
    for path, mode in modes.items():
        path.chmod(mode)
    assert there(out.parent) == before, f"{run.name}, {state}: something changed"
    assert said or state == "finished", f"{run.name}, {state}: nothing was refused"
    resumed(run, out)
    return f"{state}: {'refused' if said else 'read'}, then the same bytes"


def _let_enter(folder: Path) -> None:
    """Let everybody come into a temporary folder and read there."""
    root = Path(tempfile.gettempdir())
    for path in (folder, *folder.parents):
        if root in path.parents:
            path.chmod(path.stat().st_mode | 0o055)


RUNS = {"quantize": quantizing, "model-free": model_free, "convert": converting}
TRIALS = {
    "a full disk": full,
    "weights touched while they are read": touched,
    "a clock that jumps": jumping,
    "runs at once": at_once,
    "no right to write": forbidden,
}


def case(fault: str, name: str) -> Case:
    """Trials of one fault with runs of one kind, which has models of its own to break."""

    def make(folder: Path) -> Trial:
        return partial(TRIALS[fault], RUNS[name](folder / fault))

    return Case(name=f"{fault}: {name}", make=make, bounded=name == "model-free")


CASES = tuple(case(fault, name) for fault in TRIALS for name in RUNS)
