"""What lies in the folder in which an output is built: which files a run writes there, which are no
run's, and whether a run came to its end.
"""

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlab.files.directory import INDEX
from qlab.files.lock import LOCK
from qlab.files.ownership import RECORD, damaged
from qlab.files.place import WORK
from qlab.files.record import job_of

# Files of the work folder:
JOB = "job.json"  # what identifies the run that began there
OVERWRITE = "overwrite"  # the run may replace an existing output
REPLACED = "replaced"  # the output that is being replaced
PARTS = "parts-*"  # the folder in which other ranks of a run make files
NAMES = "names.json"  # names of the files beside the shards, written before the first of them


def read_job(path: Path) -> Any:
    """The value in a JSON file; None where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


# ------------------------------------------------------------------ how far a run came
def ended(out: Path) -> bool:
    """Whether a run has put an output in place, and its work folder is still there."""
    work = out / WORK
    if not (work / LOCK).is_file():
        return False
    job = read_job(work / JOB)
    if job is None:
        return holds_only(work, LOCK)
    return same_but_for_source(job, job_of(out))


def broken_shards(out: Path) -> str | None:
    """The first shard that is not what was written, as after a power loss, in words.

    None where nothing is damaged, or where a file that is no shard is damaged, too.
    """
    broken = damaged(out)
    if not all(name.endswith(".safetensors") for name in broken):
        return None
    return next((f"{out / name} {damage}" for name, damage in broken.items()), None)


def same_but_for_source(job: Any, other: Any) -> bool:
    """Whether two jobs agree in all but their sources."""
    if not isinstance(job, dict) or not isinstance(other, dict):
        return False
    return {**job, "source": None} == {**other, "source": None}


def holds_only(folder: Path, name: str) -> bool:
    """Whether a folder holds this one name and no other."""
    try:
        return os.listdir(folder) == [name]
    except OSError:  # another run removes it at this moment
        return False


# ------------------------------------------------------------------ whose a file is
def strangers(partial: Path, shards: Iterable[str] | None) -> list[Path]:
    """The files and folders in a partial directory whose names no run writes.

    Args:
        partial: The directory.
        shards: Names of the shards of this job; None for those of any job.
    """
    work = partial / WORK
    names = read_job(work / NAMES)
    listed = names if isinstance(names, list) else ()
    known = {"config.json", RECORD, INDEX, *listed, *(shards or ())}
    folders = {str(parent) for name in known for parent in Path(name).parents}
    entries = [*partial.iterdir()]
    for name in folders - {"."}:
        if (partial / name).is_dir():
            entries += (partial / name).iterdir()
    foreign = [
        path
        for path in entries
        if path != work
        and not _is_ours(str(path.relative_to(partial)), known | folders, shards is None)
    ]
    return sorted([*foreign, *(path for path in work.iterdir() if not _is_work(path.name))])


def _is_ours(name: str, known: set[str], any_shard: bool) -> bool:
    """Whether a run writes a file of this name into the partial directory. any_shard: also one of
    another job's."""
    path = Path(name)
    whole = name
    if path.name.startswith(".") and path.suffix == ".tmp":
        whole = str(path.with_name(path.name[1:].rsplit(".", 3)[0]))
    return whole in known or (any_shard and Path(whole).match("model-[0-9]*-of-[0-9]*.safetensors"))


def _is_work(name: str) -> bool:
    """Whether a run writes a file of this name into its work folder."""
    path = Path(name)
    kinds = (".*.tmp", "notes-[0-9]*.json", "carry-*-[0-9]*.bin", PARTS)
    return name in (LOCK, JOB, OVERWRITE, REPLACED, NAMES) or any(map(path.match, kinds))


# ------------------------------------------------------------------ removal
def delete(path: Path) -> None:
    """Delete a file, a link or a whole folder."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove_work_folder(work: Path) -> None:
    """Remove a work folder that this run owns; the lock goes last, so that nobody comes in
    between."""
    for path in sorted(work.iterdir(), key=lambda path: (path.name == LOCK, path.name == JOB)):
        delete(path)
    with suppress(OSError):  # where another run is in it by now
        work.rmdir()
