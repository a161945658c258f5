"""What the statistics of a block take in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from qlab.algebra.graph import Code, Site, by_source
from qlab.data.calibration import Data
from qlab.driver.batches import batch_tokens
from qlab.driver.foreseen import FP32, state_bytes
from qlab.driver.job import Job
from qlab.driver.parts import Parts

# statistic -> the matrices of its state, each as large as a second moment or less
BESIDE = {"held_out": 2, "received": 1, "stream_drift": 1, "stream_held_out": 1}
BESIDE |= {"drift_fitted": 1, "stream_fitted": 1}
# statistic -> the matrices of a batch that are added to its state, which does not grow by itself
LIFTED = {**BESIDE, "drift": 1}


@dataclass(frozen=True, kw_only=True)
class Sums:
    """The sums over all batches in a block.

    Args:
        job: What is done to it.
        path: Its name.
        code: Its program.
        weights: Site -> the shape [..., o, k] of its weight.
        experts_at_once: Of how many experts statistics are held at a time, or None: of all.
        divided: Whether several ranks make them.
        lie: Whether they lie in files until they are read.
    """

    job: Job
    path: str
    code: Code
    weights: Mapping[Site, torch.Size]
    experts_at_once: int | None
    divided: bool
    lie: bool

    @cached_property
    def source_by_source(self) -> bool:
        """Whether statistics are observed for one source at a time."""
        return self.job.source_by_source(self.code)

    @property
    def streams(self) -> int:
        """Of hidden states: the reference's run beside the quantized model's, or not."""
        return 2 if self.job.runs_reference else 1

    @cached_property
    def sources(self) -> list[Site]:
        """The first site of every source."""
        return [sites[0] for sites in by_source(self.code.sites).values()]

    @property
    def widths(self) -> list[int]:
        """The input channels k of every source."""
        return [self.weights[site][-1] for site in self.sources]

    @property
    def widest_of_sources(self) -> list[int]:
        """The numbers of a matrix [k, k] for each weight of a source, and of two more."""
        groups = by_source(self.code.sites).values()
        return [(len(sites) + 2) * self.weights[sites[0]][-1] ** 2 for sites in groups]

    @property
    def square(self) -> int:
        """Bytes of the largest second moment [k, k], 0 where none is observed."""
        return FP32 * max(k * seen for k, seen in zip(self.widths, self._observed)) ** 2

    @property
    def moments_kk(self) -> list[int]:
        """Bytes of the second moment of every source, of as many experts as are held at once."""
        return [
            FP32 * k**2 * self._experts_held(site) * seen
            for site, k, seen in zip(self.sources, self.widths, self._observed)
        ]

    @cached_property
    def _observed(self) -> list[bool]:
        """Of every source whether its second moment is observed."""
        asking = [stage for stage in self.job.recipe if "second_moment" in stage.needs]
        return [
            any(stage.touches(f"{self.path}.{s.path}", s) for stage in asking for s in sites)
            for sites in by_source(self.code.sites).values()
        ]

    @cached_property
    def statistics(self) -> int:
        """Bytes of the statistics that are held at once."""
        own = self._own_states
        held = max(own) if self.source_by_source else sum(own)
        # a batch that is added to a state takes as much as a step that reads it
        return self._second_moments + held + self.read_in_turn

    @property
    def read_in_turn(self) -> int:
        """Bytes of the statistics that a step holds which reads one when it asks for it; second
        moments are in the workspace that it declares."""
        return 2 * max(self._own_states)

    def added(self, data: Data) -> int:
        """Bytes of sums that grow beside the totals of second moments: that of a part of several
        batches, in whose place totals may be offloaded, and what is observed of a batch before it
        is added. Second moments grow in their place."""
        batches = len(data.batches(batch_tokens([self.job.recipe])))
        if batches == 1:
            return 0
        totals, one = self._second_moments, max(self.moments_kk)
        of_batch = one * max(
            (n for name, n in LIFTED.items() if name in self.job.statistics), default=0
        )
        is_away = self.job.offload is not None
        if self.divided:  # what another rank sends is added to the total
            sent = self._of_each_source * one
            return sent if is_away else totals if Parts(batches).size == 1 else totals + sent
        return of_batch if is_away or Parts(batches).size == 1 else totals + of_batch

    @property
    def _own_states(self) -> list[int]:
        """Bytes of the states of statistics that are a recipe's own, for every source: as large as
        those that no token reached."""
        sizes: list[int] = []
        for sites in by_source(self.code.sites).values():
            k, experts = self.weights[sites[0]][-1], self._experts_held(sites[0])
            needs = {
                need
                for stage in self.job.recipe
                for site in sites
                if stage.touches(f"{self.path}.{site.path}", site)
                for need in stage.needs
                if not isinstance(need, str)
            }
            sizes.append(experts * sum(state_bytes(need, k) for need in needs))
        return sizes

    @property
    def _second_moments(self) -> int:
        """Bytes of the second moments that are held at once. The drift, which is observed beside
        the reference, is as large as a second moment, and both are observed again of the tokens
        that are held out. What the attention adds to it is as large too, and the drift of the
        stream [o, k] is counted as if it was."""
        if not self.square:
            return 0
        held = max(self.moments_kk) if self.source_by_source else sum(self.moments_kk)
        return self._of_each_source * held

    @property
    def _of_each_source(self) -> int:
        """The matrices that a source has, each as large as its second moment."""
        return self.streams + sum(BESIDE[name] for name in BESIDE if name in self.job.statistics)

    def _experts_held(self, site: Site) -> int:
        if not site.route:
            return 1
        experts = self.weights[site][0]
        return min(experts, self.experts_at_once or experts)
