"""The named values of a traced program: what enters and leaves its sites, its attention and itself.

A wire is a value on its way to the operations that read it. Names come from the program alone:
"mlp.up_proj:in" and ":out" from the paths of sites, "self_attn:query", ":key" and ":value" from the
module in which an attention runs, "enter" and "leave" from what the program is given and returns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from qlab.algebra.graph import (
    LAYOUT,
    SAME_VALUES,
    WEIGHT_OPS,
    Code,
    Site,
    aten,
    behind_casts,
)
from qlab.errors import QlabError

ATTENTION = aten.scaled_dot_product_attention.default
# operation of two computed values -> the positions of both
PRODUCTS: Mapping[Any, tuple[int, int]] = {
    aten.matmul.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
TURNS = frozenset({aten.transpose.int, aten.permute.default, aten.mT.default})
REPEATS = frozenset({aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int})
AT_NODE = frozenset({"enter", "out"})  # kinds of wires whose edges are all uses of their node
Edge = tuple[str, int]  # a node, and which of its arguments, counted as leaves of (args, kwargs)


@dataclass(frozen=True, kw_only=True)
class Wire:
    """A named value of a program.

    name: "<site>:in", "<site>:out", "<attention>:query", ":key" or ":value", "enter" or "leave".
    kind: the last part of the name. node: the name of the node whose value it is. edges: where the
    value enters operations. site: of an input or output of a site. layout: the last axes of the
    value, "n k" (tokens, channels), or those of the heads of an attention, "h n d" or "h d n".
    """

    name: str
    kind: str
    node: str
    edges: tuple[Edge, ...]
    site: Site | None = None
    layout: str = "n k"

    @property
    def owner(self) -> str:
        """The path of the site or attention; "" for what enters and leaves the segment."""
        return self.name.rpartition(":")[0]

    @property
    def key(self) -> str:
        """Under which its statistics lie. Inputs of sites of one source share theirs."""
        return self.site.source if self.site is not None and self.kind == "in" else self.name

    @property
    def of_attention(self) -> bool:
        """Whether its channels are those of the heads of an attention."""
        return self.layout != "n k"

    def rows(self, x: Tensor) -> Tensor:
        """The value as [..., n, k], with a token in each row and the channels of all heads side by
        side."""
        if not self.of_attention:
            return x
        x = x.mT if self.layout == "h d n" else x
        return x.transpose(-3, -2).flatten(-2)

    def value(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `rows`, for a value of the shape of `like`."""
        if not self.of_attention:
            return rows
        x = rows.unflatten(-1, (like.shape[-3], -1)).transpose(-3, -2)
        return x.mT if self.layout == "h d n" else x


@lru_cache(maxsize=64)
def wires(code: Code) -> Mapping[str, Wire]:
    """The wires of a program by their names, in running order.

    Keys and values of an attention are those before they are repeated for the queries that share
    them, where the program shows these. Where attention is written out they are the operands of its
    two products. A module with several attentions has "self_attn:key", "self_attn#2:key" and so on.
    """
    uses = _uses(code.graph)
    sites = {node: site for node, site in _sites(code) if node is not None}
    ends = _ends(code)
    found: list[Wire] = []
    if ends is not None:
        entering = ends[0]
        found.append(Wire(name="enter", kind="enter", node=entering.name, edges=uses[entering]))
    owners: dict[str, int] = {}
    for node in code.graph.nodes:
        if node in sites:
            found += _around(node, sites[node], uses)
        attended = _attended(node)
        if attended:
            path = _module(node)
            owners[path] = owners.get(path, 0) + 1
            owner = path if owners[path] == 1 else f"{path}#{owners[path]}"
            found += [_of_heads(owner, kind, *edge) for kind, edge in attended.items()]
    # of a weight by itself (`graph.lone_weight`), which has no program
    found += [
        Wire(name=f"{site.path}:in", kind="in", node=site.source, edges=(), site=site)
        for node, site in _sites(code)
        if node is None
    ]
    if ends is not None:
        leaving, place = ends[1:]
        out = code.graph.output_node().name
        found.append(Wire(name="leave", kind="leave", node=leaving.name, edges=((out, place),)))
    return {wire.name: wire for wire in found}


def wire_named(code: Code, name: str, where: str = "the segment") -> Wire:
    """The wire of that name; refuses others with the nearest names that there are."""
    there = wires(code)
    if name not in there:
        raise QlabError(f"{name!r} is no wire of {where}; {nearest(name, there)}")
    return there[name]


def nearest(name: str, names: Mapping[str, Any] | Sequence[str]) -> str:
    """Which of the names come nearest to one that is not there, in words."""
    near = get_close_matches(name, list(names), n=3, cutoff=0.5) or list(names)[:8]
    return f"the nearest are {', '.join(near)}" if near else "it has none"


def full_name(path: str, wire: str) -> str:
    """The name of a wire in the model: of a segment "model.layers.0", "self_attn:key" is
    "model.layers.0.self_attn:key" and "enter" is "model.layers.0:enter"."""
    if not path:
        return wire
    local = wire if ":" in wire else f":{wire}"
    return f"{path}{local}" if local.startswith(":") else f"{path}.{local}"


# ------------------------------------------------------------------ ends and sites
def leaves_of(node: fx.Node) -> list[Any]:
    """The arguments of a node as `Edge` counts them."""
    return pytree.tree_leaves((node.args, node.kwargs), is_leaf=lambda a: isinstance(a, fx.Node))


