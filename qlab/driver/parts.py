"""The batches of a pass in contiguous parts, and which rank has which of them.

part p = batches p s, ..., (p + 1) s - 1          rank r of w has the parts r, r + w, r + 2 w, ...

Statistics are summed over each part from nothing, and the parts are added in their order. What the
parts are depends on the number of batches alone, so the sums are the same bits for any number of
ranks, and for one process.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qlab.driver.batches import Batch, Batches
from qlab.driver.ranks import Ranks
from qlab.files.carry import Carry
from qlab.model.calls import State

MOST = 16  # parts; further ranks have no windows and own sites alone


@dataclass(frozen=True)
class Parts:
    """batches: their number."""

    batches: int

    @property
    def size(self) -> int:
        """How many batches a part has, the last of which may have fewer."""
        return max(1, -(-self.batches // MOST))

    @property
    def count(self) -> int:
        """The number of parts."""
        return -(-self.batches // self.size)

    def numbers(self, rank: int, world: int) -> list[int]:
        """The batches of a rank, in their order."""
        return [i for i in range(self.batches) if self.rank_of(i, world) == rank]

    def rank_of(self, batch: int, world: int) -> int:
        """The rank that has a batch."""
        return batch // self.size % world


def most_of(batches: int, ranks: int) -> int:
    """The number of batches of the rank that has most of them."""
    return max(len(Parts(batches).numbers(rank, ranks)) for rank in range(min(ranks, 2)))


class Own:
    """The batches of this rank; by their numbers, those of all ranks.

    Args:
        entering: all batches that enter a block.
        numbers: of those of this rank.
    """

    def __init__(self, entering: Sequence[Batch], numbers: Sequence[int]):
        self.entering, self.numbers = entering, numbers

    def __call__(self) -> Iterator[Batch]:
        return (self.entering[i] for i in self.numbers)

    def __len__(self) -> int:
        return len(self.entering)

    def __getitem__(self, i: int) -> Batch:
        return self.entering[i]


def own(entering: Any, ranks: Ranks) -> Batches:
    """The batches that this rank sees, of all that enter a block."""
    if ranks.world == 1:
        return entering
    return Own(entering, Parts(len(entering)).numbers(ranks.rank, ranks.world))


def collected(states: Iterator[State], parts: Parts, ranks: Ranks) -> Iterator[State]:
    """The states of all batches in their order, on rank 0; the others give it theirs, and nothing.

    states: of the batches of this rank.
    """
    for batch in range(parts.batches):
        owner = parts.rank_of(batch, ranks.world)
        state = next(states) if owner == ranks.rank else None
        whole = ranks.sent(state, owner, 0)
        if ranks.is_first:
            assert whole is not None
            yield whole


def write_states(carry: Carry, tensors: Iterator[Tensor], ranks: Ranks) -> None:
    """Write the states that leave a block on rank 0; the others give it theirs."""
    if ranks.is_first:
        carry.write(tensors)
    else:
        deque(tensors, maxlen=0)
