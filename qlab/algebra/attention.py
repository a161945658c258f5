"""The attentions of a traced program: the queries, keys and values that they read.

An attention is one operation, or two products around a softmax. What it reads is found as it was
before windows and heads were merged into one axis, and keys and values before they were repeated
for the queries that share them, where the program shows these.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from qlab.algebra.graph import LAYOUT, SAME_VALUES, aten, behind_casts

ATTENTION = aten.scaled_dot_product_attention.default
# operation of two computed values -> the positions of both
PRODUCTS: Mapping[Any, tuple[int, int]] = {
    aten.matmul.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
TURNS = frozenset({aten.transpose.int, aten.permute.default, aten.mT.default})
MERGES = frozenset({aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints})
REPEATS = frozenset({aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int})
# What is added to all scores of a query stays that: behind sums and masks as it is, behind products
# with one number as another.
SUMS = frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.where.self,
        aten.where.ScalarOther,
        aten.mul.Scalar,
        aten.div.Scalar,
    }
)
PRODUCTS_WITH_NUMBERS = frozenset({aten.mul.Tensor, aten.div.Tensor})


class Operand(NamedTuple):
    """What an attention reads. kind: "query", "key" or "value". node: the value. reader, place: the
    operation that reads it on the way to the attention, and which of its arguments it is there.
    layout: its last axes, "h n d" or "h d n" (heads, tokens, channels)."""

    kind: str
    node: fx.Node
    reader: fx.Node
    place: int
    layout: str


def attended(node: fx.Node) -> tuple[Operand, ...]:
    """Query, key and value of the attention that is met at this node, if one is."""
    return tuple(_of_heads(kind, *read) for kind, read in _attended(node).items())


def sees_shifts(node: fx.Node) -> fx.Node | None:
    """The operation of the attention met at this node to which a number added to all scores of a
    query matters (a cap), None where the softmax is all that comes."""
    if node.target is ATTENTION:
        return None
    way, _ = _way(node.all_input_nodes[0])
    return next((step for step in way if not _keeps_shifts(step)), None)


def leaves_of(node: fx.Node) -> list[Any]:
    """The arguments of a node as `Edge` counts them."""
    return pytree.tree_leaves((node.args, node.kwargs), is_leaf=lambda a: isinstance(a, fx.Node))


def is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes of traced tensors are the same number or symbol, without deciding it."""
    return str(a) == str(b)


