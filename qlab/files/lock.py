"""One owner for a folder, or for a file: a lock, which the system releases when its holder ends,
however that comes."""

import fcntl
import os
from pathlib import Path

from qlab.errors import QlabError, Unwritable

LOCK = "lock"
ATTEMPTS = 100  # at a folder that others rename or remove while it is locked


class Lock:
    """The right to write into a folder, taken from threads and processes alike. The lock goes where
    the folder is renamed to."""

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self.handle = self._taken()

    def _taken(self) -> int:
        for _ in range(ATTEMPTS):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            # The former holder removes or renames the folder at this moment.
            except FileNotFoundError:
                continue
            try:
                take(handle, self.path.parent.parent, "choose another output directory")
            except BaseException:
                os.close(handle)
                raise
            if _is_open_as(handle, self.path):
                return handle
            os.close(handle)  # what was locked is no longer the lock of this folder
        raise FileNotFoundError(2, "No such file or directory", str(self.path))

    def holds(self) -> bool:
        """Whether the folder is still the one that was locked."""
        return _is_open_as(self.handle, self.path)

    def release(self) -> None:
        """Let others have the folder."""
        os.close(self.handle)


def take(handle: int, path: Path, instead: str) -> None:
    """Lock an open file for as long as it is open; refuse one that another process has locked.

    path: what is written under the lock. instead: what to do where it cannot be had.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise QlabError(
            f"another run is writing to {path}; wait until it ends, or {instead}"
        ) from error
    except OSError as error:
        raise Unwritable(
            f"{path} cannot be locked ({error.strerror}), and another run could write to it at the "
            f"same time; {instead}"
        ) from error


def _is_open_as(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False
