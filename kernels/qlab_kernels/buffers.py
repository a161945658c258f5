"""Memory of tensors that come one after another."""

import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

OUTPUTS = 8  # buffers of outputs that may wait: codes and words of several weights


class Buffers:
    """Memory of tensors, used again where no tensor of it is left: the system takes longer to hand
    out fresh memory than to fill it from a file.

    kept: how many buffers may wait for their next tensor, of which the largest are kept.
    """

    LEAST = 1 << 20  # bytes of a tensor that is worth it

    def __init__(self, kept: int = 3) -> None:
        self._kept = kept
        self._lock = threading.Lock()
        self._free: list[Tensor] = []

    def empty(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of any numbers."""
        if nbytes < self.LEAST:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        with self._lock:
            # What comes back meanwhile is appended to one of the lists, of which the older is left.
            waiting, self._free = self._free, []
            free = sorted(waiting, key=len)
            fitting = [i for i, each in enumerate(free) if nbytes <= len(each) <= 2 * nbytes]
            buffer = free.pop(fitting[0]) if fitting else None
            self._free += free[-self._kept :]
        if buffer is None:
            buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        lent = buffer.numpy()[:nbytes]  # which a tensor holds as long as it lives
        weakref.finalize(lent, self._back, buffer).atexit = False
        return torch.from_numpy(lent)

    def _back(self, buffer: Tensor) -> None:
        self._free.append(buffer)  # without the lock: the collector may call this inside of it


class _Shared:
    """The buffers of outputs, while somebody uses them."""

    def __init__(self) -> None:
        self.lock, self.users = threading.Lock(), 0
        self.buffers: Buffers | None = None


_shared = _Shared()


@contextmanager
def reused() -> Iterator[None]:
    """While any thread is inside, outputs of kernels take memory that earlier ones let go of.
    Behind the last one the memory is the system's again."""
    with _shared.lock:
        _shared.users += 1
        _shared.buffers = _shared.buffers or Buffers(OUTPUTS)
    try:
        yield
    finally:
        with _shared.lock:
            _shared.users -= 1
            _shared.buffers = _shared.buffers if _shared.users else None


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An output of any numbers, on a CPU."""
    buffers = _shared.buffers
    if buffers is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return buffers.empty(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
