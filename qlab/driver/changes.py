"""What a step changed of a block and its statistics, as one rank tells it to the others."""

from collections.abc import Mapping
from dataclasses import fields, replace
from enum import Enum
from typing import Any

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.stats import Stats, name_of
from qlab.driver.observe import Key


def named(key: Key) -> tuple[str, str]:
    """A statistic's key as all ranks have it."""
    return key[0], name_of(key[1])


def made_by(
    before: ModuleGraph, after: ModuleGraph, given: Stats, kept: Stats
) -> tuple[dict[str, Any], list[tuple[str, str]], list[tuple[str, str]]]:
    """What a step changed: of the graph, and the names of statistics that moved or are gone."""
    moved = [named(key) for key, state in kept.items() if state is not given.get(key)]
    gone = [named(key) for key in given if key not in kept]
    return _changes(before, after), moved, gone


class _Target(Enum):
    """A target that need not be told: every rank has it."""

    LEAF = "the leaf of its name before the step"


def _changes(before: ModuleGraph, after: ModuleGraph) -> dict[str, Any]:
    """Field -> (its entries that are other values, the names of those that are gone)."""
    found: dict[str, Any] = {}
    for field in fields(ModuleGraph):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if isinstance(old, Mapping) and old is not new:
            other = {k: v for k, v in new.items() if k not in old or not _same(v, old[k])}
            found[field.name] = other, [k for k in old if k not in new]
    if "targets" in found:  # those of weights that were plain until now
        other, gone = found["targets"]
        known = {k: _Target.LEAF for k, v in other.items() if v is before.params.get(k)}
        found["targets"] = {**other, **known}, gone
    return found


def _same(a: Any, b: Any) -> bool:
    """Whether two entries are the same value, or equal notes."""
    return a is b or (isinstance(a, dict) and isinstance(b, dict) and a == b)


def changed(graph: ModuleGraph, changes: Mapping[str, Any]) -> ModuleGraph:
    """The graph behind the changes that another rank told."""
    new: dict[str, Any] = {}
    for name, (other, gone) in changes.items():
        entries: Mapping[str, Any] = getattr(graph, name)
        other = {k: graph.params[k] if v is _Target.LEAF else v for k, v in other.items()}
        new[name] = {**{k: v for k, v in entries.items() if k not in gone}, **other}
    return replace(graph, **new)