def module_of(node: fx.Node) -> str:
    """The path in the segment of the module in which an operation runs."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.partition("@")[0].removeprefix("segment").removeprefix(".")


def _attended(node: fx.Node) -> dict[str, tuple[fx.Node, int, str]]:
    """Query, key and value of an attention, each as (the operation that reads it, its place there,
    the layout of the value). An attention that is written out is met at its softmax."""
    if node.target is ATTENTION:
        return {kind: (node, i, "h n d") for i, kind in enumerate(("query", "key", "value"))}
    if node.target not in SOFTMAX:
        return {}
    scores, mixture = _scored(node.all_input_nodes[0]), _mixed(node)
    if scores is None or mixture is None:
        return {}
    left, right = PRODUCTS[scores.target]
    return {
        "query": (scores, left, "h n d"),
        "key": (scores, right, "h d n"),
        "value": (mixture, PRODUCTS[mixture.target][1], "h n d"),
    }


def _scored(node: fx.Node) -> fx.Node | None:
    """The product whose result becomes this number by number: scaled, capped, masked, and set
    beside numbers of sinks."""
    _, product = _way(node)
    return product


def _way(node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """The operations from this back to a product of computed values, number by number and beside
    sinks, and that product; None where there is none."""
    way: list[fx.Node] = []
    while node.op == "call_function" and node.target not in PRODUCTS:
        if node.target is aten.cat.default:
            parts = [part for part in map(_way, cast(list[fx.Node], node.args[0])) if part[1]]
            before, product = parts[0] if len(parts) == 1 else ([], None)
            return [*way, node, *before], product
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if not pointwise and node.target not in LAYOUT | SAME_VALUES:
            return way, None
        inputs = [a for a in node.args if isinstance(a, fx.Node) and is_float(a)]
        computed = [a for a in inputs if a.op == "call_function"]
        if not computed:
            return way, None
        way.append(node)
        node = computed[0]
    return way, node if node.target in PRODUCTS and _both_computed(node) else None


def _keeps_shifts(step: fx.Node) -> bool:
    """Whether a number that is added to all scores of a query leaves this operation as one."""
    if step.target in PRODUCTS_WITH_NUMBERS:
        others = [a for a in step.args if isinstance(a, fx.Node)][1:]
        return all(a.meta["val"].numel() == 1 for a in others)
    return step.target in SUMS | LAYOUT | SAME_VALUES


def _both_computed(product: fx.Node) -> bool:
    operands = [cast(fx.Node, product.args[i]) for i in PRODUCTS[product.target]]
    return all(behind_casts(a).op == "call_function" and _is_heads(a) for a in operands)


def _is_heads(node: fx.Node) -> bool:
    return is_float(node) and node.meta["val"].ndim >= 3


def _mixed(node: fx.Node) -> fx.Node | None:
    """The product of attention weights with values."""
    while True:
        users = list(node.users)
        products = [u for u in users if u.target in PRODUCTS]
        if products:
            weights = products[0].args[PRODUCTS[products[0].target][0]]
            return products[0] if weights is node and _both_computed(products[0]) else None
        kept = [u for u in users if u.target in SAME_VALUES or u.target in LAYOUT]
        if not kept:
            return None
        node = kept[0]


def _of_heads(kind: str, reader: fx.Node, place: int, layout: str) -> Operand:
    """A value [..., h, n, d] that an attention reads, before it was turned, merged or repeated."""
    node = leaves_of(reader)[place]
    if layout == "h d n":
        turned = _before_turn(node)
        if turned is not None:
            reader, place, node, layout = *turned, "h n d"
    for before in (_before_merge, _before_repeat):
        earlier = before(node)
        if earlier is not None:
            reader, place, node = earlier
    return Operand(kind, node, reader, place, layout)


def _before_turn(node: fx.Node) -> tuple[fx.Node, int, fx.Node] | None:
    """The transpose of the last two axes behind which a value lies: it, the place of the value in
    its arguments, and the value. Casts may lie between."""
    turn = behind_casts(node)
    if turn.target not in TURNS:
        return None
    n = turn.meta["val"].ndim
    order = list(range(n))
    if turn.target is aten.permute.default:
        order = [axis % n for axis in cast(list[int], turn.args[1])]
    else:
        i, j = (axis % n for axis in turn.args[1:] or (-2, -1))
        order[i], order[j] = order[j], order[i]
    swaps = order == [*range(n - 2), n - 1, n - 2]
    return (turn, 0, turn.all_input_nodes[0]) if swaps else None


def _before_merge(node: fx.Node) -> tuple[fx.Node, int, fx.Node] | None:
    """The value [b, h, n, d] whose windows and heads were merged into the first axis of this one:
    the operation that reads it, its place there, and the value; None where none was. Casts may lie
    between."""
    merge = behind_casts(node)
    value = merge.args[0] if merge.target in MERGES else None
    if not isinstance(value, fx.Node) or not _is_heads(value):
        return None
    shape, merged = value.meta["val"].shape, merge.meta["val"].shape
    kept = all(same_size(a, b) for a, b in zip(shape[-2:], merged[-2:]))
    return (merge, 0, value) if kept and (len(shape), len(merged)) == (4, 3) else None


def _before_repeat(node: fx.Node) -> tuple[fx.Node, int, fx.Node] | None:
    """The value whose heads were repeated into this one: the operation that reads it, its place
    there, and the value; None where none was."""
    heads, tokens, width = node.meta["val"].shape[-3:]
    reader, repeated = node, False
    while reader.target in LAYOUT | SAME_VALUES:
        repeated |= reader.target in REPEATS
        value = reader.args[0]
        if not isinstance(value, fx.Node) or not _is_heads(value):
            return None
        shape = value.meta["val"].shape
        kept = same_size(shape[-2], tokens) and same_size(shape[-1], width)
        fewer = str(shape[-3]) != str(heads) and len(shape) == node.meta["val"].ndim
        if repeated and kept and fewer:
            return reader, 0, value
        reader = value
    return None
