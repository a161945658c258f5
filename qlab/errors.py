"""The one exception qlab raises on purpose: one sentence with what, where, the value and what to
do."""

import os
import re
import sys
import warnings

# what a terminal obeys or hides: control characters, line ends, directions of writing, half
# characters
UNSEEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)

LONGEST_PATH = 300  # characters of a path that an error of the system shows


def printable(text: str) -> str:
    """The text on one line and as it reads: names out of files may hold anything."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def first_line(error: Exception) -> str:
    """The first line of what an error of another library says; its type where it says nothing."""
    said = str(error).strip() or type(error).__name__
    return said.splitlines()[0]


class QlabError(ValueError):
    """A refusal that its reader can act on. The command line prints it as one line and exits with
    2."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class Unwritable(QlabError):
    """A refusal of the place that is written to, not of what was given: what is written already
    stays, and the job can be resumed."""


def refusal_of(error: OSError | RecursionError) -> QlabError:
    """What the system refuses, in a sentence."""
    if isinstance(error, RecursionError):
        return QlabError(
            "what was given is nested deeper than Python can follow; give something flatter"
        )
    names = [
        os.fsdecode(name)
        for name in (error.filename, error.filename2)
        if isinstance(name, str | bytes | os.PathLike)
    ]
    where = " and ".join(map(_shortened, names)) or "a file or a device"
    return QlabError(
        f"{where} cannot be used ({error.strerror or error}); check the path, its permissions and "
        "the space left there"
    )


def _shortened(path: str) -> str:
    return (
        path if len(path) <= LONGEST_PATH else f"{path[:LONGEST_PATH]}... of {len(path)} characters"
    )


def warn(text: str) -> None:
    """A warning in one line, of the code that called qlab."""
    level, frame = 1, sys._getframe()
    while frame.f_back and _is_between(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(printable(text), stacklevel=level)


def _is_between(module: str) -> bool:
    """Whether this is qlab, or what torch puts around its functions."""
    return module.partition(".")[0] == "qlab" or module == "torch.utils._contextlib"
