"""What commands print and write: tables for a terminal, and their results as JSON."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from qlab.cli.options import ONE_FILE, resolved
from qlab.errors import LONGEST, printable

WIDTH = 132  # of a table that no terminal shows


def console(width: int = WIDTH) -> Console:
    """Of the width of the terminal or $COLUMNS, or wide enough for every table where there is
    neither."""
    plain: dict[str, Any] = {"markup": False, "emoji": False}  # paths and names are what they are
    shown = _Printable(**plain)
    known = shown.is_terminal or "COLUMNS" in os.environ
    return shown if known else _Printable(width=width, **plain)


class _Printable(Console):
    """Every string, in a cell of a table too, is shown as it reads, whatever file it comes from."""

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        if len(text) > LONGEST:  # the search for what to colour takes the square of its length
            options["highlight"] = False
        return super().render_str(printable(text), **options)


def report(value: Any, path: Path | None) -> None:
    """Write a result as JSON where the user asked for it."""
    if path is not None:
        from qlab.files.atomic import write_json
        from qlab.files.ownership import sealed

        write_json(path, sealed(value))


def output_place(
    out: Path,
    model: str,
    files: Sequence[Path],
    overwrite: bool,
    resume: bool,
    json_file: Path | None,
    codec: str = "",
) -> None:
    """Refuse an output, and a report inside it, before anything is read.

    files: what is read beside the model. codec: the name of the format, where one is named; for one
    that is a file the output is refused when it is written."""
    from qlab.files.place import place, refuse_early, refuse_inside, working

    if codec in ONE_FILE:
        return
    folder = place(out, resolved(model), files)
    refuse_early(folder, overwrite, resume)
    if json_file is not None:
        refuse_inside(json_file, [folder, working(folder)])
