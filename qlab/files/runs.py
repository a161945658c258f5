"""A folder of runs that several machines do: what is to be made, and how far that is.

Each run has a folder of its own, with the words that asked for it, the parts that are made, and a
file that says when it is whole. Nothing else is remembered: whoever comes takes what is not there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

from qlab.errors import QlabError
from qlab.files.atomic import write_json
from qlab.files.ownership import read_sealed, sealed
from qlab.files.parts import refuse_without_rename
from qlab.files.place import folder_for

FORM = 1  # of what is said of a run
RUNS, RUN, WHOLE = "runs", "run.json", "whole.json"


class PlannedRun:
    """A run of a shared folder. said: its output, its words, what decides its bytes, and how many
    pieces it has."""

    def __init__(self, folder: Path, said: Mapping[str, Any]) -> None:
        self.folder, self.said = folder, said

    @property
    def out(self) -> Path:
        """The directory that is written."""
        return Path(self.said["out"])

    @property
    def parts(self) -> Path:
        """The folder of what is made."""
        return self.folder / "parts"

    def claim(self, piece: int | str) -> Path:
        """The file by which a process claims a piece, or the end of the run."""
        return self.folder / "claims" / str(piece)

    @property
    def is_whole(self) -> bool:
        """Whether the output was put in place. Refuses one that was taken away since."""
        if not (self.folder / WHOLE).exists():
            return False
        if not os.path.lexists(self.out):
            raise QlabError(
                f"{self.out} was made by the runs in {self.folder.parent.parent} and is gone; "
                f"remove {self.folder / WHOLE} to make it again"
            )
        return True

    def note_whole(self) -> None:
        """Note that the output is in place; its parts are of no more use."""
        write_json(self.folder / WHOLE, sealed({"out": str(self.out)}))
        shutil.rmtree(self.parts, ignore_errors=True)


def add_run(folder: Path, said: Mapping[str, Any]) -> PlannedRun:
    """Add a run to a shared folder, which is made where it is missing. The same run is added
    once."""
    folder_for("runs", folder)
    strangers = sorted({path.name for path in folder.iterdir()} - {RUNS, "statistics"})
    if strangers and not (folder / RUNS).is_dir():
        raise QlabError(
            f"{folder} holds {strangers[0]}, which is no run; give --jobs an empty or a new folder"
        )
    refuse_without_rename(folder)
    whole = json.loads(json.dumps({**said, "form": FORM}))
    name = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]
    for other in _runs(folder):
        if other.said["out"] == whole["out"] and other.folder.name != name:
            raise QlabError(
                f"{other.folder} is another run that writes {other.out}; choose another output "
                "directory, or remove that run"
            )
    run = PlannedRun(folder / RUNS / name, whole)
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / RUN, sealed(whole))
    return run


def runs_of(folder: Path) -> list[PlannedRun]:
    """The runs of a shared folder, in an order that all machines see; refuses a folder of none."""
    runs = _runs(folder)
    if not runs:
        raise QlabError(
            f"{folder} holds no runs to work on; "
            f"`qlab quantize ... --jobs {quote(str(folder))}` adds one"
        )
    refuse_without_rename(folder)
    return runs


def _runs(folder: Path) -> list[PlannedRun]:
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted((folder / RUNS).iterdir()):
            said = read_sealed(path / RUN)
            if said is None:
                if not (path / RUN).exists():  # its adding was stopped
                    continue
                raise QlabError(
                    f"{path / RUN} is not what was written; remove {path} and add the run again"
                )
            if said.get("form") != FORM:
                raise QlabError(
                    f"{path / RUN} was written by another version of qlab; remove {path} and add "
                    "the run again"
                )
            found.append(PlannedRun(path, said))
    return found
