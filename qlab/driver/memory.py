"""How much memory a run will take, predicted from shapes alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import psutil
import torch

from qlab.algebra.graph import Code, Site, by_source
from qlab.algebra.measured import AT_ONCE_BY_H
from qlab.algebra.transform import Stage
from qlab.algebra.views import (
    EachWeight,
    EverySegment,
    Gauged,
    Uncovered,
    WholeBlock,
    WholeModelBasis,
)
from qlab.data.calibration import Data
from qlab.driver.batches import batch_tokens
from qlab.driver.foreseen import FP32, Measured, Running, around_bytes
from qlab.driver.job import Job
from qlab.driver.learning import KEPT
from qlab.driver.scores import score_bytes
from qlab.driver.shares import Moment, Shares
from qlab.driver.sites import Sites
from qlab.driver.solve import HELD
from qlab.driver.sums import Sums
from qlab.model.skeleton import Skeleton

# copies of a weight in fp32: a solver's, and while the errors of a solved weight are measured
SOLVER_COPIES, ERRORS = 5, 4
BACKWARD = 2  # times the activations of a forward pass: they are kept, and have gradients


def predict_memory(
    job: Job,
    skeleton: Skeleton,
    sites: Sites,
    experts_at_once: int | None = None,
    measured: Measured = MappingProxyType({}),
    sharded: int = 1,
    process: int | None = None,
    divided: bool = False,
) -> dict[str, int]:
    """Bytes at the widest moment of a run, by what holds them.

    The moments are: copying the weights outside the blocks, entering the first block, observing,
    solving and leaving each block, and what binds measure. experts_at_once: of how many experts
    statistics are held at a time (None: of all). sharded: the ranks over which the weights of a
    block are sharded. process: what the process takes before all this; None asks it. divided:
    whether it is one of several ranks.
    """
    process = psutil.Process().memory_info().rss if process is None else process
    moments = [_outside_the_blocks(skeleton, sites)]
    if any(isinstance(stage.view, EverySegment | WholeModelBasis) for stage in job.recipe):
        # as the files hold them, as they run, and as they are turned: first in parts, whose memory
        # malloc keeps
        sizes = skeleton.checkpoint.dtype.itemsize + skeleton.dtype.itemsize + 2 * FP32
        moments.append({"embeddings and head": around_bytes(skeleton, sizes)})
    if job.observed is not None:
        moments.append(_entering(job.observed, skeleton))
    for path, code in sites.codes.items():
        if not code.sites:  # nothing is observed or solved
            continue
        weights = {site: sites.shapes[f"{path}.{site.path}"] for site in code.sites}
        sums = Sums(
            job=job,
            path=path,
            code=code,
            weights=weights,
            experts_at_once=experts_at_once,
            divided=divided,
            lie=job.offload is not None and skeleton.device.type == "cpu",
        )
        block = _Block(
            job=job,
            path=path,
            code=code,
            weights=weights,
            size=skeleton.dtype.itemsize,
            sums=sums,
            shares=Shares(job, skeleton, path, code, sharded),
        )
        leaves = block.shares.held(block.sums.streams)
        moments += [{**leaves, **moment} for moment in block.moments()]
        moments += block.measuring(skeleton, len(sites.codes), measured)
    widest = max(moments, key=lambda moment: sum(moment.values()))
    return {"process": process, **widest}


def _measured_at_once(stage: Stage) -> int | None:
    """The numbers of a weight of which errors are measured at once; None: of all."""
    leaves = stage.view.leaves if isinstance(stage.view, EachWeight) else ""
    return AT_ONCE_BY_H if stage.spec is not None and not leaves else None


def _outside_the_blocks(skeleton: Skeleton, sites: Sites) -> Moment:
    """All weights outside the blocks, and the solver of the largest one that is rounded."""
    stored = map(skeleton.checkpoint.shape_and_dtype, skeleton.names.outside_names())
    inside = tuple(f"{path}." for path in sites.codes)
    rounded = [shape.numel() for name, shape in sites.shapes.items() if not name.startswith(inside)]
    return {
        "embeddings and head": sum(shape.numel() * dtype.itemsize for shape, dtype in stored),
        "solver": SOLVER_COPIES * FP32 * max(rounded, default=0),
    }


def _entering(data: Data, skeleton: Skeleton) -> Moment:
    """The embedding, and the hidden states of all samples."""
    embedding = skeleton.model.get_input_embeddings().get_parameter("weight")
    size = skeleton.dtype.itemsize
    return {
        "embeddings": embedding.numel() * size,
        "carry": size * data.count * embedding.shape[-1],
    }


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A block while it is observed and solved, beside its leaves.

    Args:
        job: What is done to it.
        path: Its name.
        code: Its program.
        weights: Site -> the shape [..., o, k] of its weight.
        size: Bytes of one number of the activations.
        sums: Its statistics.
        shares: What each of several ranks has of its weights.
    """

    job: Job
    path: str
    code: Code
    weights: Mapping[Site, torch.Size]
    size: int
    sums: Sums
    shares: Shares

    def moments(self) -> Iterator[Moment]:
        """What is held while the block is observed and left, and while it is solved."""
        yield from self.shares.gathered()
        if self.job.observed is not None:
            yield from self._observing(self.job.observed)
            yield from self._learning(self.job.observed)
        yield from self._solving()

    def measuring(self, skeleton: Skeleton, blocks: int, measured: Measured) -> Iterator[Moment]:
        """What is held while binds measure, with one window in this block."""
        data = self.job.data
        if data is None:
            return
        running = Running(
            skeleton=skeleton,
            segments=blocks,
            tokens=data.longest,
            hidden=self.weights[self.code.sites[0]][-1],
        )
        numbers = sum(p.numel() for p in skeleton.blocks[self.path].parameters())
        forward = self._activations_of(data.longest, FP32)
        scores = score_bytes(self.code, data.longest, 1) * FP32 // self.size
        widest = FP32 * max(self.sums.widths) ** 2
        for place, of in measured.items():
            if of is None:
                continue
            workspace = self.job.recipe[place].workspace * widest
            yield from running.moments(of, FP32 * numbers, forward + scores)
            if of.moments:
                yield {
                    "block": FP32 * numbers,
                    "statistics": FP32 * of.moments * max(self.sums.widest_of_sources),
                    "solver": SOLVER_COPIES * FP32 * self.largest + workspace,
                    "waiting": self.waiting,
                    "activations": forward + scores,
                    "codes": self.codes,
                }

    def _observing(self, data: Data) -> Iterator[Moment]:
        activations = self._activations(data, self.size) + self._scores(data)
        if self.size < FP32:  # an input is converted for its second moment
            activations += self._tokens(data) * FP32 * max(self.sums.widths)
        rounds = any(stage.spec is not None for stage in self.job.recipe)
        yield {
            "codes": self.codes if self.in_order and rounds else 0,  # of the sources before
            "statistics": self.sums.statistics + self.sums.added(data),
            "activations": activations,
            "waiting": self.waiting,
        }
        yield {
            "codes": self.codes,
            "waiting": self.waiting,
            "activations": activations + 2 * FP32 * self.largest,  # weights as they are decoded
        }
        kept = any(stage.view.keeps_function for stage in self.job.recipe)
        if self.size < FP32 and kept:  # one batch checks it in fp32
            yield {
                "statistics": self.sums.statistics,
                "activations": self._activations(data, FP32)
                + self._scores(data) * FP32 // self.size,
                "waiting": self.waiting,
            }

    def _turned_by(self, stage: Stage) -> int:
        """How many numbers a step turns at once, in the block and in the reference beside it."""
        if not self.in_order:
            return sum(self.shared)
        return max(self.shared) if stage.view.site_by_site else self.sums.streams * sum(self.shared)

    def _solving(self) -> Iterator[Moment]:
        moved = 0
        written = 0 if self.job.observed is not None else self.coded  # the block before, meanwhile
        solvers = [stage for stage in self.job.recipe if not isinstance(stage.view, Uncovered)]
        for stage in solvers:
            if isinstance(stage.view, Gauged):  # weights stay in fp32 until they are rounded
                moved += FP32 * self._turned_by(stage)
            matrices = stage.workspace if stage.needs else 0
            solving = FP32 * self._copied(SOLVER_COPIES, stage.at_once)
            solving += matrices * self.sums.square
            measuring = FP32 * self._copied(ERRORS, _measured_at_once(stage))
            statistics = self.sums.statistics
            if self.sums.lie and isinstance(stage.view, EachWeight) and stage.view.by_expert:
                statistics = self.sums.read_in_turn
                measuring += self.sums.square if "second_moment" in stage.needs else 0
            yield {
                "moved weights": moved,
                "codes": self.codes + written if stage.spec is not None else 0,
                "statistics": statistics,
                "waiting": self.waiting,
                "solver": max(solving, measuring),
            }

    def _copied(self, copies: int, at_once: int | None) -> int:
        """The numbers of the largest weight that are held in so many copies: all of them, or so
        many at once beside one copy."""
        at_once = min(at_once or self.largest, self.largest)
        return copies * at_once + (self.largest if at_once < self.largest else 0)

    def _learning(self, data: Data) -> Iterator[Moment]:
        """What steps hold that see the whole block, with one window on its way back."""
        for stage in self.job.recipe:
            if not isinstance(stage.view, WholeBlock):
                continue
            shapes = {
                site: shape
                for site, shape in self.weights.items()
                if stage.touches(f"{self.path}.{site.path}", site) and not site.router
            }
            if not shapes:
                continue
            hidden = self.weights[self.code.sites[0]][-1]
            targets = data.count * hidden * self.size
            yield {
                **self.shares.lent(),
                "learning": self.shares.learned(shapes),
                "targets": min(KEPT, targets) if self.shares.ranks == 1 else targets,
                "statistics": sum(self.sums.moments_kk) if "second_moment" in stage.needs else 0,
                "activations": BACKWARD * (self._activations(data, self.size) + self._scores(data)),
            }

    @cached_property
    def in_order(self) -> bool:
        """Whether sources are solved one after another."""
        return self.job.in_order(self.code)

    @property
    def shared(self) -> list[int]:
        """The numbers in all weights of a source, for every source."""
        return [
            sum(self.weights[site].numel() for site in sites)
            for sites in by_source(self.code.sites).values()
        ]

    @property
    def codes(self) -> int:
        """Bytes of the codes of all weights, and of the largest experts' before they are joined."""
        experts = max((w.numel() for site, w in self.weights.items() if site.route), default=0)
        return experts + self.coded

    @property
    def coded(self) -> int:
        """Bytes of the codes of all weights, as they wait to be written."""
        return sum(shape.numel() for shape in self.weights.values())

    @property
    def largest(self) -> int:
        """The numbers of the largest weight [o, k]; experts are solved one by one."""
        return max(shape[-2] * shape[-1] for shape in self.weights.values())

    @cached_property
    def waiting(self) -> int:
        """Bytes of what waits inside the block while a source is solved: the hidden states and the
        input of the widest source, of every batch."""
        data = self.job.observed
        if data is None or not self.in_order:
            return 0
        hidden = self.weights[self.code.sites[0]][-1]
        widest = max(k * self._rows(site) for site, k in zip(self.sums.sources, self.sums.widths))
        return min(HELD, self.sums.streams * data.count * self.size * (hidden + widest))

    def _rows(self, site: Site) -> int:
        """How many rows of a site's input one token is."""
        if not site.route:
            return 1
        return self.weights[site][0] if self.job.calibrate_all_experts else site.choices

    def _tokens(self, data: Data) -> int:
        """The tokens of a batch, which has one window at least."""
        return min(max(batch_tokens([self.job.recipe]), data.longest), data.count)

    def _activations(self, data: Data, size: int) -> int:
        """Bytes of a batch's activations, with `size` bytes to a number."""
        return self._activations_of(self._tokens(data), size)

    def _activations_of(self, tokens: int, size: int) -> int:
        """Those of so many tokens: an attention holds some seven tensors of the hidden size, a
        feed-forward layer two and three of the widest."""
        hidden = self.weights[self.code.sites[0]][-1]
        widest = max(max(shape[-2:]) * self._rows(site) for site, shape in self.weights.items())
        return tokens * size * (2 * hidden + max(5 * hidden, 3 * widest))

    def _scores(self, data: Data) -> int:
        """Bytes of a batch's attention scores, where the program writes them out."""
        windows = max(1, self._tokens(data) // data.longest)
        return score_bytes(self.code, data.longest, windows)
