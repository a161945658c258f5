"""Files that appear whole or not at all, also after a power loss: data is synced before the name
that vouches for it."""

import errno
import fcntl
import glob
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlab.errors import Unwritable


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path) and rename the result to `path`; on failure nothing is left and
    `path` is as before."""
    # machines that share a folder may have processes of one number
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
    try:
        with unwritable(path):
            with _held(temporary):
                write(temporary)
                sync(temporary)
                os.replace(temporary, path)
            sync(path.parent)
    finally:
        with suppress(OSError):  # a disk that failed may refuse this, too
            temporary.unlink(missing_ok=True)


@contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """A context for what writes a file: what the system refuses is said in one sentence."""
    try:
        yield
    except OSError as error:
        raise Unwritable(
            f"{path} cannot be written ({error.strerror}); free some space or choose another place"
        ) from error


@contextmanager
def _held(temporary: Path) -> Iterator[None]:
    """A lock on a temporary file, which the system releases when its writer dies."""
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # a file system without locks keeps what is abandoned
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def remove_abandoned(path: Path) -> None:
    """Remove what killed calls of `atomically` left beside `path`, a file that machines do not
    share: their locks need not reach each other."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):  # its writer lives, or has removed it
            handle = os.open(left, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(handle)


def sync(path: Path) -> None:
    """Wait until a file's data, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # These say that the file system cannot sync a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Sorted, indented JSON, atomically."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    atomically(path, lambda p: p.write_text(text))
