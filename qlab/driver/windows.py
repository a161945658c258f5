"""The windows of a pass of a bind among ranks, and gradients summed over all of them in one order.

    .grad += ((part 0 + part 1) + part 2) + ...      a part's gradient is the sum over its windows

What the parts are depends on the windows alone (`qlab.driver.parts`), so the sums are the same bits
for any number of ranks, and for one process.
"""

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from qlab.driver.owners import owners
from qlab.driver.parts import Parts
from qlab.driver.ranks import Ranks
from qlab.errors import QlabError
from qlab.process.ranks import told

T = TypeVar("T")


@dataclass(frozen=True)
class Pass:
    """The windows of one pass through a model, and which rank does what for them.

    The rank that runs a window through the segments follows from its place in the pass, so that a
    pass over few windows keeps many ranks busy. The head and the loss of a window are always run by
    one rank, its home, which follows from the window's number: a loss may keep what it needs of it.

    Args:
        numbers: the windows, in the order of the pass.
        count: how many windows there are in all.
        ranks: those that divide them.
    """

    numbers: Sequence[int]
    count: int
    ranks: Ranks

    @cached_property
    def parts(self) -> list[list[int]]:
        """The places in the pass that one rank runs, part by part."""
        parts = Parts(len(self.numbers))
        return [parts.numbers(part, parts.count) for part in range(parts.count)]

    @cached_property
    def homes(self) -> list[list[int]]:
        """The places in the pass by the part of all windows in which their windows are."""
        parts = Parts(self.count)
        numbers = [set(parts.numbers(part, parts.count)) for part in range(parts.count)]
        return [[p for p, i in enumerate(self.numbers) if i in of_part] for of_part in numbers]

    @cached_property
    def own(self) -> list[int]:
        """The places in the pass that this rank runs, in their order."""
        return [place for part in _of(self.parts, self.ranks) for place in part]

    @cached_property
    def at_home(self) -> list[int]:
        """The places in the pass whose windows are at home here."""
        return [place for part in _of(self.homes, self.ranks) for place in part]

    def brought_home(self, values: Mapping[int, T]) -> dict[int, T]:
        """Place -> a value, from the ranks that run the windows to their homes."""
        return self._moved(values, _rank_of(self.parts, self.ranks), self._home)

    def brought_back(self, values: Mapping[int, T]) -> dict[int, T]:
        """Place -> a value, from the homes of windows to the ranks that run them."""
        return self._moved(values, self._home, _rank_of(self.parts, self.ranks))

    def all_told(self, values: Mapping[int, T]) -> list[T]:
        """The values of all places, on every rank. values: of those that this one runs."""
        runs = _rank_of(self.parts, self.ranks)
        places = range(len(self.numbers))
        return [self.ranks.told(values.get(p), by=runs[p]) for p in places]  # type: ignore[misc]

    def agreed(self, values: Mapping[int, Any]) -> list[Any]:
        """The plain values of all places, on every rank. Every rank raises the first error among
        them. values: those of windows that are at home here."""
        own = {place: _sendable(value, self.ranks) for place, value in values.items()}
        known: dict[int, Any] = {}
        for theirs in self.ranks.all_told(own):
            known |= theirs
        known |= values
        found = [known[place] for place in range(len(self.numbers))]
        for value in found:
            if isinstance(value, Exception):
                raise value
        return found

    @cached_property
    def _home(self) -> Mapping[int, int]:
        return _rank_of(self.homes, self.ranks)

    def _moved(
        self, values: Mapping[int, T], source: Mapping[int, int], to: Mapping[int, int]
    ) -> dict[int, T]:
        arrived = {}
        for place in range(len(self.numbers)):
            value = self.ranks.sent(values.get(place), source[place], to[place])
            if to[place] == self.ranks.rank:
                arrived[place] = value
        return arrived  # type: ignore[return-value]


def _of(parts: Sequence[T], ranks: Ranks) -> Sequence[T]:
    """The parts of this rank."""
    return parts[ranks.rank :: ranks.world]


