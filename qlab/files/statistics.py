"""Statistics of a model in a folder, each in a file that is named after all that decides its
numbers.

The name is the sha256 of an identity: the model's bytes, the samples, the wire, the statistic, the
dtype and whatever else changes a bit. So two that ask for one statistic find one file, and nothing
has to be looked up or thrown away when something changes. A file vouches for its numbers; one that
does not is made again.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.statistic import PerExpert
from qlab.algebra.stats import Drifting, Moment, Sample
from qlab.errors import QlabError
from qlab.files.atomic import atomically
from qlab.files.directory import read_header
from qlab.files.ownership import is_sealed, sealed
from qlab.files.place import folder_for
from qlab.files.tensors import bytes_of, read, write
from qlab.process.progress import say

SUFFIX = ".statistic"
SAID = "said"  # the tensor of a file that holds JSON: what it is of, and how its numbers belong
NAMED = {kind.__name__: kind for kind in (Moment, Drifting, Sample, PerExpert)}
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A statistic of a folder.

    of: all that decides its numbers. about: where they came from, for people. bytes: of its file.
    used: when it was last written or read, in seconds since 1970.
    """

    path: Path
    of: Mapping[str, Any]
    about: Mapping[str, Any]
    bytes: int
    used: float


class Shelf:
    """The statistics in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, of: Mapping[str, Any]) -> Any:
        """The state of a statistic, or None where there is none that vouches for itself.

        A damaged file is named on stderr, and never used.
        """
        path = self._file(of)
        if not path.exists():
            return None
        try:
            said, numbers = _read(path)
            if said["of"] != _plain(of):
                raise QlabError(f"{path} is a statistic of something else")
            if said["sha256"] != _digest(numbers):
                raise QlabError(f"{path} holds other numbers than were written")
            state = _state(said["form"], numbers)
        except QlabError as error:
            say(f"{error}; that statistic is observed again")
            return None
        with suppress(OSError):  # pruned at this moment, or not ours
            os.utime(path)
        return state

    def put(self, of: Mapping[str, Any], state: Any, about: Mapping[str, Any]) -> None:
        """Keep the state of a statistic."""
        numbers: list[Tensor] = []
        form = _form(state, numbers)
        said = sealed({"of": _plain(of), "about": about, "form": form, "sha256": _digest(numbers)})
        text = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        tensors = [(SAID, text), *((str(i), t) for i, t in enumerate(numbers))]
        folder_for("statistics", self.folder)
        atomically(self._file(of), partial(write, tensors=tensors))

    def listed(self) -> tuple[list[Kept], list[Path]]:
        """The statistics of the folder, and the files that are damaged. Their numbers are not
        read."""
        kept, damaged = [], []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                said, size = _said(path), path.stat()
            except FileNotFoundError:  # pruned at this moment
                continue
            except QlabError:
                damaged.append(path)
                continue
            kept.append(
                Kept(
                    path=path,
                    of=said["of"],
                    about=said["about"],
                    bytes=size.st_size,
                    used=size.st_mtime,
                )
            )
        return kept, damaged

    def _file(self, of: Mapping[str, Any]) -> Path:
        text = json.dumps(_plain(of), sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}{SUFFIX}"


def _plain(of: Mapping[str, Any]) -> Any:
    """An identity as it is read back."""
    return json.loads(json.dumps(of))


# ------------------------------------------------------------------ files
def _said(path: Path) -> dict[str, Any]:
    """What a file says of itself; refuses one whose words or size are not what was written."""
    stored = read_header(path)
    if SAID not in stored:
        raise QlabError(f"{path} does not say which statistic it is")
    try:
        said = json.loads(bytes(bytes_of(read(SAID, stored[SAID]))))
    except ValueError as error:
        raise QlabError(f"{path} does not say which statistic it is") from error
    if not is_sealed(said):
        raise QlabError(f"{path} was changed after it was written")
    return said


def _read(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    said, stored = _said(path), read_header(path)
    names = map(str, range(len(stored) - 1))
    return said, [read(name, stored[name]) for name in names if name in stored]


def _digest(numbers: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in numbers:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


# ------------------------------------------------------------------ states
def _form(state: Any, numbers: list[Tensor]) -> Any:
    """A state as JSON, whose tensors are numbers in a list."""
    if isinstance(state, Tensor):
        numbers.append(state)
        return {"tensor": len(numbers) - 1}
    if isinstance(state, tuple):
        kind = type(state).__name__
        assert type(state) is NAMED.get(kind, tuple), kind
        parts = state.states if isinstance(state, PerExpert) else state
        return {kind: [_form(part, numbers) for part in parts]}
    assert isinstance(state, PLAIN), type(state)
    return {"value": state}


def _state(form: Mapping[str, Any], numbers: Sequence[Tensor]) -> Any:
    """The inverse of `_form`."""
    ((kind, content),) = form.items()
    if kind == "tensor":
        return numbers[content]
    if kind == "value":
        return content
    parts = tuple(_state(part, numbers) for part in content)
    if kind == PerExpert.__name__:
        return PerExpert(parts)
    return NAMED[kind](*parts) if kind in NAMED else parts
