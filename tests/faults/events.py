"""What a process does to files, counted: the numbered moments at which a fault comes.

An audit hook is told of every open, rename, removal and new folder, whoever asks for it; files are
opened so that every read and write that reaches the system is told, too. None of it is undone, so
that it is for forks.
"""

import _io
import builtins
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a disk, a quota, a mount and a table of open files say.
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EMFILE)
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
WRITING = ("open to write", "write", "sync", *CHANGES)
READING = ("open to read", "read")

Act = Callable[[str], None]


def each_event(below: Path, kinds: tuple[str, ...], act: Act) -> None:
    """From now on `act` is called before each event of these kinds at a file below a folder."""
    prefix, real_open, real_sync = os.fspath(below), io.open, os.fsync
    acting = False

    def told(event: str) -> None:
        nonlocal acting
        if event in kinds and not acting:  # acting touches no files of interest
            acting = True
            try:
                act(event)
            finally:
                acting = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and _is_below(args[0], prefix):
            told("open to write" if args[2] & (os.O_WRONLY | os.O_RDWR) else "open to read")
        elif event in CHANGES and _is_below(args[0], prefix):
            told(event)

    class Raw(io.FileIO):
        def readinto(self, buffer: Any) -> Any:
            told("read")
            return super().readinto(buffer)

        def read(self, size: int = -1) -> Any:
            told("read")
            return super().read(size)

        def readall(self) -> Any:
            told("read")
            return super().readall()

        def write(self, data: Any) -> Any:
            told("write")
            return super().write(data)

    def opening(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
        if "+" in mode or not _is_below(file, prefix):
            return real_open(file, mode, buffering, *args, **options)
        letter = mode.replace("b", "").replace("t", "")
        raw = Raw(file, letter, closefd=True, opener=options.pop("opener", None))
        buffered = io.BufferedReader(raw) if letter == "r" else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **options)

    def syncing(handle: int) -> None:
        told("sync")
        real_sync(handle)

    sys.addaudithook(hook)
    builtins.open = io.open = _io.open = opening  # type: ignore[assignment]
    os.fsync = syncing


def _is_below(path: object, prefix: str) -> bool:
    return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(prefix)


def killing(n: int) -> Act:
    """Kills this process at the n-th event, from 1."""
    count = 0

    def act(event: str) -> None:
        nonlocal count
        count += 1
        if count == n:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def failing(n: int, code: int, lasting: bool) -> Act:
    """Lets the n-th event fail with this error number, and all behind it where it is lasting."""
    count = 0

    def act(event: str) -> None:
        nonlocal count
        count += 1
        if count == n or (lasting and count > n):
            raise OSError(code, os.strerror(code))

    return act


def counting(told: Path) -> Act:
    """Adds a byte to a file at every event."""
    handle = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def act(event: str) -> None:
        os.write(handle, b".")

    return act
