"""Whether compiled kernels of codes (`qlab_kernels.nearest`) are worth loading.

They compute the same as torch, bit for bit, and to load them takes seconds, of which the most are
torch's own code that finds a compiler. So a process uses torch until that has cost as much, or
until it says that as much is to come.
"""

import threading
from types import ModuleType

from qlab.errors import warn

MANY = 1 << 27  # weights: torch rounds them in as long as it takes to load the kernels


class _Demand:
    """Weights that this process has made codes of by torch, and those that it is about to."""

    def __init__(self) -> None:
        self.lock, self.count, self.warned = threading.Lock(), 0, False

    def add(self, count: int) -> None:
        with self.lock:
            self.count += count

    def warn_once(self, reason: str) -> None:
        with self.lock:
            warned, self.warned = self.warned, True
        if not warned:
            warn(f"weights are rounded by torch, which takes ten times as long, because {reason}")


_demand = _Demand()


def expect(count: int) -> None:
    """Say that codes of so many weights are about to be made."""
    _demand.add(count)


def kernels() -> ModuleType | None:
    """The kernels of codes, where they are worth it and this machine compiles them; warns once
    where it does not."""
    if _demand.count < MANY:
        return None
    from qlab_kernels import nearest

    reason = nearest.why_not()
    if reason is None:
        return nearest
    _demand.warn_once(reason)
    return None
