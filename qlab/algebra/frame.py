"""A step that chooses the basis of the hidden states between segments, for the whole model.

It sees every segment, embedding and head among them, and turns each by the same R, before any other
step. The turns between segments undo each other, so that they are in no file and cost nothing.
"""

from collections.abc import Callable
from itertools import takewhile

import torch
from torch import Tensor

from qlab.algebra.graph import Code, ModuleGraph
from qlab.algebra.groups import Nothing
from qlab.algebra.residual import Frame, Orthogonal, residual
from qlab.algebra.stats import Stats
from qlab.algebra.transform import Stage, Transform
from qlab.algebra.views import EverySegment, WholeModel
from qlab.algebra.wires import full_name
from qlab.errors import QlabError


def frame(name: str, choose: Callable[[Orthogonal], Tensor], detail: str = "") -> Transform:
    """Turn the hidden states between all segments: h -> h R.

    Args:
        name: the stage's name in plans, reports and errors.
        choose: gets what may turn (its size k, and whether R has to keep the vector of ones) and
            returns an orthogonal R [k, k], the same for every segment. R is made to keep the
            vector of ones where it has to.
        detail: settings in words.

    Returns:
        A transform of one stage, which comes first in a recipe.
    """

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        group = turning(graph.code, name, graph.path)
        left_out = [graph.where(site) for site in graph.code.sites if site not in graph.sites]
        if left_out:
            raise QlabError(
                f"{name} turns all weights of a segment, and its rule leaves out "
                f"{', '.join(left_out)}; give the whole model one rule"
            )
        taken = [wire for wire in ("enter", "leave") if wire in graph.inserts]
        if taken:
            raise QlabError(
                f"{name} turns what is at {full_name(graph.path, taken[0])}, where an operation is "
                "already; put it first in the recipe"
            )
        R = choose(group)
        R = (keeping_ones(R) if group.centred else R).to(_device(graph))
        others = {source for source, _ in stats} - {site.source for site in graph.code.sites}
        return group.apply(graph, R), {key: s for key, s in stats.items() if key[0] in others}

    return (Stage(name, frozenset(), run, EverySegment(), detail=detail),)


def turning(code: Code, name: str, where: str) -> Orthogonal:
    """What may turn the hidden states of a segment; refuses a segment that nothing may turn."""
    group = residual(code)
    if isinstance(group, Nothing):
        raise QlabError(
            f"the residual stream of {where or 'the model around its blocks'} cannot turn: "
            f"{group.reason}; leave {name} out, rotate_heads and rotate_online remain"
        )
    return group


def framing(recipe: Transform) -> tuple[Transform, Transform]:
    """The steps at the beginning of a recipe that choose the basis, and all others. What a
    measurement of the whole model left in front of them is no step that runs."""
    begins = EverySegment | WholeModel
    first = tuple(takewhile(lambda stage: isinstance(stage.view, begins), recipe))
    choosing = tuple(stage for stage in first if isinstance(stage.view, EverySegment))
    left = tuple(stage for stage in first if isinstance(stage.view, WholeModel))
    return choosing, (*left, *recipe[len(first) :])


def keeping_ones(Q: Tensor) -> Tensor:
    """The orthogonal matrix Q G that maps the vector of ones to itself, with a reflection G."""
    ones = torch.ones(len(Q), dtype=torch.float64, device=Q.device)
    u_k = ones - Q.double().mT @ ones
    if u_k.norm() < 1e-6 * len(Q) ** 0.5:
        return Q
    u_k = u_k / u_k.norm()
    return (Q.double() - 2 * torch.outer(Q.double() @ u_k, u_k)).to(Q.dtype)


def in_frame(graph: ModuleGraph) -> ModuleGraph:
    """A segment as the segments around it meet it in its own basis: without the turns at its ends.
    As it is where it has none."""
    enter, leave = graph.inserts.get("enter", ()), graph.inserts.get("leave", ())
    if not any(isinstance(op, Frame) for op in (*enter, *leave)):
        return graph
    if not (isinstance(enter[0], Frame) and isinstance(leave[-1], Frame)):
        raise QlabError(
            f"an operation at {full_name(graph.path, 'leave')} stands behind the change of basis, "
            "which nothing undoes then; put it on another wire"
        )
    inserts = {**graph.inserts, "enter": enter[1:], "leave": leave[:-1]}
    return graph.with_inserts({wire: ops for wire, ops in inserts.items() if ops})


def framed_like(graph: ModuleGraph, framed: ModuleGraph) -> ModuleGraph:
    """The same segment before any step, in the basis of what steps made of it; as it is where that
    has none."""
    turn = framed.inserts.get("enter", (None,))[0]
    if not isinstance(turn, Frame):
        return graph
    return turning(graph.code, "the recipe", graph.path).apply(graph, turn.M_nn)


def _device(graph: ModuleGraph) -> torch.device:
    return next(leaf.device for leaf in graph.params.values() if isinstance(leaf, Tensor))
