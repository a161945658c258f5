"""The states between blocks as a file of one dtype holds them: one tensor after the other, what is
of another dtype by its bits."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qlab.driver.batches import Batch
from qlab.errors import QlabError
from qlab.model.calls import Call, State


def stored_shapes(
    calls: Sequence[Mapping[str, Call]], path: str, dtype: torch.dtype
) -> list[tuple[int, ...]]:
    """The shapes of what enters a block, batch by batch, as `flat` makes them; refuses what has
    fewer bits than `dtype`."""
    shapes = []
    for call in calls:
        for t in call[path].entering:
            octets = t.shape[-1] * t.itemsize if t.ndim else 0
            if octets == 0 or octets % dtype.itemsize:
                raise QlabError(
                    f"{path} is called with a tensor {tuple(t.shape)} of {t.dtype} that another "
                    f"block made, which is not kept among hidden states of {dtype} while "
                    "calibrating; use a method without data (rtn)"
                )
            shapes.append((*t.shape[:-1], octets // dtype.itemsize))
    return shapes


def flat(states: Iterable[State], dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensors of all states, one by one."""
    for state in states:
        yield from (t if t.dtype == dtype else t.contiguous().view(dtype) for t in state)


class States(Protocol):
    """Where the tensors of all states that enter a block are read, such as a `Carry`."""

    def read(self) -> Iterator[Tensor]:
        """All of them, one by one."""

    def at(self, first: int, count: int) -> list[Tensor]:
        """Some of them, from number `first` on."""


@dataclass(frozen=True)
class Entering:
    """The batches that enter a block, read from where their states lie.

    Args:
        calls: What every block is called with, batch by batch.
        path: The block.
        states: The states, as `flat` lays them out.
        device: Where the block runs.
    """

    calls: Sequence[Mapping[str, Call]]
    path: str
    states: States
    device: torch.device

    def __call__(self) -> Iterator[Batch]:
        """All batches in their order, one of which is in memory at a time."""
        tensors = self.states.read()
        for call in self.calls:
            yield call[self.path], self._state(call[self.path], tensors)

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, i: int) -> Batch:
        """One batch, read by itself."""
        entering = [len(call[self.path].entering) for call in self.calls[: i + 1]]
        tensors = self.states.at(sum(entering[:-1]), entering[-1])
        return self.calls[i][self.path], self._state(self.calls[i][self.path], iter(tensors))

    def _state(self, call: Call, tensors: Iterator[Tensor]) -> State:
        """The inverse of `flat`, of one batch."""
        return tuple(next(tensors).view(like.dtype).to(self.device) for like in call.entering)
