"""The named values of a traced program: what enters and leaves its sites, its attention and itself.

A wire is a value on its way to the operations that read it. Names come from the program alone:
"mlp.up_proj:in" and ":out" from the paths of sites, "self_attn:query", ":key" and ":value" from the
module in which an attention runs, "enter" and "leave" from what the program is given and returns.
All other values have names too (`values`): "mlp.act_fn:out" and "self_attn:softmax".
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
from qlab.algebra.values import Edge, Value, reads_of, values
from qlab.errors import QlabError

ON_EDGES = frozenset({"in", "query", "key", "value", "leave"})  # kinds of what some readers read


@dataclass(frozen=True, kw_only=True)
class Wire:
    """A named value of a program.

    name: "<site>:in", "<site>:out", "<attention>:query", ":key" or ":value", "enter" or "leave", or
    one of `values`. also: its other names, which patterns match too. kind: the last part of the
    name. node: the name of the node whose value it is. edges: where the value enters operations.
    site: of an input or output of a site. layout: the last axes of the value, "n k" (tokens,
    channels), those of the heads of an attention, "h n d" or "h d n", or all of fewer, "n", "k" or
    "". channels: k, of all heads of an attention. heads: their number there, 1 elsewhere. path: the
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
    also: tuple[str, ...] = ()

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
        return self.layout in ("h n d", "h d n")

    @property
    def whole(self) -> bool:
        """Whether it is the value as all that read it see it."""
        return self.kind not in ON_EDGES

    def is_called(self, pattern: str, path: str = "") -> bool:
        """Whether a pattern matches one of its names, or of those in a segment of this path."""
        return any(
            matches(pattern, name) or matches(pattern, full_name(path, name))
            for name in (self.name, *self.also)
        )

    def rows(self, x: Tensor) -> Tensor:
        """The value as [..., n, k], with a token in each row and the channels of all heads side by
        side."""
        if x.ndim < 2:
            return x[:, None] if self.layout == "n" else x.reshape(1, -1)
        if not self.of_attention:
            return x
        x = x.mT if self.layout == "h d n" else x
        return x.transpose(-3, -2).flatten(-2)

    def value(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `rows`, for a value of the shape of `like`."""
        if not self.of_attention:
            return rows if like.ndim >= 2 else rows.reshape(like.shape)
        x = rows.unflatten(-1, (like.shape[-3], -1)).transpose(-3, -2)
        return x.mT if self.layout == "h d n" else x


@lru_cache(maxsize=64)
def wires(code: Code) -> Mapping[str, Wire]:
    """The wires of a program by their names, in running order.

    Keys and values of an attention are those before they are repeated for the queries that share
    them, where the program shows these. Where attention is written out they are the operands of its
    two products. A module with several attentions has "self_attn:key", "self_attn#2:key" and so on.
    """
    reads = reads_of(code.graph)
    sites = {node: site for node, site in _sites(code) if node is not None}
    entering, leaving, place = _ends(code) or (None, None, 0)
    found: dict[fx.Node, list[Wire]] = {node: [] for node in code.graph.nodes}  # where they are met
    if entering is not None:
        found[entering].append(_plain("enter", entering, reads[entering]))
    owners: dict[str, int] = {}
    for node in code.graph.nodes:
        if node in sites:
            found[node] += _around(node, sites[node], reads)
        operands = attended(node)
        if operands:
            path = module_of(node)
            owners[path] = owners.get(path, 0) + 1
            owner = path if owners[path] == 1 else f"{path}#{owners[path]}"
            found[node] += [_of_attention(owner, operand) for operand in operands]
    if leaving is not None:
        out = code.graph.output_node()
        found[out].append(_plain("leave", leaving, ((out.name, place),)))
    named = _all_named(found, list(values(code, reads, entering, leaving)), reads)
    # of a weight by itself (`graph.lone_weight`), which has no program
    named += [
        Wire(name=f"{site.path}:in", kind="in", node=site.source, edges=(), site=site)
        for node, site in _sites(code)
        if node is None
    ]
    return {wire.name: wire for wire in named}


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
        ends.setdefault(_end(known, stem) if "*" in name else known, known)
    near = [ends[end] for end in get_close_matches(stem, list(ends), n=3, cutoff=0.5)]
    near = near or list(names)[:8]
    return f"the nearest are {', '.join(near)}" if near else "it has none"


def _end(name: str, stem: str) -> str:
    """The last parts of a name, as many as the stem has."""
    parts = name.split(".")[-1 - stem.count(".") :]
    end = ".".join(parts)
    return f":{end.rpartition(':')[2]}" if stem.startswith(":") else end


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
        if not wire.is_called(pattern, graph.path):
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


def stops(code: Code, inserting: Container[str]) -> list[Stop]:
    """The stops of a run at every source, and at each wire among `inserting` that is no input of a
    site, in the order in which the program reaches them."""
    places = {node.name: i for i, node in enumerate(code.graph.nodes)}
    there = wires(code)
    found: list[tuple[int, bool, Stop]] = []
    for source, sites in by_source(code.sites).items():
        inputs = [there[f"{site.path}:in"] for site in sites]
        place = min((places[n] for wire in inputs for n, _ in wire.edges), default=0)
        found.append((place, True, Stop(source, sites, frozenset(wire.name for wire in inputs))))
    for wire in there.values():
        if wire.kind != "in" and wire.name in inserting:
            place = min(places[node] for node, _ in wire.edges)
            # what all readers of a value see comes before what one of them does
            found.append((place, not wire.whole, Stop(wire.name, (), frozenset({wire.name}))))
    return [stop for *_, stop in sorted(found, key=lambda stop: stop[:2])]


# ------------------------------------------------------------------ ends and sites
def _all_named(
    found: Mapping[fx.Node, list[Wire]],
    others: Sequence[Value],
    reads: Mapping[fx.Node, tuple[Edge, ...]],
) -> list[Wire]:
    """The wires in running order, with one for each value that no wire brings to all that read it,
    and for the others the names that they have as well."""
    by_node: dict[str, list[tuple[fx.Node, int]]] = {}
    for at, wires_there in found.items():
        for i, wire in enumerate(wires_there):
            by_node.setdefault(wire.node, []).append((at, i))
    for node, returned_by, computed_by in others:
        names = (*returned_by, computed_by)
        covering = [
            (at, i) for at, i in by_node.get(node.name, ()) if found[at][i].edges == reads[node]
        ]
        if covering:
            at, i = covering[0]
            found[at][i] = replace(found[at][i], also=names)
        else:
            wire = _plain(names[0], node, reads[node])
            found[node].insert(0, replace(wire, also=names[1:]))
    return [wire for wires_there in found.values() for wire in wires_there]


def _plain(name: str, node: fx.Node, edges: tuple[Edge, ...]) -> Wire:
    """A value with its last axis as channels."""
    shape = node.meta["val"].shape
    layout = "n k"
    if len(shape) < 2:
        layout = "".join("n" if open_symbols(size) else "k" for size in shape)
    channels = 1 if layout in ("n", "") else _count(shape[-1])
    kind = name.rpartition(":")[2]
    return Wire(name=name, kind=kind, node=node.name, edges=edges, layout=layout, channels=channels)


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


def _around(node: fx.Node, site: Site, reads: Mapping[fx.Node, tuple[Edge, ...]]) -> list[Wire]:
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
        entering, name=f"{site.path}:out", kind="out", node=node.name, edges=reads[node], channels=o
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
