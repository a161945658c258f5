"""Which rank solves what: one owner for each weight or group of weights, chosen by cost alone, so
that every rank and every plan chooses alike."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

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