def _rank_of(parts: Sequence[Sequence[int]], ranks: Ranks) -> dict[int, int]:
    """Place -> the rank that has its part."""
    return {place: i % ranks.world for i, part in enumerate(parts) for place in part}


def tried(places: Iterable[int], work: Callable[[int], Any]) -> dict[int, Any]:
    """Place -> what the work gives for it, or the error that it raised."""
    found: dict[int, Any] = {}
    for place in places:
        try:
            found[place] = work(place)
        except Exception as error:  # whatever a loss raises
            found[place] = error
    return found


def _sendable(value: Any, ranks: Ranks) -> Any:
    """A value or error as other ranks can hold it: an error that they could not, by its text."""
    if ranks.world == 1 or not isinstance(value, Exception):
        return value
    try:
        return pickle.loads(pickle.dumps(value))
    except Exception:  # whatever such an error does there
        return QlabError(f"rank {ranks.rank}: {told(value)}")


# ------------------------------------------------------------------ gradients
def variables_of(values: Iterable[Any]) -> list[Tensor]:
    """The tensors that gather gradients in `.grad` and of which others were computed, in an order
    that follows from the computation.

    Args:
        values: tensors, among whatever else.
    """
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    for t in values:
        if not isinstance(t, Tensor) or not t.requires_grad:
            continue
        if t.grad_fn is None:
            found[id(t)] = t
            continue
        pending = [t.grad_fn]
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None:
                found[id(variable)] = variable
            pending += [before for before, _ in node.next_functions if before is not None]
    return list(found.values())


def summed(
    variables: Sequence[Tensor],
    parts: Sequence[Sequence[int]],
    ranks: Ranks,
    run: Callable[[Sequence[int]], None],
) -> None:
    """Run the parts of this rank, and add to `.grad` of variables what all ranks' parts add there.

    Each variable has one owner, which adds the parts in their order and tells all ranks the sum.

    Args:
        variables: the same on every rank, in one order.
        parts: all of them, of which rank r of w has r, r + w, r + 2 w, ...
        ranks: those that run them.
        run: runs backward for the windows of a part.
    """
    _refuse_unlike(variables, ranks)
    before = [v.grad for v in variables]
    of_owner: dict[int, list[int]] = {}
    for i, rank in owners({i: v.numel() for i, v in enumerate(variables)}, ranks.world).items():
        of_owner.setdefault(rank, []).append(i)
    totals: dict[int, Tensor] = {}
    for first in range(0, len(parts), ranks.world):
        for v in variables:
            v.grad = None
        if first + ranks.rank < len(parts):
            run(parts[first + ranks.rank])
        for source in range(min(ranks.world, len(parts) - first)):
            for owner, own in sorted(of_owner.items()):
                part = [variables[i].grad for i in own] if source == ranks.rank else None
                for i, gradient in zip(own, ranks.sent(part, source, owner) or ()):
                    _add(totals, i, gradient)
    for owner, own in sorted(of_owner.items()):
        sums = ranks.told([totals.pop(i, None) for i in own], by=owner)
        for i, total in zip(own, sums):
            earlier = before[i]
            if total is not None:
                variables[i].grad = total if earlier is None else earlier + total
            else:
                variables[i].grad = earlier


def _refuse_unlike(variables: Sequence[Tensor], ranks: Ranks) -> None:
    shapes = ranks.all_told([tuple(v.shape) for v in variables])
    other = next((rank for rank, theirs in enumerate(shapes) if theirs != shapes[0]), None)
    if other is not None:
        raise QlabError(
            f"a bind that is divided among ranks learns tensors {shapes[other]} on rank {other}, "
            f"and {shapes[0]} on rank 0; change segments alike on all of them"
        )


def _add(totals: dict[int, Tensor], i: int, gradient: Tensor | None) -> None:
    if gradient is not None:
        totals[i] = totals[i] + gradient if i in totals else gradient
