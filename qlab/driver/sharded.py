"""A block that no rank has room for: which of its weights are sharded, and how they are asked for.

Every rank has some rows of a sharded weight (FSDP2), and all ranks gather it at once, wherever one
of them multiplies with it or solves it. So all of them run the same steps, window by window.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.block import BLOCK_IO
from qlab.algebra.graph import Code, ModuleGraph, Site
from qlab.algebra.leaf import FetchedStack
from qlab.algebra.stats import ATTENDING, COMPARING, JOINING, name_of
from qlab.algebra.transform import Stage, Transform, unchanged
from qlab.algebra.views import EachWeight, Uncovered, WholeBlock
from qlab.driver.job import Job
from qlab.driver.learning import split
from qlab.driver.ranks import Ranks
from qlab.process.shards import Shard

ELSEWHERE = ATTENDING | COMPARING | JOINING  # statistics that take more than the weights before


@dataclass(frozen=True, eq=False)
class Sharded(FetchedStack):
    """A weight as the files hold it, of which this rank has some rows.

    Args:
        ranks: those that share it.
        shards: of one matrix, or of each expert's.
        shape: [..., o, k] in every layout.
        dtype: in which the files hold it.
        turned: whether the matrices are [k, o].
        held: the dtype in which the model computes with it; None for its own.
    """

    ranks: Ranks
    shards: tuple[Shard, ...]
    shape: torch.Size
    dtype: torch.dtype
    turned: bool
    held: torch.dtype | None = None

    def of_expert(self, expert: int) -> "Sharded":
        return replace(self, shards=self.shards[expert : expert + 1], shape=self.shape[1:])

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [..., o, k], as all ranks ask for it."""
        W = self.gathered()
        assert W is not None
        W = W if self.held is None else W.to(self.held)
        return (W.mT if self.turned else W).to(dtype or W.dtype)

    def gathered(self, keep: bool = True) -> Tensor | None:
        """The weight in the layout of its program, as all ranks ask for it; None where it is not
        kept."""
        whole = None
        for e, W in enumerate(self.matrices()):  # also what is not kept: others ask for it
            if not keep:
                continue
            if len(self.shape) == 2:
                return W
            whole = W.new_empty(len(self.shards), *W.shape) if whole is None else whole
            whole[e] = W
        return whole

    def matrices(self) -> Iterator[Tensor]:
        """One matrix after the other, in the layout of the program."""
        return map(self.ranks.gathered, self.shards)

    def bits(self) -> float:
        return 8.0 * self.shape.numel() * self.dtype.itemsize


pytree.register_pytree_node(Sharded, lambda leaf: ([], leaf), lambda parts, leaf: leaf)


# ------------------------------------------------------------------ which weights
def shape_of(graph: ModuleGraph, site: Site) -> tuple[int, ...]:
    """The shape [..., o, k] of a site's weight."""
    leaf = graph.params[site.weight or ""]
    *experts, a, b = leaf.shape
    turned = isinstance(leaf, Tensor) and site.layout.endswith("k o")
    return (*experts, b, a) if turned else (*experts, a, b)


def rounded_sites(recipe: Transform, path: str, code: Code) -> list[Site]:
    """The sites of a block whose weights a recipe makes codes of: those that are sharded. Others
    are run as they are when the block is solved."""
    rounding = [stage for stage in recipe if stage.spec is not None]
    return [
        site
        for site in code.sites
        if site.weight
        and not site.router
        and any(stage.touches(f"{path}.{site.path}", site) for stage in rounding)
    ]


def can_be_sharded(job: Job, path: str, code: Code) -> bool:
    """Whether ranks can solve a block of which none has all weights.

    Steps are those that see one weight, whose inputs are solved one after another, and those that
    learn the weights of a block each by itself. No weight is of two sites, and none is sharded
    where inputs behind it are observed.
    """
    weights = [site.weight for site in code.sites if site.weight]
    return (
        job.begun is None
        and job.inputs == "quantized"
        and not job.calibrate_all_experts
        and len(set(weights)) == len(weights)
        and all(_by_weight(stage, code) for stage in job.recipe)
        and (job.observed is None or job.in_order(code))
        and _rounded_before_observed(job.recipe, path, code)
    )


def _rounded_before_observed(recipe: Transform, path: str, code: Code) -> bool:
    """Whether inputs are observed behind weights alone that are rounded. Each rank observes its own
    windows; of these ranks have unequal numbers, so they cannot gather a weight there."""
    alone, learning = split(recipe)
    if any(stage.needs - {BLOCK_IO} for stage in learning):
        return False
    in_turn = rounded_sites(alone, path, code)
    return not any(stage.needs for stage in alone) or in_turn == rounded_sites(recipe, path, code)


def _by_weight(stage: Stage, code: Code) -> bool:
    """Whether a step needs one weight at a time."""
    if stage.apply is unchanged or isinstance(stage.view, Uncovered):
        return True
    if isinstance(stage.view, WholeBlock):
        return stage.view.by_weight is not None and stage.needs == {BLOCK_IO}
    by_expert = any(site.route for site in code.sites) and bool(stage.needs)
    elsewhere = ELSEWHERE & {name_of(need) for need in stage.needs}
    return isinstance(stage.view, EachWeight) and not by_expert and not elsewhere


# ------------------------------------------------------------------ loaded
def laid(
    code: Code, recipe: Transform, path: str, ranks: Ranks
) -> Mapping[str, Callable[[Iterator[Tensor]], Any]]:
    """Leaf -> what shards it, for `load_block`."""
    sites = rounded_sites(recipe, path, code)
    return {str(site.weight): partial(_shard, site, ranks) for site in sites}


def _shard(site: Site, ranks: Ranks, matrices: Iterator[Tensor]) -> Sharded:
    shards, dtype, shape = [], torch.float32, torch.Size()
    for W in matrices:
        dtype, shape = W.dtype, W.shape
        shards.append(ranks.shard(W))
        del W
    turned = site.layout.endswith("k o")
    a, b = shape
    o, k = (b, a) if turned else (a, b)
    experts = (len(shards),) if site.layout.startswith("e") else ()
    return Sharded(
        ranks=ranks,
        shards=tuple(shards),
        shape=torch.Size([*experts, o, k]),
        dtype=dtype,
        turned=turned,
    )


def with_held(graph: ModuleGraph) -> ModuleGraph:
    """A block whose sharded weights know in which dtype the model computes with them."""
    leaves = {
        name: replace(leaf, held=graph.held.get(name))
        for name, leaf in graph.params.items()
        if isinstance(leaf, Sharded)
    }
    return replace(graph, params={**graph.params, **leaves})


# ------------------------------------------------------------------ gathered
def gathered(
    graph: ModuleGraph, turns: Mapping[int, frozenset[str] | None], rank: int
) -> ModuleGraph:
    """The block with the weights and targets dense that a rank solves. All ranks ask for it.

    turns: rank -> the sites that it solves; None: all.
    """
    params, targets = dict(graph.params), dict(graph.targets)
    for of_rank, paths in sorted(turns.items()):
        for site in graph.code.sites:
            if paths is not None and site.path not in paths:
                continue
            for leaves in (params, targets):
                leaf = leaves.get(site.weight or "")
                if not isinstance(leaf, Sharded):
                    continue
                W = leaf.gathered(keep=of_rank == rank)
                if W is not None:
                    leaves[site.weight or ""] = W
    return replace(graph, params=params, targets=targets)
