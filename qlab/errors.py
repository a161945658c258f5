"""The one exception that qlab raises on purpose, and how its sentences are made."""

import os
import re
import sys
import warnings

# Characters that a terminal obeys or hides: control characters, line ends, directions of writing,
# half characters.
UNSEEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)

LONGEST_PATH = 300  # characters of a path that an error shows
LONGEST_LINE = 300  # characters of what another library says
LONGEST = 2000  # characters of a sentence, of which the last quarter says what to do


def printable(text: str) -> str:
    """The text on one line, with escapes for unseen characters: names out of files may hold any."""
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says, with the next one where it ends in a
    colon, and no more than a sentence holds; its type where it says nothing."""
    said = str(error).strip() or type(error).__name__
    first, *more = said.splitlines()
    return shortened(f"{first} {more[0].strip()}" if first.endswith(":") and more else first)


def shortened(text: str, most: int = LONGEST_LINE) -> str:
    """The text, or its first characters where it has more than so many: a file may say anything."""
    return text if len(text) <= most else f"{text[:most]}..."


def reraise_own(error: BaseException) -> None:
    """Raise on what a caller asked for (an interrupt, an exit); return for whatever a library
    fails with. Libraries in Rust panic with what is no Exception."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _cut(sentence: str) -> str:
    """A sentence without the middle of it where a value makes it longer than anybody reads."""
    if len(sentence) <= LONGEST:
        return sentence
    end = LONGEST // 4
    return f"{sentence[: LONGEST - end - 5]} ... {sentence[-end:]}"


class QlabError(ValueError):
    """A refusal that its reader can act on: one sentence that names the place (a path, a layer),
    the value that is wrong, and what to do about it.

    It is a ValueError. The command line prints it as one line and exits with 2.

    Args:
        message: the sentence. Line ends and other unseen characters in it are escaped, and the
            middle of one that is thousands of characters long is left out.

    Example:
        >>> import qlab
        >>> try:
        ...     qlab.rtn("int4-g0")
        ... except qlab.QlabError as error:
        ...     print(error)
        spec 'int4-g0' asks for groups of 0; a group holds at least one input channel
    """

    def __init__(self, message: str):
        super().__init__(_cut(printable(message)))


class Outage(QlabError):
    """A refusal of the system, not of an argument: the files that are written already stay, and the
    job can be resumed."""


class Unwritable(Outage):
    """A place cannot be written to."""


class Unreadable(Outage):
    """A file cannot be read, or is no longer the one that was opened."""


class ToldElsewhere(QlabError):
    """A refusal that another process of the same run tells."""


def refusal_of(error: OSError | RecursionError) -> QlabError:
    """An error of the operating system, or of too deep a recursion, as a sentence."""
    if isinstance(error, RecursionError):
        return QlabError(
            "what was given is nested deeper than Python can follow; give something flatter"
        )
    names = (error.filename, error.filename2)
    paths = [os.fsdecode(name) for name in names if isinstance(name, str | bytes | os.PathLike)]
    where = " and ".join(_shortened(path) for path in paths) or "a file or a device"
    return QlabError(
        f"{where} cannot be used ({error.strerror or error}); "
        "check the path, its permissions and the space left there"
    )


def _shortened(path: str) -> str:
    if len(path) <= LONGEST_PATH:
        return path
    return f"{path[:LONGEST_PATH]}... of {len(path)} characters"


def warn(text: str) -> None:
    """Warn in one line, at the line that called qlab."""
    level, frame = 1, sys._getframe()
    while frame.f_back and _is_inside(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(printable(text), stacklevel=level)


def _is_inside(module: str) -> bool:
    """Whether a module is of qlab, or is the one whose wrappers torch puts around functions."""
    return module.partition(".")[0] == "qlab" or module == "torch.utils._contextlib"
