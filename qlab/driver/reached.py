"""The hidden states of the unquantized model in front of each block, made when somebody reads them.

What the unquantized model computes does not depend on how its blocks are solved. So a block whose
statistics are there needs no states, and a process that solves some blocks runs those before them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from qlab.driver.batches import push
from qlab.driver.parts import Parts, collected, own, write_states
from qlab.driver.ranks import Ranks
from qlab.driver.states import Entering, flat
from qlab.files.carry import Carry
from qlab.model.calls import Call
from qlab.model.loading import load_block
from qlab.model.skeleton import Skeleton


class Reached:
    """The states in front of every block, of which those in front of the first one are there.

    Few files of states lie beside those at a time.

    Args:
        skeleton: The model.
        calls: Batch by batch, what each block is called with.
        carries: Block by block, where its states lie once they are made.
        ranks: Those that make them together.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        calls: Sequence[Mapping[str, Call]],
        carries: Sequence[Carry],
        ranks: Ranks,
    ) -> None:
        self.skeleton, self.calls, self.carries, self.ranks = skeleton, calls, carries, ranks
        self.paths = list(skeleton.blocks)
        self.made = {0}  # blocks in front of which the states are there
        self.asked: set[int] = set()  # blocks that read more than the first batch

    def entering(self, index: int) -> Entering:
        """The batches that enter a block."""
        return Entering(self.calls, self.paths[index], _Reached(self, index), self.skeleton.device)

    def leaving(self, index: int) -> Iterator[Carry]:
        """Where the states that leave a block go; nowhere where the block itself needed none, since
        the one behind it hardly will."""
        if any(self.ranks.all_told(index in self.asked)) and index + 1 < len(self.carries):
            yield self.carries[index + 1]
            self._made(index + 1)

    def ready(self, index: int) -> None:
        """Make the states in front of a block, where they are not there, by all ranks."""
        self.made = self.ranks.told(self.made)  # rank 0 may have made some by itself
        self.to(index, self.ranks)

    def to(self, index: int, ranks: Ranks | None = None) -> Carry:
        """The states in front of a block, made from those in front of the nearest block before.
        ranks: those that make them (None: this process alone, for what it alone asks for)."""
        ranks = ranks or Ranks()
        for i in range(max(i for i in self.made if i <= index), index):
            path = self.paths[i]
            graph = load_block(self.skeleton, path, self.calls[0][path], decoded=True)
            leaving = push(graph, own(self.entering(i), ranks)())
            whole = collected(leaving, Parts(len(self.calls)), ranks)
            write_states(self.carries[i + 1], flat(whole, self.skeleton.dtype), ranks)
            ranks.told(None)  # the others read what rank 0 has written
            del graph, leaving, whole  # lets go of the block before the next one is loaded
            self._made(i + 1)
        return self.carries[index]

    def _made(self, index: int) -> None:
        """Note that states are there. Those in front of the block before are let go of, unless it
        is the first, of whose states all others can be made."""
        self.made.add(index)
        if index > 1:
            self.made.discard(index - 1)
            if self.ranks.is_first:
                self.carries[index - 1].path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Reached:
    """The states in front of one block, which are made when they are read."""

    states: Reached
    index: int

    def read(self) -> Iterator[Tensor]:
        carry = self.states.to(self.index)
        for number, batch in enumerate(carry.read()):
            # a check reads the first batch alone
            if number == 1 or len(carry.shapes) == 1:
                self.states.asked.add(self.index)
            yield batch

    def at(self, first: int, count: int) -> list[Tensor]:
        carry = self.states.to(self.index)
        if first or count == len(carry.shapes):
            self.states.asked.add(self.index)
        return carry.at(first, count)
