"""What inserts do to values on their way: the operations of `ModuleGraph.inserts`, by the edges of
the program on which they sit. The program itself stays as it was traced."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from qlab.algebra.graph import ModuleGraph, Op
from qlab.algebra.wires import AT_NODE, Wire, wire_named, wires

# node -> which of its arguments -> what happens to that on its way there, in order
Edges = Mapping[str, Mapping[int, Sequence[tuple[Wire, tuple[Op, ...]]]]]


def edges_of(graph: ModuleGraph) -> Edges:
    """The inserts of a segment by edge, in running order; refuses those on a wire that is not
    there."""
    inserts = graph.inserts
    for name in inserts:
        wire_named(graph.code, name, graph.path or "the segment")
    edges: dict[str, dict[int, list[tuple[Wire, tuple[Op, ...]]]]] = {}
    for wire in wires(graph.code).values() if inserts else ():
        for node, place in wire.edges if wire.name in inserts else ():
            edges.setdefault(node, {}).setdefault(place, []).append((wire, inserts[wire.name]))
    return edges


def run_ops(wire: Wire, ops: Sequence[Op], x: Tensor, ends: Tensor | None = None) -> Tensor:
    """The value of a wire after these operations, which see its rows (`Wire.rows`). ends: where the
    rows of each expert end, of a value whose rows are sorted by expert."""
    rows = wire.rows(x)
    for op in ops:
        rows = op(rows, ends) if getattr(op, "per_expert", False) else op(rows)
    return wire.value(rows, x)


def as_read(graph: ModuleGraph, node: str, x: Tensor) -> Tensor:
    """The value of a node as all that read it see it: after the inserts on what the node puts out,
    or on what enters the segment there."""
    inserts = graph.inserts
    for wire in wires(graph.code).values() if inserts else ():
        if wire.node == node and wire.kind in AT_NODE and wire.name in inserts:
            x = run_ops(wire, inserts[wire.name], x)
    return x
