"""Statistics that lie in the offload folder while parts of the windows are summed."""

from collections.abc import Iterator, MutableMapping
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.errors import Unreadable
from qlab.files.atomic import unwritable
from qlab.files.directory import reading
from qlab.files.offload import scratch
from qlab.files.tensors import bytes_of
from qlab.process.sendable import Place, packed, unpacked


class Away(MutableMapping[Any, Any]):
    """Values whose tensors lie in files. Each is read anew when it is asked for, laid out as it was
    and on its device. The files go with the mapping.

    offload: the folder that a user named.
    """

    def __init__(self, offload: str | Path) -> None:
        self._folder = scratch("statistics", offload)
        self._words: dict[Any, bytes] = {}
        self._files: dict[Any, Path] = {}

    def __setitem__(self, key: Any, value: Any) -> None:
        file = Path(self._folder.name) / f"{len(self._files)}.bin"
        file = self._files.setdefault(key, file)
        with unwritable(file), file.open("wb") as out:
            self._words[key], tensors = packed(value)
            for flat in tensors:
                out.write(bytes_of(flat))

    def __getitem__(self, key: Any) -> Any:
        words = self._words[key]
        path = self._files[key]
        with reading(path), path.open("rb") as file:
            return unpacked(words, partial(_read, file))

    def __delitem__(self, key: Any) -> None:
        del self._words[key]
        self._files.pop(key).unlink()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._words)

    def __len__(self) -> int:
        return len(self._words)


def _read(file: BufferedReader, place: Place) -> Tensor:
    flat = torch.empty(place.nbytes, dtype=torch.uint8, device="cpu")
    if file.readinto(bytes_of(flat)) < place.nbytes:
        raise Unreadable(f"{file.name} was cut while it was in use; start again with --resume")
    return place.of(flat.to(place.device))
