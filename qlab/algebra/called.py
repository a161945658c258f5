"""Calling a function that somebody else wrote: what it raises becomes one sentence, which says
whose function it was and at which weight or wire. The error itself is behind it (`__cause__`)."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from qlab.errors import QlabError, first_line

T = TypeVar("T")
# What says enough by itself, or is about the machine and not about the function. Ctrl-C is no
# `Exception`, and passes too.
PASSING = (QlabError, OSError, MemoryError, torch.OutOfMemoryError)
NOT_OURS = ("qlab", "torch", "einops")


class Failed(QlabError):
    """A function of a step, a statistic or an insert raised an error that is none of qlab's."""


def called(what: str, fn: Callable[..., T], *args: Any) -> T:
    """fn(*args). what: whose function it is and where it runs, as the error begins."""
    try:
        return fn(*args)
    except PASSING:
        raise
    except Exception as error:  # whatever the function raises
        raise Failed(
            f"{what} failed{_place(error)}: {type(error).__name__}: {first_line(error)}; mend that "
            "function"
        ) from error


def _place(error: Exception) -> str:
    """The last line of code that ran outside qlab and its libraries, as " (file.py, line 3)"."""
    places = [
        f" ({Path(frame.f_code.co_filename).name}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] not in NOT_OURS
    ]
    return places[-1] if places else ""
