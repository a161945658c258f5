"""Statistics that lie in the offload folder while parts of the windows are summed, and then until a
step asks for them."""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.statistic import Elsewhere, PerExpert
from qlab.errors import Unreadable
from qlab.files.atomic import unwritable
from qlab.files.directory import reading
from qlab.files.offload import scratch
from qlab.files.tensors import bytes_of
from qlab.process.sendable import Place, flat_of, packed, unpacked

STRIP = 1 << 22  # numbers that are read at once
Receive = Callable[[BufferedReader, Place], Tensor]


def _read(file: BufferedReader, place: Place) -> Tensor:
    flat = torch.empty(place.nbytes, dtype=torch.uint8, device="cpu")
    if file.readinto(bytes_of(flat)) < place.nbytes:
        raise Unreadable(f"{file.name} was cut while it was in use; start again with --resume")
    return place.of(flat.to(place.device))


def _added(file: BufferedReader, place: Place, tensor: Tensor) -> Tensor:
    """The sum of a tensor and what is read, in the memory of the tensor where both are laid out
    alike."""
    own, flat = flat_of(tensor)
    if own != place:
        return _read(file, place).add_(tensor)
    for strip in flat.view(place.dtype).split(STRIP):
        strip += _read(file, replace(place, sizes=strip.shape, axes=(0,), expanded=strip.shape))
    return place.of(flat)


class Away(MutableMapping[Any, Any]):
    """Values whose tensors lie in files. Each is read anew when it is asked for, laid out as it was
    and on its device. The files go with the mapping, and with what `lying` gives.

    offload: the folder that a user named.
    """

    def __init__(self, offload: str | Path) -> None:
        self._folder = scratch("statistics", offload)
        self._words: dict[Any, list[tuple[bytes, int]]] = {}  # of each expert, or of one
        self._each: dict[Any, Any] = {}
        self._files: dict[Any, Path] = {}
        self._numbers = count()  # of files; one that was deleted gives its number to no other

    def __setitem__(self, key: Any, value: Any) -> None:
        if key not in self._files:
            self._files[key] = Path(self._folder.name) / f"{next(self._numbers)}.bin"
        file = self._files[key]
        self._words[key], self._each[key] = [], None
        states = [value]
        if isinstance(value, PerExpert):
            states, self._each[key] = list(value.states), value.each
        with unwritable(file), file.open("wb") as out:
            for state in states:
                words, tensors = packed(state)
                self._words[key].append((words, out.tell()))
                for flat in tensors:
                    out.write(bytes_of(flat))

    def __getitem__(self, key: Any) -> Any:
        states = tuple(self.read(key, i) for i in range(len(self._words[key])))
        each = self._each[key]
        return states[0] if each is None else PerExpert(states, each)

    def add(self, key: Any, state: Any) -> None:
        """Add a state to a value of the same form, number by number. It is summed in the memory of
        the state, to which a strip of the file is read at a time."""
        states = state.states if isinstance(state, PerExpert) else (state,)
        sums = tuple(self._onto(key, i, one) for i, one in enumerate(states))
        self[key] = PerExpert(sums, state.each) if isinstance(state, PerExpert) else sums[0]

    def _onto(self, key: Any, expert: int, state: Any) -> Any:
        """The sum of the state of one expert, or of all, and what lies there."""
        if state is None:  # the expert is another rank's
            return None
        tensors = (part for part in pytree.tree_leaves(state) if isinstance(part, Tensor))
        lying = self.read(key, expert, lambda file, place: _added(file, place, next(tensors)))
        both = lambda mine, other: other if isinstance(other, Tensor) else mine + other
        return pytree.tree_map(both, state, lying)

    def read(self, key: Any, expert: int = 0, receive: Receive | None = None) -> Any:
        """A value, or the state of one expert. receive: gives each tensor, which comes next in the
        file; by default what is read."""
        words, start = self._words[key][expert]
        path = self._files[key]
        with reading(path), path.open("rb") as file:
            file.seek(start)
            return unpacked(words, partial(receive or _read, file))

    def lying(self, key: Any) -> Any:
        """A value as it lies, which is read when it is asked for; of experts each by itself."""
        each = self._each[key]
        if each is None:
            return _Lying(self, key)
        return PerExpert(_Experts(self, key, len(self._words[key])), each)

    def __delitem__(self, key: Any) -> None:
        del self._words[key], self._each[key]
        self._files.pop(key).unlink()

    def __contains__(self, key: object) -> bool:  # without reading the value
        return key in self._words

    def __iter__(self) -> Iterator[Any]:
        return iter(self._words)

    def __len__(self) -> int:
        return len(self._words)


@dataclass(frozen=True, eq=False)
class _Lying(Elsewhere):
    """A value that lies away."""

    away: Away
    key: Any

    def read(self) -> Any:
        return self.away[self.key]


class _Experts(Sequence):
    """The states of all experts, each of which is read when it is asked for."""

    def __init__(self, away: Away, key: Any, experts: int):
        self.away, self.key, self.experts = away, key, experts

    def __len__(self) -> int:
        return self.experts

    def __getitem__(self, expert: Any) -> Any:
        if not 0 <= expert < self.experts:
            raise IndexError(expert)
        return self.away.read(self.key, expert)
