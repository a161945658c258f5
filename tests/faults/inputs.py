"""Inputs that nobody should give: each is refused in one sentence, or read as a reference reads it.

A trial makes and gives one input, in bounded memory and time. What crashes, hangs, grows or opens a
file outside its directory is an AssertionError.
"""

import os
import random
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults import Case, Trial
from qlab.errors import LONGEST, QlabError

MEMORY = 2**30  # bytes that an input may take beside what the process has
SECONDS = 20.0  # of the processor, for one input
REFUSED, READ = "refused", "read"
OUTSIDE = "outside"  # the name of folders from which nothing may be read


def case(name: str, make: Callable[[Path], Trial], bounded: int = 4) -> Case:
    """The case of such inputs. make: as `Case.make`; its trials are bounded here."""

    def make_bounded(shared: Path) -> Trial:
        own = shared / name.replace(" ", "-")  # others may have files of the same names
        own.mkdir()
        trial = make(own)

        def one(draw: random.Random, folder: Path) -> str:
            with watched() as read_outside, bounded_memory(), bounded_time():
                try:
                    ended = trial(draw, folder)
                except BaseException as error:
                    raise AssertionError(traceback.format_exc(limit=-6)) from error
            assert not read_outside, f"it read {read_outside[0]}"
            return ended

        return one

    return Case(name=f"input: {name}", make=make_bounded, bounded=bounded)


def refusal(act: Callable[[], Any]) -> tuple[Any, str | None]:
    """(what act() returns, None), or (None, the sentence of its refusal)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return act(), None
        except QlabError as error:
            said = str(error)
    assert "\n" not in said and 20 < len(said) <= LONGEST, f"no sentence: {said[:2000]!r}"
    return None, said


class TooLong(BaseException):
    """An input that takes more of the processor than it may."""


@contextmanager
def bounded_time(seconds: float = SECONDS) -> Iterator[None]:
    """Ends what takes more seconds of the processor."""

    def end(*_: Any) -> None:
        raise TooLong(f"more than {seconds} s of the processor")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def bounded_memory(more: int = MEMORY) -> Iterator[None]:
    """Lets the process map so many more bytes than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


_read_outside: list[str] = []


def _hook(event: str, arguments: tuple) -> None:
    """A hook of Python, which stays for the life of the process."""
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path = Path(os.path.abspath(os.fsdecode(arguments[0])))
        if OUTSIDE in path.parts or path == Path("/etc/passwd"):
            _read_outside.append(str(path))


@contextmanager
def watched() -> Iterator[list[str]]:
    """The files outside a model's directory that Python opens meanwhile."""
    if not getattr(sys, "_qlab_watches_files", False):
        sys.addaudithook(_hook)
        sys._qlab_watches_files = True  # type: ignore[attr-defined]
    _read_outside.clear()
    yield _read_outside
