"""The samples of a block that no rank has room for. Each rank learns the weights that it owns, and
lends them to the others, window by window.

    of a round of windows, one on each rank        forward: W of each site, from its owner to all
                                                   backward: W once more, then the gradients of the
                                                   round's windows to the owner, in their order

So the sums are those of one process. The unquantized block is sharded (`qlab.driver.sharded`), and
what leaves it is computed once, before anything is learned.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.block import Block, OfWindows
from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.leaf import Fetched, FetchedStack, dense, of_expert
from qlab.driver.learning import BlockSamples, leaving_states
from qlab.driver.owners import owners
from qlab.driver.parts import Parts
from qlab.driver.ranks import Ranks
from qlab.driver.sharded import shape_of


def learners(
    shapes: Mapping[Site, Sequence[int]], ranks: int, fused: bool
) -> dict[int, list[Site]]:
    """Rank -> the sites that it learns, by the numbers in their weights.

    Args:
        shapes: Site -> the shape of its weight.
        ranks: Their number.
        fused: Whether sites of an input share a scale, so that one rank learns them.
    """
    units = {site: site.source if fused else site.path for site in shapes}
    costs: dict[str, int] = {}
    for site, unit in units.items():
        costs[unit] = costs.get(unit, 0) + prod(shapes[site])
    owner, found = owners(costs, ranks), dict[int, list[Site]]()
    for site, unit in units.items():
        found.setdefault(owner[unit], []).append(site)
    return found


def see_reference(samples: BlockSamples, ranks: Ranks) -> None:
    """Compute what leaves the unquantized block, once, of the windows at home on each rank. All
    ranks run as many windows, since they gather the weights together."""
    if samples.left is not None:  # empty on a rank without windows
        return
    samples.left = {}
    parts = Parts(samples.count)
    at = [parts.numbers(rank, ranks.world) for rank in range(ranks.world)]
    for place in range(max(map(len, at))):
        own = at[ranks.rank][place : place + 1]
        call, state = samples.reference[own[0] if own else 0]
        with torch.no_grad():
            states = leaving_states(samples.graph, call, state)
        samples.left.update(dict.fromkeys(own, states))


class Sharing(BlockSamples):
    """The samples of a block whose weights have several owners.

    Args:
        samples: those of the block, behind `see_reference`.
        ranks: all of them.
        segment: the block, with all sites of the step.
    """

    def __init__(self, samples: BlockSamples, ranks: Ranks, segment: ModuleGraph):
        vars(self).update(vars(samples))
        self.ranks, self.segment = ranks, segment
        self.round: Sequence[int] = ()  # a window for each rank
        self.real = 0  # how many of them count; behind these a rank runs one so as to take part
        self.homes = Parts(self.count)

    def wanted(self, i: int) -> Tensor:
        """What should leave the block of this rank's window of the round. All ranks ask for
        theirs."""
        left, found = self.left, dict[int, Tensor]()
        assert left is not None
        for rank, window in enumerate(self.round):
            home = self.homes.rank_of(window, self.ranks.world)
            target = left[window][0] if home == self.ranks.rank else None
            arrived = self.ranks.sent(target, home, rank)
            if arrived is not None:
                found[window] = arrived
        return found[i]

    def each(
        self, work: OfWindows, block: Block, leaves: Mapping[str, Any], indices: Sequence[int]
    ) -> Iterator[Any]:
        """What the work yields of each window, without gradients; behind the last one those of this
        rank's weights, summed over all windows."""
        self.ranks.told((work, list(indices)))
        return self._in_rounds(work, leaves, indices)

    def _in_rounds(
        self, work: OfWindows, leaves: Mapping[str, Any], indices: Sequence[int]
    ) -> Iterator[Any]:
        rank, world = self.ranks.rank, self.ranks.world
        owner = {
            path: by for by, paths in enumerate(self.ranks.all_told([*leaves])) for path in paths
        }
        lent = {
            site.path: Lent(self, site, owner[site.path], leaves.get(site.path))
            for site in self.segment.sites
            if site.path in owner
        }
        rounds = [indices[first : first + world] for first in range(0, len(indices), world)]
        own = [windows[rank] if rank < len(windows) else indices[0] for windows in rounds]
        found = work(Block(segment=self.segment, samples=self, stats={}), lent, own)
        for windows in rounds:
            self.real = len(windows)
            self.round = [*windows, *[indices[0]] * (world - self.real)]
            value = next(found)
            for number in range(self.real):
                yield self.ranks.told(value, by=number)
        sums = {path: loan.summed for path, loan in lent.items() if loan.summed is not None}
        if sums:
            yield 0.0, sums

    def follow(self) -> None:
        """Take part in what the others learn, with no weight of one's own."""
        while (task := self.ranks.told(None)) is not None:
            work, indices = task
            deque(self._in_rounds(work, {}, indices), maxlen=0)

    def done(self) -> None:
        """Let those go on that follow."""
        self.ranks.told(None)


