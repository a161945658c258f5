"""Files of figures: PNGs that say that qlab drew them, so that nothing else is overwritten."""

import os
from pathlib import Path
from typing import Any

from qlab.errors import QlabError, printable
from qlab.files.atomic import atomically

DRAWN = b"Software\0qlab"  # in the first chunk of text of a PNG


def refuse_foreign_figure(path: Path) -> None:
    """Refuse to draw over anything but a figure that qlab drew, which says so in its first
    bytes."""
    if path.parent.exists() and not os.access(path.parent, os.W_OK):
        raise QlabError(
            f"{path} cannot be written; give a figure in a folder that may be written to"
        )
    if not path.exists():
        return
    if not path.is_file() or (path.stat().st_size and DRAWN not in _beginning(path)):
        raise QlabError(
            f"{path} exists and is no figure that qlab drew; move it away or choose another place"
        )


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1000)


def literal(text: str) -> str:
    """A name out of a file or a path, in which a `$` begins no formula."""
    return printable(text).replace("$", r"\$")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as a PNG, atomically."""
    atomically(
        path,
        lambda temporary: figure.savefig(
            temporary, format="png", dpi=120, metadata={"Software": "qlab"}
        ),
    )
