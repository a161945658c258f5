"""Products with activations rounded to int8 that multiply the same activations, as one operator."""

from operator import getitem
from typing import Any

import torch

from qlab.lowering.compiler.nodes import call, replace

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def join(graph: Any) -> int:
    """Let products share one rounding of their activations; the number of operators that do.

    int4_int8_forward(x, a), int4_int8_forward(x, b) -> the results of int4_int8_pair(x, a, b)

    The products of an attention's q, k and v are such, and those of a gate and its neighbour.
    """
    ops = torch.ops.qlab
    alike: dict[Any, list[Any]] = {}
    for node in graph.find_nodes(op="call_function", target=ops.int4_int8_forward.default):
        if all(part.op == "placeholder" for part in node.args[1:4]):  # there before all of them
            alike.setdefault(_shared(node), []).append(node)
    count = 0
    for nodes in alike.values():
        for first in range(0, len(nodes) - 1, 3):
            few = nodes[first : first + 3]
            if len(few) > 1:
                joined = ops.int4_int8_pair if len(few) == 2 else ops.int4_int8_triple
                _replace_by(graph, joined.default, few)
                count += 1
    return count


def _shared(node: Any) -> tuple[Any, ...]:
    """What products have to have in common: activations, layout, group and path."""
    x, words, _, _, _, group, path = node.args
    shape = str(x.meta["val"].shape)
    while x.target in RESHAPES:
        x = x.args[0]
    return x, shape, tuple(words.meta["val"].shape[1:]), group, path


def _replace_by(graph: Any, operator: Any, nodes: list[Any]) -> None:
    """Products as the results of one operator."""
    x, *_, group, path = nodes[0].args
    weights = [part for node in nodes for part in node.args[1:4]]
    rows = [node.args[4] for node in nodes]
    with graph.inserting_before(nodes[0]):
        every = call(graph, operator, (x, *weights, *rows, group, path))
        parts = [call(graph, getitem, (every, i)) for i in range(len(nodes))]
    for node, part in zip(nodes, parts):
        replace(graph, node, part)
