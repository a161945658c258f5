"""Hidden states of all samples in a file that vouches for itself: what a resumed run goes on
from."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.files.digests import BLOCK, SIZE, hasher
from qlab.files.tensors import bytes_of


class Carry:
    """Batches of the given shapes in a file, written whole and read one by one. The file ends with
    a hash of its identity and of its batches.

    identity: a text that no file of another block, stream or job has. atomically: the function that
    writes files there."""

    def __init__(
        self,
        path: Path,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        identity: str,
        atomically: Callable[[Path, Callable[[Path], object]], None],
    ):
        self.path, self.shapes, self.dtype = path, shapes, dtype
        self.identity, self.atomically = (
            f"{identity} {[list(shape) for shape in shapes]} {dtype}",
            atomically,
        )

    def write(self, batches: Iterable[Tensor]) -> None:
        """Fill the file with batches, in order."""

        def fill(temporary: Path) -> None:
            digest = hasher()
            digest.update(self.identity.encode())
            with temporary.open("wb") as file:
                for batch in batches:
                    data = bytes_of(batch)
                    file.write(data)
                    digest.update(data)
                file.write(digest.digest())

        self.atomically(self.path, fill)

    def read(self) -> Iterator[Tensor]:
        """The batches; one at a time is in memory."""
        with self.path.open("rb") as file:
            for shape in self.shapes:
                yield self._next(file, shape)

    def at(self, first: int, count: int) -> list[Tensor]:
        """`count` batches from number `first` on, and no others."""
        before = sum(map(math.prod, self.shapes[:first])) * self.dtype.itemsize
        with self.path.open("rb") as file:
            file.seek(before)
            return [self._next(file, shape) for shape in self.shapes[first : first + count]]

    def _next(self, file: BufferedReader, shape: tuple[int, ...]) -> Tensor:
        batch = torch.empty(shape, dtype=self.dtype, device="cpu")
        if file.readinto(bytes_of(batch)) < batch.numel() * batch.itemsize:
            raise QlabError(
                f"{self.path} is shorter than the calibration data; remove its directory "
                "and start again"
            )
        return batch

    def is_sound(self) -> bool:
        """Whether the file holds what was written to it for this very use."""
        try:
            with self.path.open("rb") as file:
                return self._matches(file, self.path.stat().st_size - SIZE)
        except OSError:
            return False

    def _matches(self, file: BufferedReader, size: int) -> bool:
        digest = hasher()
        digest.update(self.identity.encode())
        while size > 0:
            data = file.read(min(BLOCK, size))
            if not data:
                break
            digest.update(data)
            size -= len(data)
        return size == 0 and file.read() == digest.digest()
