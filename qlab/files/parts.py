"""The segments of an output as processes of several machines make them, in a folder that they
share.

Nobody owns the folder. A segment is the same bytes whoever makes it, and it appears whole, so two
that make the same one at once only waste work. Claims keep live processes from that: a claim is a
lock, which the system releases when its holder ends, however that comes.
"""

import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlab.errors import QlabError
from qlab.files.atomic import atomically, write_json
from qlab.files.hashed import HashedFiles
from qlab.files.segments import Segments

# a file system that has no locks says one of these
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Parts(Segments):
    """The segments of a run in a shared folder. source: what this process reads of the model, where
    it is hashed on the way."""

    def __init__(self, folder: Path, shards: int, source: HashedFiles | None = None) -> None:
        self.folder, self.shards, self.source = folder, shards, source
        self.digests = {}

    def shard(self, index: int) -> Path:
        return self.folder / f"part-{index:05d}.safetensors"

    def notes_path(self, index: int) -> Path:
        return self.folder / f"part-{index:05d}.json"

    def is_written(self, index: int) -> bool:
        """Whether a segment was written. Whether it still is what was written is asked when it is
        taken over: then it is read anyway."""
        return self.shard(index).is_file() and self.record(index) is not None

    def atomically(self, path: Path, write: Callable[[Path], object]) -> None:
        atomically(path, write)

    def write_json(self, path: Path, value: Any) -> None:
        write_json(path, value)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process has the claim on a piece of work while the context lasts, and no other
    live one. Where the file system has no locks, everybody has every claim.

    path: the file of the claim, which stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _is_locked(handle)
    finally:
        os.close(handle)


def _is_locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    return True


def refuse_without_rename(folder: Path) -> None:
    """Refuse a shared folder in which a file cannot be renamed over another at once: what is copied
    under its name could be read half-written."""
    first, second = (folder / f".rename-{secrets.token_hex(8)}.tmp" for _ in range(2))
    try:
        first.write_text("new")
        second.write_text("old")
        file = first.stat().st_ino
        os.replace(first, second)
        renamed = second.stat().st_ino == file and second.read_text() == "new"
        why = "" if renamed else "it copies the file instead"
    except OSError as error:
        why = error.strerror or str(error)
    finally:
        for path in (first, second):
            with suppress(OSError):
                path.unlink(missing_ok=True)
    if why:
        raise QlabError(
            f"{folder} is on a file system that does not rename files atomically ({why}), and "
            "parts could be read half-written; share a folder of a POSIX file system, such as NFS "
            "or Lustre"
        )
