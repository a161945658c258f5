"""The hidden states of the unquantized model in front of each block, made when somebody reads them.

What the unquantized model computes does not depend on how its blocks are solved. So a block whose
statistics are there needs no states, and a process that solves some blocks runs those before them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from qlab.driver.batches import push
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
    """

    def __init__(
        self, skeleton: Skeleton, calls: Sequence[Mapping[str, Call]], carries: Sequence[Carry]
    ) -> None:
        self.skeleton, self.calls, self.carries = skeleton, calls, carries
        self.paths = list(skeleton.blocks)
        self.made = {0}  # blocks in front of which the states are there
        self.asked: set[int] = set()  # blocks that read more than the first batch

    def entering(self, index: int) -> Entering:
        """The batches that enter a block."""
        return Entering(self.calls, self.paths[index], _Reached(self, index), self.skeleton.device)

    def leaving(self, index: int) -> Iterator[Carry]:
        """Where the states that leave a block go; nowhere where the block itself needed none, since
        the one behind it hardly will."""
        if index in self.asked and index + 1 < len(self.carries):
            yield self.carries[index + 1]
            self._made(index + 1)

    def to(self, index: int) -> Carry:
        """The states in front of a block, made from those in front of the nearest block before."""
        for i in range(max(i for i in self.made if i <= index), index):
            path = self.paths[i]
            graph = load_block(self.skeleton, path, self.calls[0][path], decoded=True)
            leaving = push(graph, self.entering(i)())
            self.carries[i + 1].write(flat(leaving, self.skeleton.dtype))
            del graph, leaving  # lets go of the block before the next one is loaded
            self._made(i + 1)
        return self.carries[index]

    def _made(self, index: int) -> None:
        """Note that states are there. Those in front of the block before are let go of, unless it
        is the first, of whose states all others can be made."""
        self.made.add(index)
        if index > 1:
            self.made.discard(index - 1)
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
        self.states.asked.add(self.index)
        return self.states.to(self.index).at(first, count)
