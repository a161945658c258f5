"""All of the user's entries at once: listed, exported into one file, imported from it, cleared."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from qlab_kernels import cache
from qlab_kernels.entries import CacheError, Entry, Key, Table, replace_file, update

Layer = Literal["user", "shipped"]


def export(path: Path) -> int:
    """Write all of the user's entries into one file; returns how many. They can be imported
    elsewhere, or named in the override.

    CacheError when the file cannot be written, or is there and was not exported.
    """
    path = Path(os.path.realpath(path))
    _refuse_foreign(path)
    tables = cache.user_tables()
    try:
        replace_file(
            path, "[\n" + ",\n".join(table.json() for _, table in sorted(tables.items())) + "]\n"
        )
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written ({error.strerror}): choose another place"
        ) from error
    return sum(len(table.entries) for table in tables.values())


def _refuse_foreign(path: Path) -> None:
    if path.parent == Path(os.path.realpath(cache.folder())):
        raise CacheError(f"{path} is among the entries themselves: choose another place")
    if not path.exists():
        return
    try:
        if path.stat().st_size:
            cache.read_exported(path)
    except (ValueError, OSError) as error:
        raise CacheError(
            f"{path} exists and is no file that `qlab cache export` wrote: choose another place"
        ) from error


def import_(path: Path) -> int:
    """Merge a file that `export` wrote into the user's entries, where an entry of the same key with
    a later date stays.

    Returns how many entries were taken. CacheError for a file that is none, or when the folder
    cannot be written.
    """
    if not path.is_file():
        raise CacheError(f"{path} is no file; give one that `qlab cache export` wrote")
    try:
        tables = cache.read_exported(path)
    except (ValueError, OSError) as error:
        raise CacheError(f"{path} is not a file that `qlab cache export` wrote: {error}") from error
    cache.require_writable()
    taken = 0
    for name, table in tables.items():

        def merge(entries: dict[Key, Entry], new: Mapping[Key, Entry] = table.entries) -> None:
            nonlocal taken
            newer = {
                key: entry
                for key, entry in new.items()
                if key not in entries or entries[key].date <= entry.date
            }
            entries.update(newer)
            taken += len(newer)

        update(cache.folder() / name, merge)
    cache.refresh()
    return taken


def clear(op: str = "", capability: str = "") -> int:
    """Remove the user's entries, all or those of one operator or capability ('sm90'); returns how
    many."""
    removed = 0
    for name, table in cache.user_tables().items():
        if (not op or name.split(".")[0] == op) and (
            not capability or name.split(".", 1)[1] == f"{capability}.json"
        ):
            try:
                update(cache.folder() / name, dict.clear)
            except OSError as error:
                raise CacheError(
                    f"{cache.folder() / name} cannot be written ({error.strerror}): it stays as "
                    "it is"
                ) from error
            removed += len(table.entries)
    cache.forget()
    cache.refresh()
    return removed


def listing() -> list[tuple[Layer, str, Key, Entry]]:
    """Every entry of the snapshot: (layer, file name, key, entry)."""
    snapshot = cache.snapshot()
    layers: tuple[tuple[Layer, Mapping[str, Table]], ...] = (
        ("user", snapshot.user),
        ("shipped", snapshot.shipped),
    )
    return [
        (layer, name, *row)
        for layer, tables in layers
        for name, table in tables.items()
        for row in table.entries.items()
    ]
