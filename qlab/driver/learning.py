"""The samples of one block for steps that see it as a whole (`qlab.algebra.block`)."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qlab.algebra.block import Block, OfWindows
from qlab.algebra.graph import ModuleGraph
from qlab.algebra.interpret import outputs_of
from qlab.algebra.transform import Stage, Transform
from qlab.algebra.views import WholeBlock
from qlab.data.calibration import generator
from qlab.driver.batches import Batch
from qlab.driver.ranks import Ranks
from qlab.model.calls import Call, State

KEPT = 1 << 30  # bytes of targets that are kept; further ones are computed when they are asked for
SEED = 0


def learns(stage: Stage) -> bool:
    """Whether a stage sees a whole block."""
    return isinstance(stage.view, WholeBlock)


def split(recipe: Transform) -> tuple[Transform, Transform]:
    """The stages before the first that sees a whole block, and those from it on."""
    first = next((i for i, stage in enumerate(recipe) if learns(stage)), len(recipe))
    return recipe[:first], recipe[first:]


def numbers_for(path: str, name: str) -> torch.Generator:
    """Random numbers of a block for one purpose, the same in every run and in its plan."""
    return generator(SEED, f"{path}/{name}")


class Windows(Protocol):
    """Batches of one window each, any of which may be asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Batch: ...


class BlockSamples:
    """What goes through one block, window by window (`block.Samples`).

    Args:
        graph: The unquantized block.
        streams: The batches that enter it, of one window each: in the model that is calibrated, and
            in the unquantized one, where that is another.
    """

    def __init__(self, graph: ModuleGraph, streams: Sequence[Any]):
        self.graph = graph
        self.batches: Windows = streams[0]
        self.reference: Windows = streams[-1]
        self.targets: dict[int, Tensor] = {}
        self.kept = 0
        self.left: dict[int, State] | None = None  # what leaves the unquantized block, if computed

    @property
    def count(self) -> int:
        return len(self.batches)

    def entering(self, i: int) -> Tensor:
        _, state = self.batches[i]
        return state[0].clone()

    def wanted(self, i: int) -> Tensor:
        if i in self.targets:
            return self.targets[i]
        with torch.no_grad():
            target = _leaving(self.graph, self.reference[i])
        if self.kept + target.nbytes <= KEPT:
            self.targets[i] = target
            self.kept += target.nbytes
        return target

    def leaving(self, segment: ModuleGraph, i: int) -> Tensor:
        return _leaving(segment, self.batches[i])

    def reference_leaving(self, windows: Iterable[int]) -> Iterator[State]:
        """The states that leave the unquantized block in the unquantized model, of these windows.
        Targets that are kept are not computed again."""
        for i in windows:
            if self.left is not None:
                yield self.left[i]
                continue
            call, state = self.reference[i]
            kept = i in self.targets and len(state) == 1
            yield (self.targets[i],) if kept else leaving_states(self.graph, call, state)

    def generator(self, name: str) -> torch.Generator:
        return numbers_for(self.graph.path, name)

    def each(
        self, work: OfWindows, block: Block, leaves: Mapping[str, Any], indices: Sequence[int]
    ) -> Iterator[Any]:
        return work(block, leaves, indices)


class Leading(BlockSamples):
    """The samples of a block that several ranks have. Rank 0 learns; the others do the work of some
    windows for it, until it is done.

    rank 0: learn --work, leaves, windows--> its windows, and those of others in their order
    others:                                  their windows           until there is no more work

    segment: the block, with the sites of the step.
    """

    def __init__(self, samples: BlockSamples, ranks: Ranks, segment: ModuleGraph):
        vars(self).update(vars(samples))
        self.ranks, self.segment = ranks, segment

    def each(
        self, work: OfWindows, block: Block, leaves: Mapping[str, Any], indices: Sequence[int]
    ) -> Iterator[Any]:
        self.ranks.told((work, leaves, list(indices)))
        return self._in_order(work, block, leaves, indices)

    def _in_order(
        self, work: OfWindows, block: Block, leaves: Mapping[str, Any], indices: Sequence[int]
    ) -> Iterator[Any]:
        """What the work yields of each window, on rank 0; the others give it theirs."""
        rank, world = self.ranks.rank, self.ranks.world
        own = work(block, leaves, indices[rank::world])
        for number in range(len(indices)):
            owner = number % world
            found = self.ranks.sent(next(own) if owner == rank else None, owner, 0)
            if self.ranks.is_first:
                yield found

    def follow(self) -> None:
        """Do the work that rank 0 asks for."""
        block = Block(segment=self.segment, samples=self, stats={})
        while True:
            task = self.ranks.told(None)
            if task is None:
                return
            work, leaves, indices = task
            deque(self._in_order(work, block, leaves, indices), maxlen=0)

    def done(self) -> None:
        """Let the others go on."""
        self.ranks.told(None)


def _leaving(graph: ModuleGraph, batch: Batch) -> Tensor:
    """The hidden states that leave the segment."""
    return leaving_states(graph, *batch)[0]


def leaving_states(graph: ModuleGraph, call: Call, state: State) -> State:
    """The states that leave the segment of a window."""
    return call.leaving(state, outputs_of(graph, *call.inputs(state)))
