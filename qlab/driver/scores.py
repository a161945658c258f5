"""The memory of attention scores that a program writes out, predicted by a walk through it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qlab.algebra.graph import Code, aten, open_symbols


def score_bytes(code: Code, length: int, windows: int) -> int:
    """The most bytes of scores that are alive at once, for `windows` windows of `length` tokens.

    Scores are values with a number for every pair of tokens, as an attention makes them that is
    written out (with softcapping or alibi). A value lives from the node that computes it to its
    last use.
    """
    sizes, along_tokens = _token_symbols(code, length, windows)
    nodes = [node for node in code.graph.nodes if node.op == "call_function"]
    owner, last_use = _lifetimes(nodes)
    alive: dict[Any, int] = {}
    most = 0
    for i, node in enumerate(nodes):
        value = node.meta.get("val")
        if owner[node] is node and _has_pairs(value, along_tokens):
            alive[node] = _bytes(value, sizes)
            copy = alive[node] if _widens(node) else 0
            most = max(most, sum(alive.values()) + copy)
        for other in [n for n in alive if n is not node and last_use.get(n, i) <= i]:
            del alive[other]
    return most


def _token_symbols(code: Code, length: int, windows: int) -> tuple[dict[Any, int], frozenset[Any]]:
    """The size of every symbol in the shape of the hidden states [b, l, d], and the symbols of
    their axis of tokens."""
    arguments = [
        node.meta["val"]
        for node in code.graph.nodes
        if node.op == "placeholder" and node.name not in code.params
    ]
    hidden = next(t for t in arguments if t.ndim == 3 and t.is_floating_point())
    of_windows, of_tokens = open_symbols(hidden.shape[0]), open_symbols(hidden.shape[1])
    sizes = dict.fromkeys(of_windows, windows) | dict.fromkeys(of_tokens, length)
    return sizes, frozenset(of_tokens)


def _lifetimes(nodes: Sequence[Any]) -> tuple[dict[Any, Any], dict[Any, int]]:
    """Node -> the node whose memory its value lies in, and that node -> the index of its last
    use."""
    owner: dict[Any, Any] = {}
    last_use: dict[Any, int] = {}
    for i, node in enumerate(nodes):
        owner[node] = owner.get(node.args[0], node.args[0]) if _is_view(node) else node
        last_use |= {owner.get(used, used): i for used in node.all_input_nodes}
    return owner, last_use


def _is_view(node: Any) -> bool:
    """Whether a node's value lies in the memory of its first argument. Dropout counts: nothing is
    dropped from a model that is quantized."""
    if node.target is aten.dropout.default:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or all(result.alias_info is None for result in schema.returns[:1]):
        return False
    viewed = [a.meta["val"] if hasattr(a, "meta") else a for a in node.args[:1]]
    values = [*viewed, node.meta.get("val")]
    return all(isinstance(t, torch.Tensor) for t in values) and values[0].dtype == values[1].dtype


def _has_pairs(value: Any, along_tokens: frozenset[Any]) -> bool:
    """Whether two axes of a value grow with the tokens of a window."""
    if not isinstance(value, torch.Tensor):
        return False
    return sum(bool(along_tokens & open_symbols(d)) for d in value.shape) > 1


def _bytes(value: torch.Tensor, sizes: Mapping[Any, int]) -> int:
    return math.prod(_size(d, sizes) for d in value.shape) * value.dtype.itemsize


def _size(dimension: Any, sizes: Mapping[Any, int]) -> int:
    symbols = open_symbols(dimension)
    if not symbols:
        return int(dimension)
    known = symbols <= sizes.keys()
    return int(dimension.node.expr.subs(sizes)) if known else int(dimension.node.hint)


def _widens(node: Any) -> bool:
    """Whether a node is a softmax in another dtype than its input's, of which its kernel makes a
    copy in that dtype first."""
    if node.target is not aten.softmax.int:
        return False
    return node.args[0].meta["val"].dtype != node.meta["val"].dtype
