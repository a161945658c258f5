"""What inserts do to values on their way: the operations of `ModuleGraph.inserts`, by the edges of
the program on which they sit. The program itself stays as it was traced."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from qlab.algebra.called import called
from qlab.algebra.graph import ModuleGraph, Op
from qlab.algebra.wires import Wire, wire_named, wires
from qlab.errors import QlabError

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
            of_edge = edges.setdefault(node, {}).setdefault(place, [])
            of_edge.append((replace(wire, path=graph.path), inserts[wire.name]))
    return edges


def run_ops(wire: Wire, ops: Sequence[Op], x: Tensor, ends: Tensor | None = None) -> Tensor:
    """The value of a wire after these operations, which see its rows (`Wire.rows`), in the dtype of
    the value. ends: where the rows of each expert end, of a value whose rows are sorted by expert.
    Refuses an operation that writes to the value, or makes one of another shape."""
    given = rows = wire.rows(x)
    written = _writes(x)
    for op in ops:
        arguments = (rows, ends) if getattr(op, "per_expert", False) else (rows,)
        rows = called(f"{wire.where}: the operation {_name_of(op)} there", op, *arguments)
        if not isinstance(rows, Tensor) or rows.shape != given.shape:
            shape = tuple(rows.shape) if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
            raise QlabError(
                f"an insert on {wire.where} made {shape} of {tuple(given.shape)}; return a tensor "
                "of the same shape"
            )
    if _writes(x) != written:
        raise QlabError(
            f"an insert on {wire.where} writes to the value that it is given, which other parts of "
            "the model read too; return a new tensor"
        )
    return wire.value(rows.to(given.dtype), x)


def _name_of(op: Op) -> str:
    """An operation as its author calls it."""
    return getattr(op, "__qualname__", type(op).__qualname__)


def _writes(x: Tensor) -> int:
    """How often a tensor was written to, as far as torch counts it."""
    return 0 if x.is_inference() else x._version


def as_read(graph: ModuleGraph, node: str, x: Tensor) -> Tensor:
    """The value of a node as all that read it see it: after the inserts on what the node puts out,
    or on what enters the segment there."""
    inserts = graph.inserts
    for wire in wires(graph.code).values() if inserts else ():
        if wire.node == node and wire.whole and wire.name in inserts:
            x = run_ops(wire, inserts[wire.name], x)
    return x
