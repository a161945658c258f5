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
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from qlab.algebra.statistic import PerExpert, here
from qlab.algebra.stats import Drifting, Moment, Sample
from qlab.errors import QlabError
from qlab.files.atomic import atomically
from qlab.files.directory import Seen, read_header, reading
from qlab.files.ownership import is_sealed, sealed
from qlab.files.place import folder_for
from qlab.files.tensors import OpenFiles, bytes_of, read, write
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

    def get(self, of: Mapping[str, Any], owns: Callable[[int], bool] = lambda expert: True) -> Any:
        """The state of a statistic, or None where there is none that vouches for itself.

        A damaged file is named on stderr, and never used. owns: of which experts the state is kept
        in memory; that of others is None.
        """
        path = self._file(of)
        if not path.exists():
            return None
        try:
            said = _said(path)
            if said["of"] != _plain(of):
                raise QlabError(f"{path} is a statistic of something else")
            form = _owned(said["form"], owns)
            state = _state(form, _numbers(path, said["sha256"], set(_places(form))))
        except QlabError as error:
            say(f"{error}; that statistic is observed again")
            return None
        with suppress(OSError):  # pruned at this moment, or not ours
            os.utime(path)
        return state

    def put(self, of: Mapping[str, Any], state: Any, about: Mapping[str, Any]) -> None:
        """Keep the state of a statistic. Those of experts are asked for one by one."""
        folder_for("statistics", self.folder)
        tensors = _tensors({"of": _plain(of), "about": about}, state)
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
class _InUse(OpenFiles):
    """Files whose times change whenever somebody uses them. Whether one is still what its header
    says is shown by the hash of its numbers."""

    @contextmanager
    def at(self, path: Path, seen: Seen, start: int) -> Iterator[IO[bytes]]:
        with reading(path), path.open("rb") as file:
            file.seek(start)
            yield file


def _said(path: Path) -> dict[str, Any]:
    """What a file says of itself; refuses one whose words or size are not what was written."""
    stored = read_header(path)
    if SAID not in stored:
        raise QlabError(f"{path} does not say which statistic it is")
    try:
        said = json.loads(bytes(bytes_of(read(SAID, stored[SAID], _InUse()))))
    except ValueError as error:
        raise QlabError(f"{path} does not say which statistic it is") from error
    if not is_sealed(said):
        raise QlabError(f"{path} was changed after it was written")
    return said


def _numbers(path: Path, sha256: str, wanted: Collection[int]) -> dict[int, Tensor]:
    """Those numbers of a file that are wanted, in memory; all of them are read. Refuses others than
    were written."""
    digest, stored, found = hashlib.sha256(), read_header(path), dict[int, Tensor]()
    for i in range(len(stored) - 1):
        if str(i) in stored:
            tensor = read(str(i), stored[str(i)], _InUse())
            _update(digest, tensor)
            if i in wanted:
                found[i] = tensor
    if digest.hexdigest() != sha256:
        raise QlabError(f"{path} holds other numbers than were written")
    return found


def _tensors(said: Mapping[str, Any], state: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file: the numbers of a state, each let go of before the next one is asked
    for, and behind them what the file says of itself."""
    digest, places = hashlib.sha256(), count()

    def form(state: Any) -> Generator[tuple[str, Tensor], None, dict[str, Any]]:
        """A state as JSON, whose tensors are numbers in a list."""
        state = here(state)
        if isinstance(state, Tensor):
            place = next(places)
            _update(digest, state)
            yield str(place), state
            return {"tensor": place}
        if isinstance(state, tuple):
            kind, forms = type(state).__name__, []
            assert type(state) is NAMED.get(kind, tuple), kind
            for part in state.states if isinstance(state, PerExpert) else state:
                forms.append((yield from form(part)))
                del part
            return {kind: forms}
        assert isinstance(state, PLAIN), type(state)
        return {"value": state}

    formed = yield from form(state)
    words = json.dumps(sealed({**said, "form": formed, "sha256": digest.hexdigest()}))
    yield SAID, torch.frombuffer(bytearray(words.encode()), dtype=torch.uint8)


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(bytes_of(tensor))


# ------------------------------------------------------------------ states
def _owned(form: Mapping[str, Any], owns: Callable[[int], bool]) -> Mapping[str, Any]:
    """The form of a state, in which experts that are not owned have none."""
    if PerExpert.__name__ not in form:
        return form
    states = form[PerExpert.__name__]
    return {PerExpert.__name__: [s if owns(e) else {"value": None} for e, s in enumerate(states)]}


def _places(form: Mapping[str, Any]) -> Iterator[int]:
    """The places of a state's tensors among the numbers of its file."""
    ((kind, content),) = form.items()
    if kind == "tensor":
        yield content
    elif kind != "value":
        for part in content:
            yield from _places(part)


def _state(form: Mapping[str, Any], numbers: Mapping[int, Tensor]) -> Any:
    """The state of a form."""
    ((kind, content),) = form.items()
    if kind == "tensor":
        return numbers[content]
    if kind == "value":
        return content
    parts = tuple(_state(part, numbers) for part in content)
    if kind == PerExpert.__name__:
        return PerExpert(parts)
    return NAMED[kind](*parts) if kind in NAMED else parts
