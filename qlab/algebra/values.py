"""Names of the values of a traced program that no weight, attention or end names: by the module
that returns them, or else by the operation that computes them.

"mlp.act_fn:out" is what the module `mlp.act_fn` returns, "mlp.act_fn:out#2" its second value.
"self_attn:softmax" is the first value of that operation in the code of `self_attn` itself, and
"self_attn:softmax#2" the second. ":add" is of the block's own code. "enter#2" is the second tensor
that a block is called with, beside "enter".
"""

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, fx

from qlab.algebra.attention import leaves_of, module_of
from qlab.algebra.graph import LAYOUT, SAME_VALUES, Code, behind_casts

Edge = tuple[str, int]  # a node, and which of its arguments, counted as leaves of (args, kwargs)


class Value(NamedTuple):
    """A floating-point value. returned_by: the names that it has as what modules return, that of
    the innermost first. computed_by: the name that it has as the result of its operation."""

    node: fx.Node
    returned_by: tuple[str, ...]
    computed_by: str


def values(
    code: Code,
    reads: Mapping[fx.Node, tuple[Edge, ...]],
    entering: fx.Node | None,
    leaving: fx.Node | None,
) -> Iterator[Value]:
    """The floating-point values that what the program gives is made of, in running order.

    reads: node -> where its value is read. entering, leaving: the hidden states.
    """
    known = {**code.params, **code.constants}
    multiplying = {site.path for site in code.sites}  # what these return is a site's output
    modules = {node: module_of(node) for node in code.graph.nodes}
    reaching, counts = _reaching(code.graph), {"enter": 1}

    def numbered(name: str) -> str:
        counts[name] = counts.get(name, 0) + 1
        return name if counts[name] == 1 else f"{name}#{counts[name]}"

    for node in code.graph.nodes:
        made = behind_casts(node)  # a cast of a weight is one
        if not is_value(node) or made.name in known or node is entering:
            continue
        if node.op == "placeholder":
            named = Value(node, (), numbered("enter"))
        else:
            # what a module leaves in a cache it does not return
            readers = [modules[user] for user in node.users if user.op != "output"]
            readers += [""] if node is leaving else []
            # what a module only hands on it does not return either
            owners = [
                path
                for path in _returning(modules[node], readers)
                if path not in multiplying and _is_within(modules[made], path)
            ]
            named = Value(
                node=node,
                returned_by=tuple(numbered(f"{path}:out") for path in owners),
                computed_by=numbered(f"{modules[node]}:{_operation(node)}"),
            )
        if reads[node] and node in reaching:
            yield named


def _reaching(graph: fx.Graph) -> Collection[fx.Node]:
    """The nodes whose numbers reach an output, or a tensor that is written to. Of others, as of
    what a program computes on the way to a stretch of it, at most the sizes do."""
    waiting = [node for node in graph.nodes if node.op == "output" or _writes(node)]
    found = {*waiting}
    while waiting:
        ahead = [n for n in waiting.pop().all_input_nodes if n not in found and not _is_size(n)]
        found |= {*ahead}
        waiting += ahead
    return found


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | torch.SymFloat | int)


def is_value(node: fx.Node) -> bool:
    """Whether a node gives numbers of floating point."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _returning(path: str, readers: Sequence[str]) -> Iterator[str]:
    """The modules around a value that is computed in the module of this path and read in others,
    from the innermost one, as far as something outside of them reads it."""
    while path and not all(_is_within(reader, path) for reader in readers):
        yield path
        path = path.rpartition(".")[0]


def _is_within(path: str, module: str) -> bool:
    return f"{path}.".startswith(f"{module}.")


def _operation(node: fx.Node) -> str:
    """The operation that computes a value, in a word. Parts of a result are results too."""
    target = node.target
    if target is operator.getitem:
        return _operation(node.all_input_nodes[0])
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).partition("::")[2].strip("_")
    return type(target).__name__.lower()


# ------------------------------------------------------------------ where values are read
def reads_of(graph: fx.Graph) -> dict[fx.Node, tuple[Edge, ...]]:
    """node -> the edges at which its value enters operations that read it.

    A tensor may be made to be written to: an operation fills a part of it, which others read later.
    Those edges are none of a value, since what is written goes to the tensor itself.
    """
    writing = _written_to(graph)
    reads: dict[fx.Node, tuple[Edge, ...]] = {node: () for node in graph.nodes}
    for user in graph.nodes:
        for place, leaf in enumerate(leaves_of(user)):
            if isinstance(leaf, fx.Node) and (leaf, user) not in writing:
                reads[leaf] = (*reads[leaf], (user.name, place))
    return reads


def _written_to(graph: fx.Graph) -> Collection[tuple[fx.Node, fx.Node]]:
    """(value, operation) for operations through which a program writes to a tensor that it reads
    afterwards: the operation that writes, and the views that lead to it."""
    places = {node: i for i, node in enumerate(graph.nodes)}
    found: set[tuple[fx.Node, fx.Node]] = set()
    for node in graph.nodes:
        if not _writes(node):
            continue
        way = [node]
        while isinstance(written := way[-1].args[0] if way[-1].args else None, fx.Node):
            way.append(written)
            if written.target not in LAYOUT | SAME_VALUES:
                break
        later = any(places[user] > places[node] for value in way[1:] for user in value.users)
        if later:
            found |= {(value, user) for user, value in pairwise(way)}
    return found


def _writes(node: fx.Node) -> bool:
    """Whether an operation writes to its first argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
