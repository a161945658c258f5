"""The named values of a traced program: what enters and leaves its sites, its attention and itself.

A wire is a value on its way to the operations that read it. Names come from the program alone:
"mlp.up_proj:in" and ":out" from the paths of sites, "self_attn:query", ":key" and ":value" from the
module in which an attention runs, "enter" and "leave" from what the program is given and returns.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, fx

from qlab.algebra.attention import Operand, attended, is_float, leaves_of, module_of, same_size
from qlab.algebra.graph import (
    WEIGHT_OPS,
    Code,
    ModuleGraph,
    Site,
    behind_casts,
    by_source,
    open_symbols,
)
from qlab.algebra.scope import Scope, matches
from qlab.errors import QlabError

AT_NODE = frozenset({"enter", "out"})  # kinds of wires whose edges are all uses of their node
Edge = tuple[str, int]  # a node, and which of its arguments, counted as leaves of (args, kwargs)


@dataclass(frozen=True, kw_only=True)
class Wire:
    """A named value of a program.

    name: "<site>:in", "<site>:out", "<attention>:query", ":key" or ":value", "enter" or "leave".
    kind: the last part of the name. node: the name of the node whose value it is. edges: where the
    value enters operations. site: of an input or output of a site. layout: the last axes of the
    value, "n k" (tokens, channels), or those of the heads of an attention, "h n d" or "h d n".
    channels: k, of all heads of an attention. heads: their number there, 1 elsewhere. path: the
    segment's path in the model, where a step is given the wire.
    """

    name: str
    kind: str
    node: str
    edges: tuple[Edge, ...]
    site: Site | None = None
    layout: str = "n k"
    channels: int = 0
    heads: int = 1
    path: str = ""

    @property
    def where(self) -> str:
        """Its name in the model."""
        return full_name(self.path, self.name)

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
        found.append(
            Wire(
                name="enter",
                kind="enter",
                node=entering.name,
                edges=uses[entering],
                channels=entering.meta["val"].shape[-1],
            )
        )
    owners: dict[str, int] = {}
    for node in code.graph.nodes:
        if node in sites:
            found += _around(node, sites[node], uses)
        operands = attended(node)
        if operands:
            path = module_of(node)
            owners[path] = owners.get(path, 0) + 1
            owner = path if owners[path] == 1 else f"{path}#{owners[path]}"
            found += [_of_attention(owner, operand) for operand in operands]
    # of a weight by itself (`graph.lone_weight`), which has no program
    found += [
        Wire(name=f"{site.path}:in", kind="in", node=site.source, edges=(), site=site)
        for node, site in _sites(code)
        if node is None
    ]
    if ends is not None:
        leaving, place = ends[1:]
        out = code.graph.output_node().name
        found.append(
            Wire(
                name="leave",
                kind="leave",
                node=leaving.name,
                edges=((out, place),),
                channels=leaving.meta["val"].shape[-1],
            )
        )
    return {wire.name: wire for wire in found}


def wire_named(code: Code, name: str, where: str = "the segment") -> Wire:
    """The wire of that name; refuses others with the nearest names that there are."""
    there = wires(code)
    if name not in there:
        raise QlabError(f"{name!r} is no wire of {where}; {nearest(name, there)}")
    return there[name]


def nearest(name: str, names: Mapping[str, Any] | Sequence[str]) -> str:
    """Which of the names come nearest to one that is not there, in words."""
    stem = name.replace("*", "").lstrip(".")  # of a pattern, what every name has to end with
    ends: dict[str, str] = {}
    for known in names:
        ends.setdefault(known[-len(stem) :] if "*" in name else known, known)
    near = [ends[end] for end in get_close_matches(stem, list(ends), n=3, cutoff=0.5)]
    near = near or list(names)[:8]
    return f"the nearest are {', '.join(near)}" if near else "it has none"


def full_name(path: str, wire: str) -> str:
    """The name of a wire in the model: of a segment "model.layers.0", "self_attn:key" is
    "model.layers.0.self_attn:key" and "enter" is "model.layers.0:enter"."""
    if not path:
        return wire
    local = wire if ":" in wire else f":{wire}"
    return f"{path}{local}" if local.startswith(":") else f"{path}.{local}"


def open_wires(graph: ModuleGraph) -> tuple[Wire, ...]:
    """The wires that a transform may touch, in running order."""
    may = graph.selected_wires
    return tuple(w for w in wires(graph.code).values() if may is None or w.name in may)


def reached(graph: ModuleGraph, pattern: str, scope: Scope) -> frozenset[str]:
    """The open wires that a pattern matches, by their own name or that in the model: inputs and
    outputs of selected sites but routers, and other values of modules within the scope."""
    found = []
    for wire in open_wires(graph):
        name = full_name(graph.path, wire.name)
        if not (matches(pattern, wire.name) or matches(pattern, name)):
            continue
        if wire.site is None:
            owner, _, _ = name.rpartition(":")
            allowed = not graph.path or owner in scope or name in scope
        else:
            allowed = wire.site in graph.sites and not wire.site.router
        found += [wire.name] if allowed else []
    return frozenset(found)


class Stop(NamedTuple):
    """Where a run of a program waits: before the sites that a node feeds, or before what reads
    another wire. source: the node, or the name of the wire. wires: what may be inserted there."""

    source: str
    sites: tuple[Site, ...]
    wires: frozenset[str]


def stops(code: Code, values: Container[str]) -> list[Stop]:
    """The stops of a run at every source, and at each wire among `values` that is no input of a
    site, in the order in which the program reaches them."""
    places = {node.name: i for i, node in enumerate(code.graph.nodes)}
    there = wires(code)
    found: list[tuple[int, Stop]] = []
    for source, sites in by_source(code.sites).items():
        inputs = [there[f"{site.path}:in"] for site in sites]
        place = min((places[n] for wire in inputs for n, _ in wire.edges), default=0)
        found.append((place, Stop(source, sites, frozenset(wire.name for wire in inputs))))
    for wire in there.values():
        if wire.kind != "in" and wire.name in values:
            place = min(places[node] for node, _ in wire.edges)
            found.append((place, Stop(wire.name, (), frozenset({wire.name}))))
    return [stop for _, stop in sorted(found, key=lambda pair: pair[0])]


# ------------------------------------------------------------------ ends and sites
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
        if not isinstance(leaf, fx.Node) or not is_float(leaf):
            continue
        for node in inputs:
            if is_float(node) and _alike(node, leaf):
                return node, leaf, place
    return None


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have as many axes, and channels."""
    x, y = a.meta["val"], b.meta["val"]
    return x.ndim == y.ndim and same_size(x.shape[-1], y.shape[-1])


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
    k, o = node.args[x_at].meta["val"].shape[-1], node.meta["val"].shape[-1]
    entering = Wire(
        name=f"{site.path}:in",
        kind="in",
        node=site.source,
        edges=((node.name, x_at),),
        site=site,
        channels=k,
    )
    leaving = replace(
        entering, name=f"{site.path}:out", kind="out", node=node.name, edges=uses[node], channels=o
    )
    return [entering, leaving]


def _of_attention(owner: str, operand: Operand) -> Wire:
    """What an attention reads."""
    shape = operand.node.meta["val"].shape
    width = shape[-1] if operand.layout == "h n d" else shape[-2]
    return Wire(
        name=f"{owner}:{operand.kind}",
        kind=operand.kind,
        node=operand.node.name,
        edges=((operand.reader.name, operand.place),),
        layout=operand.layout,
        channels=_count(shape[-3] * width),
        heads=_count(shape[-3]),
    )


def _count(size: Any) -> int:
    """The size as a number, where it is a term without symbols."""
    return size if open_symbols(size) else int(size)
