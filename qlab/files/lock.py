"""One owner for a folder: a lock on a file in it, which the system releases when its holder ends,
however that comes."""

import fcntl
import os
from pathlib import Path

from qlab.errors import QlabError

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
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(handle)
                raise QlabError(
                    f"another run is writing to {self.path.parent.parent}; wait until it ends, or "
                    "choose another output directory"
                ) from error
            except OSError:
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


def _is_open_as(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False
