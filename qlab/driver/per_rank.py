"""The memory of each of several ranks that share a run: a whole block, the sums of its own windows,
and the statistics that it owns."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from qlab.algebra.bind import Bind
from qlab.algebra.graph import ModuleGraph, by_source
from qlab.algebra.running import keys_of
from qlab.algebra.stats import name_of
from qlab.algebra.transform import Stage
from qlab.data.calibration import Data
from qlab.driver.duration import SQUARED
from qlab.driver.expense import batches_of, share_of
from qlab.driver.foreseen import FP32, Measured, of_rank
from qlab.driver.job import Job
from qlab.driver.memory import predict_memory
from qlab.driver.owners import BY_EXPERT, Owners, owners_of, turns
from qlab.driver.sites import Sites
from qlab.model.skeleton import Skeleton


@dataclass(frozen=True)
class _Share:
    """As many windows as the rank with most of them has, by their sizes alone."""

    whole: Data
    share: float

    @property
    def count(self) -> int:
        return round(self.whole.count * self.share)

    @property
    def longest(self) -> int:
        return self.whole.longest

    def batches(self, tokens: int) -> list[Mapping[str, Tensor]]:
        """Those of all ranks."""
        return self.whole.batches(tokens)

    def describe(self) -> dict[str, object]:
        """The data of all ranks."""
        return self.whole.describe()


def memory_of_rank(
    job: Job,
    skeleton: Skeleton,
    sites: Sites,
    measured: Measured,
    ranks: int,
    experts_at_once: int | None,
    is_sharded: bool = False,
    process: int | None = None,
) -> dict[str, int]:
    """Bytes at the widest moment of the rank that needs most, by what holds them.

    Beside what one process holds for the windows of this rank (`predict_memory`) there are the sums
    over all windows of the inputs that it owns, and those of the gradients of a segment. Every rank
    embeds all windows before the first block. is_sharded: whether each rank has some rows of a
    block's weights. process: what the largest process takes before all this; None stands for this
    one.
    """
    predict = partial(
        predict_memory,
        skeleton=skeleton,
        sites=sites,
        experts_at_once=experts_at_once,
        sharded=ranks if is_sharded else 1,
        process=process,
        divided=ranks > 1,
    )
    alone = predict(job, measured=measured)
    if ranks == 1 or job.data is None:
        return alone
    own = replace(job, data=_Share(job.data, share_of(batches_of(job), ranks)))
    of_ranks = {
        place: of_rank(of, ranks)
        for place, of in measured.items()
        if of is not None and _is_divided(job.recipe[place])
    }
    memory = predict(own, measured={**measured, **of_ranks})
    if "learned" in memory and of_ranks:
        summed = max(of.summed for of in of_ranks.values())
        memory["sums of gradients"] = 2 * summed // len(sites.codes)
    if "statistics" in memory:
        is_away = job.offload is not None and skeleton.device.type == "cpu"
        owned = _owned(job, sites, ranks, experts_at_once)
        held = _largest(sites) if is_away else max(owned, default=0)
        memory["owned statistics"] = held
    candidates = [memory, *([alone] if "carry" in alone else [])]
    return max(candidates, key=lambda moment: sum(moment.values()))


def _is_divided(stage: Stage) -> bool:
    return isinstance(stage, Bind) and stage.divided


def _largest(sites: Sites) -> int:
    """The bytes of the largest second moment, of which one is in memory on its way."""
    inside = [sites.shapes[f"{path}.{s.path}"] for path, c in sites.codes.items() for s in c.sites]
    return max((FP32 * shape[-1] ** 2 for shape in inside), default=0)


def _owned(job: Job, sites: Sites, ranks: int, experts_at_once: int | None) -> Iterator[int]:
    """Of each block, the bytes of the second moments that the rank with most of them owns."""
    squared = sum(name in SQUARED for name in job.statistics)
    outer = any(stage.spec is not None and stage.spec.outer for stage in job.recipe)
    for path, code in sites.codes.items():
        shapes = {site: sites.shapes[f"{path}.{site.path}"] for site in code.sites}
        one_by_one = job.in_order(code)
        owner = owners_of(code, shapes, ranks, one_by_one, outer)
        graph = ModuleGraph(code, {}, path)
        held = [[0] * ranks]  # of inputs that are held at one time
        for source, (first, *_) in by_source(code.sites).items():
            *experts, _, k = shapes[first]
            if one_by_one:
                held.append([0] * ranks)
            count = min(experts[0], experts_at_once or experts[0]) if experts else 1
            readers = _readers(job, graph, owner, source)
            for rank in range(ranks):
                parts = [-(-count // ranks)] if BY_EXPERT in readers else []
                whole = [count] if rank in readers else []
                held[-1][rank] += squared * FP32 * k**2 * max([*parts, *whole], default=0)
        yield max(map(max, held))


def _readers(job: Job, graph: ModuleGraph, owner: Owners, source: str) -> set[int]:
    """The ranks that read second moments of a source, at some step."""
    reading = [
        stage
        for stage in job.recipe
        if any(key[0] == source and name_of(key[1]) in SQUARED for key in keys_of(stage, graph))
    ]
    return {rank for stage in reading for rank in turns(stage, graph, owner, source)}
