"""What several ranks send each other for a block, from shapes alone: the statistics on their way to
the ranks that read them, and the codes that owners tell all others."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.running import keys_of, select
from qlab.algebra.spec import Int, Spec, with_scale_dtype
from qlab.algebra.stats import name_of
from qlab.algebra.transform import Stage, Transform
from qlab.algebra.views import Gauged, WholeBlock
from qlab.driver.duration import SQUARED
from qlab.driver.foreseen import FP32
from qlab.driver.observe import Key
from qlab.driver.owners import BY_EXPERT, Owners, experts_of, turns
from qlab.driver.parts import Parts


class Moved(NamedTuple):
    """Bytes that all ranks send, and those that reach the rank which gets most of them."""

    sent: float = 0.0
    received: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """A block among ranks.

    Args:
        graph: Its program; weights are not needed.
        shapes: Site -> the shape [..., o, k] of its weight.
        owner: The ranks that solve and turn its sites.
        stages: The steps.
        parts: Those of the windows, over which statistics are summed.
        ranks: Their number.
        dtype: That of scales, where a spec leaves it open.
    """

    graph: ModuleGraph
    shapes: Mapping[Site, Sequence[int]]
    owner: Owners
    stages: Transform
    parts: Parts
    ranks: int
    dtype: torch.dtype

    def statistics(self) -> Moved:
        """The second moments of all inputs: part by part to the first rank that reads them, as
        totals to others."""
        received: Counter[int] = Counter()
        for key, first in self._squared().items():
            *experts, _, k = self.shapes[first]
            state = _State(FP32 * k**2, prod(experts), self.ranks, received)
            at: set[int] = set()
            for stage in self.stages:
                if key not in keys_of(stage, self.graph):
                    continue
                turning = turns(stage, self.graph, self.owner, key[0])
                for rank in sorted(turning.keys() - at):
                    if at:
                        state.told(min(at), rank)
                    else:
                        state.summed(rank, self.parts)
                    at.add(rank)
                if isinstance(stage.view, Gauged):  # it turns the statistic too
                    at = {*turning}
        return Moved(sum(received.values()), max(received.values(), default=0))

    def codes(self) -> Moved:
        """Codes with their scales and zero points, as they are before they are packed: of each
        owner to all others. A step that refines codes makes them once more."""
        made: Counter[int] = Counter()
        specs: dict[Site, Spec] = {}
        for stage in self.stages:
            refines = isinstance(stage.view, WholeBlock) and stage.view.by_weight is not None
            for site in select(stage, self.graph).sites:
                if stage.spec is not None and not site.router:
                    specs[site] = stage.spec
                elif not refines or site not in specs:
                    continue
                for rank, numbers in self._made(stage, site, specs[site]):
                    made[rank] += numbers
        least = min(made.values()) if len(made) == self.ranks else 0
        whole = sum(made.values())
        return Moved(whole * (self.ranks - 1), whole - least)

    def _made(self, stage: Stage, site: Site, spec: Spec) -> Iterator[tuple[int, int]]:
        """Rank -> the bytes of what it makes of a site."""
        spec, shape = with_scale_dtype(spec, self.dtype), torch.Size(self.shapes[site])
        assert spec.scale_dtype is not None
        of_tile = spec.scale_dtype.itemsize
        if isinstance(spec, Int) and not spec.symmetric:
            of_tile += spec.zero_dtype.itemsize
        scales = prod(spec.tile.scales_shape(shape)) * of_tile
        whole = shape.numel() * spec.code_dtype.itemsize + scales
        for rank, paths in turns(stage, self.graph, self.owner, site.source).items():
            if paths is not None and site.path not in paths:
                continue
            if rank != BY_EXPERT:
                yield rank, whole
                continue
            for owner in range(min(self.ranks, shape[0])):
                yield owner, whole // shape[0] * experts_of(owner, shape[0], self.ranks)

    def _squared(self) -> dict[Key, Site]:
        """The second moments that are observed, each with the first site of its input."""
        first = {site.source: site for site in reversed(self.graph.code.sites)}
        keys = {key for stage in self.stages for key in keys_of(stage, self.graph)}
        squared = [key for key in keys if name_of(key[1]) in SQUARED and key[0] in first]
        return {key: first[key[0]] for key in squared}


@dataclass(frozen=True)
class _State:
    """A statistic of each of so many experts, or of one plain input. nbytes: of one. received: the
    bytes that reach each rank, to which its moves are added."""

    nbytes: int
    experts: int
    ranks: int
    received: Counter[int]

    def summed(self, to: int, parts: Parts) -> None:
        """The parts of all ranks, on their way to one of them or to those that own experts."""
        for rank in range(min(self.ranks, self.experts)) if to == BY_EXPERT else [to]:
            count = self._experts_at(rank) if to == BY_EXPERT else self.experts
            others = parts.count - len(range(rank, parts.count, self.ranks))
            self.received[rank] += self.nbytes * count * others

    def told(self, source: int, to: int) -> None:
        """The total, on its way from one rank, or those that own experts, to another."""
        if to != BY_EXPERT:
            kept = self._experts_at(to) if source == BY_EXPERT else 0
            self.received[to] += self.nbytes * (self.experts - kept)
            return
        for rank in range(min(self.ranks, self.experts)):
            if rank != source:
                self.received[rank] += self.nbytes * self._experts_at(rank)

    def _experts_at(self, rank: int) -> int:
        return experts_of(rank, self.experts, self.ranks)
