"""How far a long loop is: a bar on a terminal and in a notebook, lines on stderr elsewhere (a log,
a queue, a pipe)."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from qlab.errors import printable

EVERY = 10.0  # seconds from one line to the next, beside the first and the last
Item = TypeVar("Item")


def say(line: str) -> None:
    """Progress, and what else is no result. Work goes on where nobody listens any more, as after
    `2>&1 | head`."""
    with suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)


def progress(items: Sequence[Item], doing: str) -> Iterator[Item]:
    """The items one by one; `doing` is what is said to be done with them."""
    doing, console = printable(doing), Console(stderr=True)
    if console.is_terminal or console.is_jupyter:
        yield from track(items, escape(doing), console=console)
        return
    started = said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if done in (1, len(items)) or now - said >= EVERY:
            said = now
            say(f"{doing}: {_where(done, len(items), now - started)}")


def _where(done: int, count: int, seconds: float) -> str:
    left = f", about {seconds / done * (count - done):.0f} s left" if done < count else ""
    return f"{done} of {count}, {seconds:.0f} s{left}"
