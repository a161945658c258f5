"""What binds of a recipe will measure, asked before anything runs, and what that takes.

A pass backward goes through the model once forward and, segment by segment, forward and backward
again. In memory are what passes between segments for its windows, one segment with the activations
of one window, and the logits of one window.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils import _pytree as pytree

from qlab.algebra.bind import Bind, Foreseen, Outline
from qlab.algebra.graph import ModuleGraph
from qlab.algebra.running import select
from qlab.algebra.statistic import Stat
from qlab.algebra.transform import Stage
from qlab.driver.batches import in_batches
from qlab.driver.job import Job
from qlab.driver.parts import most_of
from qlab.driver.reach import specs_of
from qlab.driver.sites import Sites
from qlab.model.skeleton import Skeleton

FP32 = 4  # bytes of a number
LOGITS = 4  # of logits [l, v] in fp32 that a loss and its gradient hold
LEARNED = 4  # numbers in files for each that is learned: how far it moved, two moments, the best
BACKWARD = 2  # times forward: the work of a pass backward

# place in the recipe -> what the bind there will run; None where it does not know
Measured = Mapping[int, Foreseen | None]


def foreseen(job: Job, sites: Sites) -> Measured:
    """What each bind says that it will measure. Refuses what it cannot."""
    windows = 0 if job.data is None else len(in_batches(job.data, 1))
    return {
        i: stage.foresee(_outline(job, i, stage, sites, windows))
        for i, stage in enumerate(job.recipe)
        if isinstance(stage, Bind)
    }


def _outline(job: Job, place: int, stage: Stage, sites: Sites, windows: int) -> Outline:
    segments = [select(stage, ModuleGraph(code, {}, path)) for path, code in sites.codes.items()]
    names = [graph.where(site) for graph in segments for site in graph.sites]
    front = job.recipe[:place]
    rounded = None
    if not any(isinstance(other, Bind) and other.spec is None for other in front):
        specs = specs_of(front, sites.sites)
        rounded = {name: spec for name in names if (spec := specs[name]) is not None}
    return Outline(
        segments=segments,
        shapes={name: sites.shapes[name] for name in names},
        rounded=rounded,
        windows=windows,
    )


def passes_of(measured: Measured, windows: int) -> int:
    """The forward passes over all windows that measuring takes as much time as."""
    runs = sum(sum(runs_of(f)) for f in measured.values() if f is not None)
    return -(-runs // max(windows, 1))


def runs_of(foreseen: Foreseen) -> tuple[int, int]:
    """The runs of a window through the model that forward, and that backward, take as much time
    as."""
    # each segment is run again when its turn backward comes
    return foreseen.forward, (2 + BACKWARD) * foreseen.backward


def of_rank(foreseen: Foreseen, ranks: int) -> Foreseen:
    """What is held of a divided measurement by the rank that has most windows of it."""
    return replace(
        foreseen,
        at_once=most_of(foreseen.at_once, ranks),
        kept=most_of(foreseen.kept, ranks),
    )


def around_bytes(skeleton: Skeleton, size: int) -> int:
    """The bytes of all parameters around the blocks, in numbers of this size."""
    names = skeleton.names.outside_names()
    return size * sum(skeleton.checkpoint.shape_and_dtype(name)[0].numel() for name in names)


def leaf_bytes(skeleton: Skeleton, path: str, without: Sequence[str] = ()) -> int:
    """The leaves of a block but for some: in the dtype of the files, or in that of the activations
    where that is wider, to which they are converted where they are used."""
    widths = {
        name: max(
            skeleton.dtype.itemsize,
            *(skeleton.names.stored_dtype(piece).itemsize for piece in pieces),
        )
        for name, pieces in skeleton.names.block_names(path).items()
    }
    parameters = skeleton.blocks[path].named_parameters()
    return sum(p.numel() * widths[name] for name, p in parameters if name not in without)


def state_bytes(stat: Stat, k: int) -> int:
    """The bytes of a state of k channels."""
    with torch.device("meta"):
        state = stat.nothing(k)
    return sum(t.nbytes for t in pytree.tree_leaves(state) if isinstance(t, torch.Tensor))


@dataclass(frozen=True, kw_only=True)
class Running:
    """A model while it is measured. tokens: of a window. hidden: channels between segments."""

    skeleton: Skeleton
    segments: int
    tokens: int
    hidden: int

    def moments(self, of: Foreseen, block: int, activations: int) -> Iterator[dict[str, int]]:
        """What is held while a segment runs, and while the head does. block: the bytes of a
        segment. activations: those of one window in it, forward."""
        states = (self.segments + 2) * of.at_once + of.kept
        throughout = {
            "embeddings and head": around_bytes(self.skeleton, FP32) + self._once_more(of),
            "states between blocks": states * FP32 * self.tokens * self.hidden,
            "learned": LEARNED * FP32 * of.learned,
        }
        yield {
            **throughout,
            "block": block * of.copies,
            "activations": activations * (1 + BACKWARD if of.backward else 1),
        }
        yield {**throughout, "logits": LOGITS * FP32 * self.tokens * self._vocabulary()}

    def _once_more(self, of: Foreseen) -> int:
        """The bytes of what lies around the blocks in bfloat16, where the model runs in that."""
        narrow = of.as_stored and self.skeleton.checkpoint.running_dtype == torch.bfloat16
        return around_bytes(self.skeleton, torch.bfloat16.itemsize) if narrow else 0

    def _vocabulary(self) -> int:
        return self.skeleton.model.get_input_embeddings().get_parameter("weight").shape[0]
