"""The bytes that each rank has of a block's weights: all of them, or where they are sharded
(`qlab.driver.sharded`) some rows, and what it learns."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from qlab.algebra.graph import Code, Site
from qlab.algebra.views import WholeBlock
from qlab.driver.foreseen import FP32, leaf_bytes
from qlab.driver.job import Job
from qlab.driver.owners import site_owners
from qlab.driver.sharded import rounded_sites
from qlab.driver.sharing import learners
from qlab.model.loading import original_dtype
from qlab.model.skeleton import Skeleton
from qlab.process.shards import sent_bytes

GATHERED = 2  # times a matrix on its way: the rows as they arrive, and in order
# Copies in fp32 of what a step learns: of all weights at once the weight, parameters, gradients and
# what the rounding keeps for the way back; of one, whose gradient goes back through the rounding,
# what lies between. Of a block of seven weights auto_round held 8.5 in all, qat 9.5; of one stack
# of experts auto_round held 13.
LEARNED, PASSED = 9, 4
LENT = 3  # a weight, its gradient, and that of another rank's window
Moment = Mapping[str, int]  # what holds memory -> its bytes, at one moment of a run


@dataclass(frozen=True)
class Shares:
    """The weights of a block.

    Args:
        job: what is done to it.
        skeleton: the model.
        path: its name.
        code: its program.
        ranks: over how many they are sharded; with 1 they are not.
    """

    job: Job
    skeleton: Skeleton
    path: str
    code: Code
    ranks: int

    @cached_property
    def sites(self) -> list[Site]:
        """Those whose weights are sharded."""
        return rounded_sites(self.job.recipe, self.path, self.code)

    def held(self, streams: int) -> Moment:
        """What each rank holds throughout: the block for each stream; or all that is not sharded,
        rows of the rest, and the weights that it solves at one time."""
        if self.ranks == 1:
            return {"block": streams * leaf_bytes(self.skeleton, self.path)}
        return {
            "block": leaf_bytes(self.skeleton, self.path, [s.weight or "" for s in self.sites]),
            "rows of the block": sum(map(self._rows, self.sites)),
            "own weights": max(map(self._bytes, self._owned(self.sites)), default=0),
        }

    def gathered(self) -> Iterator[Moment]:
        """What is on its way to all ranks, or was just read and is cut."""
        if self.ranks == 1:
            return
        pieces = self.skeleton.names.block_names(self.path)
        read = [
            self._bytes([site])
            for site in self.sites
            if len(pieces[site.weight or ""]) == 1  # experts too, where the files hold them as one
        ]
        yield {"gathered": max(GATHERED * FP32 * self._matrix, *read, 0)}

    def learned(self, shapes: Mapping[Site, Sequence[int]]) -> int:
        """The bytes that learning takes on the rank where it takes most. shapes: those of the
        weights that are learned."""
        of_ranks = [[prod(shapes[site]) for site in own] for own in self.learners(shapes).values()]
        return max(FP32 * (LEARNED * sum(own) + PASSED * max(own)) for own in of_ranks)

    def lent(self) -> Moment:
        """What a rank holds of others while it learns."""
        return {} if self.ranks == 1 else {"lent": LENT * FP32 * self._matrix}

    def dtype(self, site: Site) -> torch.dtype:
        """That of a weight as it is sharded."""
        pieces = self.skeleton.names.block_names(self.path)[site.weight or ""]
        return original_dtype(self.skeleton, pieces)

    def sent(self, site: Site) -> int:
        """The bytes that all ranks send each other when they gather a weight."""
        *experts, rows, columns = self._shape(site)
        of_rank = sent_bytes(rows, columns * self.dtype(site).itemsize, self.ranks)
        return prod(experts) * of_rank * self.ranks

    def learners(self, shapes: Mapping[Site, Sequence[int]]) -> dict[int, list[Site]]:
        """Rank -> the sites that it learns. shapes: of those that are learned."""
        return learners(shapes, self.ranks, self._fused)

    @property
    def _matrix(self) -> int:
        """The numbers in the largest matrix: of a weight, or of one expert."""
        return max((prod(self._shape(site)[-2:]) for site in self.sites), default=0)

    @property
    def _fused(self) -> bool:
        return any(stage.spec is not None and stage.spec.outer for stage in self.job.recipe)

    def _owned(self, sites: Sequence[Site]) -> Iterator[list[Site]]:
        """The sites that a rank solves or learns at one time."""
        shapes = {site: self._shape(site) for site in sites}
        if any(isinstance(stage.view, WholeBlock) for stage in self.job.recipe):
            yield from self.learners(shapes).values()
        one_by_one = self.job.in_order(self.code)
        owner = site_owners(shapes, self.ranks, one_by_one, self._fused)
        at_once: dict[tuple[str, int], list[Site]] = {}
        for site in sites:
            place = site.source if one_by_one else "", owner[site.path]
            at_once.setdefault(place, []).append(site)
        yield from at_once.values()

    def _rows(self, site: Site) -> int:
        """The bytes that a rank has of a weight: FSDP2 fills up the rows of the last ranks."""
        *experts, rows, columns = self._shape(site)
        return prod(experts) * -(-rows // self.ranks) * columns * self.dtype(site).itemsize

    def _bytes(self, sites: Sequence[Site]) -> int:
        return sum(prod(self._shape(site)) * self.dtype(site).itemsize for site in sites)

    def _shape(self, site: Site) -> Sequence[int]:
        """As the files hold it."""
        return self.skeleton.blocks[self.path].get_parameter(site.weight or "").shape