def _uses(graph: fx.Graph) -> dict[fx.Node, tuple[Edge, ...]]:
    """node -> the edges at which its value enters operations."""
    uses: dict[fx.Node, tuple[Edge, ...]] = {node: () for node in graph.nodes}
    for user in graph.nodes:
        for place, leaf in enumerate(leaves_of(user)):
            if isinstance(leaf, fx.Node):
                uses[leaf] = (*uses[leaf], (user.name, place))
    return uses


def _ends(code: Code) -> tuple[fx.Node, fx.Node, int] | None:
    """What enters, what leaves and its place in the output: the first floating-point output, and
    the first input of its axes and width. None for a program without such a pair."""
    known = {**code.params, **code.constants}
    inputs = [n for n in code.graph.nodes if n.op == "placeholder" and n.name not in known]
    outputs = [n for n in code.graph.nodes if n.op == "output"]
    for place, leaf in enumerate(leaves_of(outputs[0]) if outputs else ()):
        if not isinstance(leaf, fx.Node) or not _is_float(leaf):
            continue
        for node in inputs:
            if _is_float(node) and _alike(node, leaf):
                return node, leaf, place
    return None


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have as many axes, and channels."""
    x, y = a.meta["val"], b.meta["val"]
    return x.ndim == y.ndim and _same(x.shape[-1], y.shape[-1])


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes of traced tensors are the same number or symbol, without deciding it."""
    return str(a) == str(b)


def _sites(code: Code) -> Iterator[tuple[fx.Node | None, Site]]:
    """The sites, each with the node that multiplies by its weight."""
    by_leaf: dict[str, fx.Node] = {}
    for node in code.graph.nodes:
        if node.target in WEIGHT_OPS:
            weight = behind_casts(node.args[WEIGHT_OPS[node.target][1]])
            by_leaf.setdefault(code.params.get(weight.name, ""), node)
    for site in code.sites:
        yield by_leaf.get(site.weight or ""), site


def _around(node: fx.Node, site: Site, uses: Mapping[fx.Node, tuple[Edge, ...]]) -> list[Wire]:
    """The input and the output of a site."""
    x_at = WEIGHT_OPS[node.target][0]
    entering: dict[str, Any] = {"node": site.source, "edges": ((node.name, x_at),)}
    leaving: dict[str, Any] = {"node": node.name, "edges": uses[node]}
    return [
        Wire(name=f"{site.path}:in", kind="in", site=site, **entering),
        Wire(name=f"{site.path}:out", kind="out", site=site, **leaving),
    ]


# ------------------------------------------------------------------ attention
def _module(node: fx.Node) -> str:
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
    scores, mixture = _scored(node.args[0]), _mixed(node)
    if scores is None or mixture is None:
        return {}
    left, right = PRODUCTS[scores.target]
    return {
        "query": (scores, left, "h n d"),
        "key": (scores, right, "h d n"),
        "value": (mixture, PRODUCTS[mixture.target][1], "h n d"),
    }


def _scored(node: fx.Node) -> fx.Node | None:
    """The product whose result becomes this number by number: scaled, capped, masked."""
    while node.op == "call_function" and node.target not in PRODUCTS:
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if not pointwise and node.target not in LAYOUT | SAME_VALUES:
            return None
        inputs = [a for a in node.args if isinstance(a, fx.Node) and _is_float(a)]
        computed = [a for a in inputs if a.op == "call_function"]
        if not computed:
            return None
        node = computed[0]
    return node if node.target in PRODUCTS and _both_computed(node) else None


def _both_computed(product: fx.Node) -> bool:
    operands = [product.args[i] for i in PRODUCTS[product.target]]
    return all(behind_casts(a).op == "call_function" and _is_heads(a) for a in operands)


def _is_heads(node: fx.Node) -> bool:
    return _is_float(node) and node.meta["val"].ndim >= 3


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


def _of_heads(owner: str, kind: str, reader: fx.Node, place: int, layout: str) -> Wire:
    """The wire of a value [..., h, n, d] that an attention reads, before it was turned or
    repeated."""
    node = leaves_of(reader)[place]
    if layout == "h d n":
        turned = _before_turn(node)
        if turned is not None:
            reader, place, node, layout = *turned, "h n d"
    before = _before_repeat(node)
    if before is not None:
        reader, place, node = before
    return Wire(
        name=f"{owner}:{kind}",
        kind=kind,
        node=node.name,
        edges=((reader.name, place),),
        layout=layout,
    )


def _before_turn(node: fx.Node) -> tuple[fx.Node, int, fx.Node] | None:
    """The transpose of the last two axes behind which a value lies: it, the place of the value in
    its arguments, and the value. Casts may lie between."""
    turn = behind_casts(node)
    if turn.target not in TURNS:
        return None
    n = turn.meta["val"].ndim
    order = list(range(n))
    if turn.target is aten.permute.default:
        order = [axis % n for axis in turn.args[1]]
    else:
        i, j = (axis % n for axis in turn.args[1:] or (-2, -1))
        order[i], order[j] = order[j], order[i]
    swaps = order == [*range(n - 2), n - 1, n - 2]
    return (turn, 0, turn.all_input_nodes[0]) if swaps else None


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
        kept = _same(shape[-2], tokens) and _same(shape[-1], width)
        fewer = str(shape[-3]) != str(heads) and len(shape) == node.meta["val"].ndim
        if repeated and kept and fewer:
            return reader, 0, value
        reader = value
    return None
