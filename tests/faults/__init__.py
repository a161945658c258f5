"""A campaign of faults: what dies, fills up, breaks or lies while qlab works, and what it is given.

A case is one kind of fault. Every trial of it is drawn from a number, so that one that finds
something can be run again. `python -m tests.faults --hours 1` runs trials of all cases in turn and
stores how they ended; `tests/faults/test_campaign.py` runs a few of each.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Takes what draws the trial, and an empty folder for it. Returns how it ended, in a few words that
# are the same for trials of one kind ("the same bytes", "refused"). What must not be is an
# AssertionError that says what it was.
Trial = Callable[[random.Random, Path], str]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of fault.

    name: of the case, in words.
    make: takes a folder for what trials of all cases share (models, whole outputs), adds to it what
        is not there yet, and gives the function of one trial. It is called once, and trials run in
        forks of the process after it.
    bounded: how many trials the suite runs; 0 for one that has a test of its own, or no time there.
    """

    name: str
    make: Callable[[Path], Trial]
    bounded: int = 2


def drawn(case: str, number: int) -> random.Random:
    """What draws the trial of this number."""
    return random.Random(f"{case} {number}")
