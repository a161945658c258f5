"""Which rank solves what: one owner for each weight or group of weights, chosen by cost alone, so
that every rank and every plan chooses alike."""

from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import TypeVar

from qlab.algebra.graph import Site

K = TypeVar("K", bound=Hashable)


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
