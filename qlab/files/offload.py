"""The folder that a user names for what a run keeps beside its output: hidden states between
blocks, sums of statistics, and blocks that wait for a measurement of the whole model.

What is written there has the bytes that it has elsewhere, so nothing that a run makes depends on
it. States of a run lie in a folder of its own, from which a killed run goes on.
"""

import hashlib
import tempfile
from pathlib import Path

from qlab.errors import QlabError, Unwritable
from qlab.files.place import folder_for

STATES = ".states"  # ends the name of the folder of a run's hidden states


def states_of(out: Path, offload: Path | None) -> Path | None:
    """The folder of the hidden states of the run that writes `out`; None where nothing is
    offloaded. No run that writes elsewhere has it. Refuses an offload folder in the output."""
    if offload is None:
        return None
    folder, place = offload.expanduser().resolve(), out.absolute()
    if place == folder or place in folder.parents:
        raise QlabError(
            f"{offload} lies in the output directory {out}, which is replaced as a whole; offload "
            "to another folder"
        )
    return folder / f"{out.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:12]}{STATES}"


def scratch(kind: str, offload: str | Path | None) -> "tempfile.TemporaryDirectory[str]":
    """A folder that lives as long as the value does, in the offload folder or where the system has
    its temporary files. kind: what lies in it."""
    base = None if offload is None else folder_for("hidden states", Path(offload).expanduser())
    try:
        return tempfile.TemporaryDirectory(prefix=f"qlab-{kind}-", dir=base)
    except OSError as error:
        raise Unwritable(
            f"{base or tempfile.gettempdir()} cannot be written ({error.strerror}); free some "
            "space or name another folder to offload to"
        ) from error