class Lent(FetchedStack):
    """A weight [..., o, k] that one rank learns, as all ranks multiply with it.

    Args:
        sharing: the samples, which know the windows of a round.
        site: where the weight is.
        owner: the rank that learns it.
        leaf: the weight, there; None elsewhere.
    """

    grad = None  # it goes to the owner as soon as it is there

    def __init__(self, sharing: Sharing, site: Site, owner: int, leaf: Any):
        self.sharing, self.owner, self.leaf = sharing, owner, leaf
        self.shape = torch.Size(shape_of(sharing.segment, site))
        self.summed: Tensor | None = None
        self._anchor: Tensor | None = None

    def requires_grad_(self) -> "Lent":
        """Ask for its gradients."""
        self._anchor = torch.zeros((), dtype=torch.float32, requires_grad=True)
        return self

    def dense(self, dtype: torch.dtype | None = None, expert: int | None = None) -> Tensor:
        """The weight, or one expert of it, as all ranks ask for it."""
        if self._anchor is None or not torch.is_grad_enabled():
            return self.fetched(dtype, expert)
        return _Fetch.apply(self._anchor, self, dtype, expert)

    def fetched(self, dtype: torch.dtype | None, expert: int | None) -> Tensor:
        """The same without gradients."""
        leaf = self.leaf
        if leaf is not None:
            leaf = dense(leaf if expert is None else of_expert(leaf, expert), dtype).detach()
        return self.sharing.ranks.told(leaf, by=self.owner)

    def gather(self, gradient: Tensor, expert: int | None) -> None:
        """Add the gradients of the round's windows, in their order, on the owner."""
        ranks = self.sharing.ranks
        for rank in range(self.sharing.real):
            own = gradient if rank == ranks.rank else None
            theirs = ranks.sent(own, rank, self.owner)
            if theirs is not None and ranks.rank == self.owner:
                self._add(theirs.to(self.leaf.dtype), expert)

    def _add(self, gradient: Tensor, expert: int | None) -> None:
        if expert is None:
            self.summed = gradient if self.summed is None else self.summed + gradient
            return
        if self.summed is None:
            self.summed = torch.zeros(self.shape, dtype=gradient.dtype, device=gradient.device)
        self.summed[expert] += gradient

    def of_expert(self, expert: int) -> "LentExpert":
        return LentExpert(self, expert)

    def bits(self) -> float:
        return 32.0 * self.shape.numel()


class LentExpert(Fetched):
    """One expert [o, k] of a weight that is lent."""

    def __init__(self, whole: Lent, expert: int):
        self.whole, self.expert, self.shape = whole, expert, whole.shape[1:]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """As of `Lent`."""
        return self.whole.dense(dtype, self.expert)

    def bits(self) -> float:
        return 32.0 * self.shape.numel()


for kind in (Lent, LentExpert):
    pytree.register_pytree_node(kind, lambda leaf: ([], leaf), lambda parts, leaf: leaf)


class _Fetch(torch.autograd.Function):
    """A lent weight, whose gradient goes back to its owner."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, lent: Lent, dtype: torch.dtype | None, expert: int | None
    ) -> Tensor:
        ctx.lent, ctx.expert = lent, expert
        return lent.fetched(dtype, expert).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        ctx.lent.gather(grads[0], ctx.expert)
        return None, None, None, None
