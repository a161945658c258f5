"""Values that a fold moves: those between what produces an input and the input.

A scale that waits at an input is moved to its producer past every value in between: past
"self_attn:value" from "o_proj:in" to the rows of "v_proj", past "up_proj:out" from "down_proj:in".
An operation r that stands on such a value does not commute with it, r(x m) is not r(x) m, and a
stored scale of r was measured on x. So nothing folds across an operation.
"""

from collections.abc import Mapping
from functools import lru_cache

from torch import fx

from qlab.algebra.folds import folds
from qlab.algebra.graph import Code, ModuleGraph
from qlab.algebra.wires import wires


@lru_cache(maxsize=64)
def crossed(code: Code) -> Mapping[str, tuple[str, ...]]:
    """Origin of sites -> the wires whose values a fold from there moves, in running order."""
    nodes = {node.name: node for node in code.graph.nodes}
    between: dict[str, tuple[str, ...]] = {}
    for origin, fold in folds(code).items():
        moved = _behind(nodes[fold.producer.node]) & _ahead(nodes[origin])
        # no scale passes from keys or queries through a softmax, so a fold never moves these
        there = [
            wire
            for wire in wires(code).values()
            if (wire.whole or wire.kind == "value") and nodes[wire.node] in moved
        ]
        between[origin] = tuple(wire.name for wire in there)
    return between


def standing_between(graph: ModuleGraph, origin: str) -> str | None:
    """The first wire with an operation at run time that a fold from this origin would cross, or
    None."""
    inserts = graph.inserts
    return next((wire for wire in crossed(graph.code).get(origin, ()) if wire in inserts), None)


def crosses(code: Code, pattern: str, path: str = "") -> list[str]:
    """The origins of a program from which a fold crosses a wire that the pattern matches, by its
    own name or that in the model."""
    there = wires(code)
    return [
        origin
        for origin, between in crossed(code).items()
        if any(there[wire].is_called(pattern, path) for wire in between)
    ]


def _behind(node: fx.Node) -> set[fx.Node]:
    """A node, and those that its value reaches."""
    reached, waiting = {node}, [node]
    while waiting:
        new = [user for user in waiting.pop().users if user not in reached]
        reached |= {*new}
        waiting += new
    return reached


def _ahead(node: fx.Node) -> set[fx.Node]:
    """A node, and those that its value is made of."""
    reached, waiting = {node}, [node]
    while waiting:
        new = [read for read in waiting.pop().all_input_nodes if read not in reached]
        reached |= {*new}
        waiting += new
    return reached
