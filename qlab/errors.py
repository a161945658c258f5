"""The one exception qlab raises on purpose: one sentence with what, where, the value and what to do."""

import re

# what a terminal obeys or hides: control characters, line ends, directions of writing, half characters
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    """The text on one line and as it reads: names out of files may hold anything."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class QlabError(ValueError):
    """A refusal that its reader can act on. The command line prints it as one line and exits with 2."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class Unwritable(QlabError):
    """A refusal of the place that is written to, not of what was given: what is written already stays, and the job can be resumed."""
