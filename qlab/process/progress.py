"""The progress of a long loop: a bar on a terminal and in a notebook, lines on stderr elsewhere (a
log, a queue, a pipe)."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from qlab.errors import printable

EVERY = 10.0  # seconds between lines; the first and the last item always have one
Item = TypeVar("Item")


def say(line: str) -> None:
    """Print a line that is no result to stderr. If stderr is closed, as after `2>&1 | head`, work
    goes on without it."""
    with suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)


def progress(items: Sequence[Item], doing: str) -> Iterator[Item]:
    """The items one by one, with a display of how many are done. doing: what is done with them."""
    doing, console = printable(doing), Console(stderr=True)
    if console.is_terminal or console.is_jupyter:
        yield from track(items, escape(doing), console=console)
        return
    started = said = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if number in (1, len(items)) or now - said >= EVERY:
            said = now
            say(f"{doing}: {_position(number, len(items), now - started)}")


def _position(number: int, count: int, seconds: float) -> str:
    """How many items are done, in how many seconds, and how long the rest will take."""
    rest = f", about {seconds / number * (count - number):.0f} s left" if number < count else ""
    return f"{number} of {count}, {seconds:.0f} s{rest}"
