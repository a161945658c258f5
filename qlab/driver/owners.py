"""Which rank solves what: one owner for each weight or group of weights, chosen by cost alone, so
that every rank and every plan chooses alike."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

from qlab.algebra.graph import Code, ModuleGraph, Site
from qlab.algebra.groups import chained
from qlab.algebra.running import keys_of, select
from qlab.algebra.transform import Stage, unchanged
from qlab.algebra.views import EachWeight, Gauged

K = TypeVar("K", bound=Hashable)
BY_EXPERT = -1  # in the place of a rank: each has what belongs to its experts


def owners(costs: Mapping[K, float], ranks: int) -> dict[K, int]:
    """What is to be solved -> the rank that solves it, in the order of `costs`.

    The most expensive goes first, each to the rank that has least so far; equal costs go in their
    order, equal ranks by their number. The slowest rank has at most 4/3 of the least possible
    (Graham 1969).
    """
    loads, owner = [0.0] * ranks, dict.fromkeys(costs, 0)
    for key in sorted(costs, key=lambda key: -costs[key]):
        owner[key] = min(range(ranks), key=loads.__getitem__)
        loads[owner[key]] += costs[key]
    return owner


def solving_cost(o: int, k: int) -> float:
    """What a weight [o, k] costs to solve: a factor of k^3, and columns of o that each reach k."""
    return float(k) ** 3 + float(o) * k**2


def site_owners(
    shapes: Mapping[Site, Sequence[int]], ranks: int, one_by_one: bool, fused: bool
) -> dict[str, int]:
    """Site path -> the rank that solves it.

    Args:
        shapes: Site of one block -> [..., o, k].
        ranks: Their number.
        one_by_one: Whether only sites of one input are solved at a time, so that each input's are
            shared anew.
        fused: Whether sites of an input share a scale, so that one rank solves them.
    """
    groups: dict[str, dict[tuple[str, str], float]] = {}
    units: dict[str, tuple[str, str]] = {}
    for site, (*experts, o, k) in shapes.items():
        unit = units[site.path] = (site.source, "" if fused else site.path)
        costs = groups.setdefault(site.source if one_by_one else "", {})
        costs[unit] = costs.get(unit, 0.0) + prod(experts) * solving_cost(o, k)
    owner = {unit: rank for costs in groups.values() for unit, rank in owners(costs, ranks).items()}
    return {path: owner[unit] for path, unit in units.items()}


@dataclass(frozen=True, kw_only=True)
class Owners:
    """Path of a site -> the rank that solves it, and the one that turns its input
    (`qlab.algebra.gauge`), which searches for a scale."""

    solves: Mapping[str, int]
    turns: Mapping[str, int]


def owners_of(
    code: Code, shapes: Mapping[Site, Sequence[int]], ranks: int, one_by_one: bool, fused: bool
) -> Owners:
    """The owners of a block's sites. Inputs that turn one after the other have one owner.

    code: the block's program. Others as of `site_owners`.
    """
    cost = {site.path: float(prod(shape)) * shape[-1] for site, shape in shapes.items()}
    chains = chained(code)
    turning = owners({chain: sum(cost[path] for path in chain) for chain in chains}, ranks)
    return Owners(
        solves=site_owners(shapes, ranks, one_by_one, fused),
        turns={path: rank for chain, rank in turning.items() for path in chain},
    )


def is_divided(stage: Stage) -> bool:
    """Whether ranks divide the weights of a step, or the inputs that it turns."""
    view = stage.view
    return isinstance(view, EachWeight) or (isinstance(view, Gauged) and view.pattern is None)


def _is_by_expert(stage: Stage) -> bool:
    return isinstance(stage.view, EachWeight) and stage.view.by_expert


def expert_owner(expert: int, ranks: int) -> int:
    """The rank that owns an expert: all of a site cost the same."""
    return expert % ranks


def experts_of(rank: int, experts: int, ranks: int) -> int:
    """How many of so many experts a rank owns."""
    return len(range(rank, experts, ranks))


def turns(
    stage: Stage, graph: ModuleGraph, owner: Owners, source: str | None = None
) -> dict[int, frozenset[str] | None]:
    """Rank -> the sites that it runs a step on, of one source or of all; None: whatever the step
    sees."""
    if not is_divided(stage):
        return {0: graph.selected}
    alone = isinstance(stage.view, EachWeight)
    paths: dict[int, set[str]] = {}
    for site in select(stage, graph).sites:
        if source in (None, site.source):
            by_expert = site.route and stage.needs and _is_by_expert(stage)
            at = BY_EXPERT if by_expert else (owner.solves if alone else owner.turns)[site.path]
            paths.setdefault(at, set()).add(site.path)
    return {at: frozenset(of_rank) for at, of_rank in paths.items()}


def read_by(
    stages: Sequence[Stage], key: tuple[str, Any], graph: ModuleGraph, owner: Owners
) -> list[int]:
    """The ranks at which the first step that needs a statistic reads it, the smallest number
    first."""
    for stage in stages:
        if stage.apply is not unchanged and key in keys_of(stage, graph):
            return sorted(turns(stage, graph, owner, key[0]))
    return [0]
