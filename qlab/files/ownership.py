"""What qlab wrote and nobody changed since: the only thing that qlab replaces.

A finished directory names every file in it with its hash in qlab.json, under `written`; there
qlab.json itself stands with the hash of what else it says. A report (`--json`) carries the hash of
what it says under `qlab_sha256`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlab.errors import QlabError
from qlab.files.digests import digest_of
from qlab.files.directory import read_json
from qlab.process.shown import some

RECORD = "qlab.json"
# in qlab.json: name of a file -> its hash, and of qlab.json itself the sha256 of the rest
WRITTEN = "written"
SEAL = "qlab_sha256"  # in a report: sha256 of the rest


# ------------------------------------------------------------------ directories
def with_files(record: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """A qlab.json that names the files beside it and vouches for itself. digests: name ->
    hash."""
    said = {key: value for key, value in record.items() if key != WRITTEN}
    return {**said, WRITTEN: {**digests, RECORD: _hash_of(said)}}


def written_files(folder: Path) -> dict[str, str] | None:
    """The files that qlab wrote, as the qlab.json of a folder names them: name -> hash; None
    where there is no such record."""
    try:
        files = read_json(folder / RECORD).get(WRITTEN)
    except QlabError:
        return None
    return files if isinstance(files, dict) and RECORD in files else None


def damaged(folder: Path) -> dict[str, str]:
    """The files that the record of a folder names and that are missing or others now: name -> what
    is wrong with it."""
    damage = {}
    for name, digest in sorted((written_files(folder) or {}).items()):
        if not (folder / name).is_file():
            damage[name] = "is missing"
        elif _digest_in(folder, name, digest) != digest:
            damage[name] = "is not what was written"
    return damage


def foreign(folder: Path, contents: bool = True) -> str | None:
    """Why a folder is not qlab's to replace, in words; None where qlab wrote all that is in it.
    contents: whether files are read, too; without that, names decide."""
    if not folder.is_dir():
        return f"{folder} is no folder"
    here = sorted(os.listdir(folder))
    files = written_files(folder)
    if not here:
        return None
    if files is None and RECORD in here:
        return (
            f"{folder} has a {RECORD} without a record of its files, which older versions and "
            "other hands leave out"
        )
    if files is None:
        return f"{folder} holds {some(here, 1)}, which qlab did not write"
    names, folders = _listing(folder)
    added = sorted(names - files.keys())
    if added:
        return f"{folder} holds {some(added, 1)}, which qlab did not write"
    parents = {str(parent) for name in names for parent in Path(name).parents}
    empty = sorted(folders - parents)
    if empty:
        return f"{folder} holds the folder {empty[0]}, which qlab did not make"
    for name in sorted(names) if contents else ():
        if (folder / name).is_symlink() or _digest_in(folder, name, files[name]) != files[name]:
            return f"{folder} holds {name}, which was changed after qlab wrote it"
    return None


def _listing(folder: Path) -> tuple[set[str], set[str]]:
    """Every file (and link) and every folder below a folder, by its name from there."""
    names: set[str] = set()
    folders: set[str] = set()
    for root, inside, files in os.walk(folder):
        here = Path(root).relative_to(folder)
        links = [name for name in inside if (Path(root) / name).is_symlink()]
        names |= {str(here / name) for name in [*files, *links]}
        folders |= {str(here / name) for name in inside if name not in links}
    return names, folders


def _digest_in(folder: Path, name: str, recorded: Any) -> str:
    """The hash of a file as it is now, of the kind that is recorded; empty where there is none.
    Refuses a kind that this version does not know."""
    if name == RECORD:
        try:
            said = read_json(folder / RECORD)
        except QlabError:
            return ""
        return _hash_of({key: value for key, value in said.items() if key != WRITTEN})
    try:
        return digest_of(folder / name, like=recorded)
    except OSError:
        return ""


# ------------------------------------------------------------------ JSON that vouches for itself
def sealed(value: Any) -> Any:
    """An object, or every object of a list, with the hash of what it says."""
    if isinstance(value, list):
        return [sealed(row) for row in value]
    if not isinstance(value, Mapping):
        return value
    said = {key: row for key, row in value.items() if key != SEAL}
    return {**said, SEAL: _hash_of(said)}


def is_sealed(value: Any) -> bool:
    """Whether qlab wrote this and nobody changed it."""
    if isinstance(value, list):
        return all(map(is_sealed, value))
    if not isinstance(value, dict) or SEAL not in value:
        return False
    return value[SEAL] == _hash_of({key: row for key, row in value.items() if key != SEAL})


def read_sealed(path: Path) -> Any:
    """The value in a JSON file that qlab wrote and nobody changed; None where there is no such
    file."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if is_sealed(value) else None


def _hash_of(value: Any) -> str:
    """sha256 of what a JSON file says, as it is read back."""
    plain = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
