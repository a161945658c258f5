"""Fold what sites' inputs are multiplied by into what produces those inputs.

A scale goes into a norm's weight or a linear's rows (`qlab.algebra.folds`), a matrix of every head
into the rows of what produces the heads' values (`qlab.algebra.groups`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.crossed import crossed, standing_between
from qlab.algebra.folds import Fold, folds, rows_move
from qlab.algebra.graph import ModuleGraph, Site, by_origin
from qlab.algebra.groups import General, groups
from qlab.algebra.online import MatMul, Multiply
from qlab.algebra.stats import Stats
from qlab.algebra.transform import Stage, Transform
from qlab.algebra.views import Folded

Act = Callable[[ModuleGraph, Tensor], Mapping[str, Any]]

__all__ = ["Fold", "absorb", "fold_scales", "folds", "rows_move"]


def fold_scales(graph: ModuleGraph) -> ModuleGraph:
    """The graph with every leading scale, and every leading matrix of heads, that a producer can
    take folded into it. The others stay at their inputs, and so do those with an operation at run
    time between (`qlab.algebra.crossed`)."""
    places = folds(graph.code)
    for origin, sites in by_origin(graph.code.sites).items():
        if origin not in places or standing_between(graph, origin):
            continue
        m_k, M_hdd = _leading_scale(graph, sites), _leading_heads(graph, origin, sites)
        if m_k is not None:
            if not (m_k == 1).all():  # rounded rows that cannot be scaled have a scale of 1
                graph = _acted(graph, places[origin].apply, m_k)
        elif M_hdd is not None:
            graph = _acted(graph, groups(graph.code)[origin].apply, M_hdd)
        else:
            continue
        online = {**graph.online, **{s.path: graph.online[s.path][1:] for s in sites}}
        graph = replace(graph, online={path: ops for path, ops in online.items() if ops})
    return graph


def _acted(graph: ModuleGraph, act: Act, M: Tensor) -> ModuleGraph:
    """The graph after M acted on a producer: on its leaves, and on what those are to be near to."""
    new = graph.update(act(graph, M))
    if not graph.targets:
        return new
    aims = act(replace(graph, params={**graph.params, **graph.targets}), M)
    targets = {name: t for name, t in aims.items() if name in graph.targets}
    return replace(new, targets={**new.targets, **targets})


def _leading_heads(graph: ModuleGraph, origin: str, sites: Sequence[Site]) -> Tensor | None:
    """The matrices [h, d, d] of the producer's heads that the inputs of all these sites are first
    multiplied by, or None where there are none."""
    leading = [graph.online.get(site.path, ())[:1] for site in sites]
    matrices = [op.M_nn for ops in leading for op in ops if isinstance(op, MatMul)]
    if len(matrices) < len(sites) or not all(torch.equal(M, matrices[0]) for M in matrices[1:]):
        return None
    group = groups(graph.code)[origin]
    return group.of_producer(matrices[0]) if isinstance(group, General) else None


def _leading_scale(graph: ModuleGraph, sites: Sequence[Site]) -> Tensor | None:
    """The positive scale that the inputs of all these sites are first multiplied by, or None where
    there is no such scale. Relu and its like let only positive scales through."""
    leading = [graph.online.get(site.path, ())[:1] for site in sites]
    scales = [op.m_k for ops in leading for op in ops if isinstance(op, Multiply)]
    if len(scales) < len(sites) or not all(torch.equal(m, scales[0]) for m in scales[1:]):
        return None
    return scales[0] if (scales[0] > 0).all() else None


def absorb() -> Transform:
    """Fold scales at inputs into what produces those inputs (a norm, the rows of a linear).

    The function stays. Matrices of every head fold into what produces the heads' values. What
    nothing can take stays at its input, and a format without a place for it refuses that. Place it
    behind `reparametrize`, as awq_scale does.

    Returns:
        A transform of one stage, which rounds nothing.

    Example:
        >>> import qlab
        >>> [(stage.name, stage.view.keeps_function) for stage in qlab.absorb()]
        [('absorb', True)]
    """

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        folded = fold_scales(graph)
        moved = {
            wire
            for origin, sites in by_origin(graph.code.sites).items()
            if any(folded.online.get(s.path) != graph.online.get(s.path) for s in sites)
            for wire in crossed(graph.code).get(origin, ())
        }
        return folded, {place: state for place, state in stats.items() if place[0] not in moved}

    return (Stage("absorb", frozenset(), run, Folded()),)
