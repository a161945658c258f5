"""Attention scores as what keys and queries undo of each other.

    (q M^-T) (k M)^T = q k^T

Positions are added to queries and keys before they meet, so nothing before them takes M: both turn
at run time. R3 is such a turn.

A vector c that is taken from all keys takes q c^T from all scores of a query. A softmax does not
see that, so nothing has to undo it.
"""

from dataclasses import dataclass

from torch import Tensor

from qlab.algebra.attention import attended, sees_shifts
from qlab.algebra.graph import Code, ModuleGraph, Op
from qlab.algebra.online import MatMul, Multiply
from qlab.algebra.wires import Wire, full_name, open_wires, wires
from qlab.errors import QlabError


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Invertible matrices of one attention: [d, d] for all heads, [h, d, d] for each of the h heads
    of the keys, or scales [k] of their channels.

    query, key: the wires, of which several heads of the one may share a head of the other.
    """

    query: Wire
    key: Wire

    @property
    def size(self) -> int:
        """Channels of a head."""
        return self.key.channels // self.key.heads

    def takes(self, M: Tensor) -> bool:
        """Whether M has the shape of an element."""
        shapes = [(self.size, self.size), (self.key.heads, self.size, self.size)]
        return tuple(M.shape) in [*shapes, (self.key.channels,)]

    def turned(self, graph: ModuleGraph, M: Tensor, M_inv: Tensor) -> ModuleGraph:
        """The graph with keys times M and queries times its inverse, transposed."""
        at_query: Op
        at_key: Op
        if M.ndim == 1:
            at_query, at_key = Multiply(self._of_queries(M_inv)), Multiply(M)
        else:
            at_query, at_key = MatMul(self._of_queries(M_inv.mT)), MatMul(M)
        turned = graph.inserting(self.query.name, at_query)
        return turned.inserting(self.key.name, at_key)

    def _of_queries(self, M: Tensor) -> Tensor:
        """What heads of keys have, for every head of queries that reads them."""
        readers = self.query.heads // self.key.heads
        if M.ndim == 3:
            return M.repeat_interleave(readers, 0)
        if M.ndim == 1:
            return M.unflatten(0, (self.key.heads, -1)).repeat_interleave(readers, 0).flatten()
        return M


def scores(graph: ModuleGraph, step: str) -> list[Scores]:
    """The attentions whose queries and keys a step may touch. Refuses a rule that splits them."""
    there = wires(graph.code)
    selected = {wire.name for wire in open_wires(graph)}
    found = []
    for query in there.values():
        name = f"{query.owner}:key"
        if query.kind != "query" or not selected & {query.name, name}:
            continue
        if not selected >= {query.name, name}:
            raise QlabError(
                f"{full_name(graph.path, query.name)} and {full_name(graph.path, name)} turn "
                f"together, and the rule for {step} splits them; give one to both"
            )
        found.append(Scores(query=query, key=there[name]))
    return found


def refuse_seen_shifts(graph: ModuleGraph, step: str) -> None:
    """Refuse keys that a step may shift, of an attention that would see it."""
    selected = {wire.name for wire in open_wires(graph)}
    for name, cap in seen_shifts(graph.code).items():
        if name in selected:
            raise QlabError(
                f"{full_name(graph.path, name)} cannot be shifted by {step}: its attention puts "
                f"scores through {cap} before the softmax, which sees what is added to all "
                "of them; leave the step out there (at, rules)"
            )


def seen_shifts(code: Code) -> dict[str, str]:
    """The keys of attentions that cap their scores or have sinks beside them, by their wires, with
    the operation that sees a number added to all scores of a query."""
    keys = {wire.node: wire.name for wire in wires(code).values() if wire.kind == "key"}
    seen = {}
    for node in code.graph.nodes:
        names = [
            keys[o.node.name] for o in attended(node) if o.kind == "key" and o.node.name in keys
        ]
        cap = sees_shifts(node) if names else None
        if cap is not None:
            seen[names[0]] = str(cap.target)
    return seen
