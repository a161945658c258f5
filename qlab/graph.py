"""One segment of a model as a value: an exported graph, its weight-bearing sites and a mapping of leaves."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qlab.errors import QlabError
from qlab.experts import each_expert
from qlab.qtensor import Leaf, Params, QTensor, dense

aten = torch.ops.aten
Op = Callable[..., Tensor]  # x -> x; of experts' rows also (x, ends) -> x

# Operations that hand on the same numbers, channel for channel: a site's input is looked up behind them.
SAME_VALUES = frozenset({
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default, aten.alias.default,
    aten.clone.default, aten.contiguous.default, aten.detach.default, aten.detach_.default, aten.dropout.default,
    aten.lift_fresh_copy.default,
})  # fmt: skip
RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
EXPERT_OPS = {torch.ops.qlab.experts_linear.default: "e o k", torch.ops.qlab.experts_matmul.default: "e k o"}
# operation -> positions of (input, weight, bias), and the weight's layout
WEIGHT_OPS: Mapping[Any, tuple[int, int, int | None, str]] = {
    **{op: (0, 1, 2, layout) for op, layout in EXPERT_OPS.items()},
    aten.linear.default: (0, 1, 2, "o k"),
    aten.addmm.default: (1, 2, 0, "k o"),
    aten.mm.default: (0, 1, None, "k o"),
    aten.matmul.default: (0, 1, None, "k o"),
}


def behind_casts(node: fx.Node) -> fx.Node:
    """The node whose numbers this one hands on."""
    while node.op == "call_function" and node.target in SAME_VALUES:
        node = node.args[0]
    return node


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of a fused weight (qkv, gate_up) that the graph uses apart from the others."""

    start: int
    stop: int


@dataclass(frozen=True)
class Site:
    """One weight-bearing operation of a segment, or a value (`weight` None) that can be quantized without one.

    path: the module's path inside the segment. source: the graph node that feeds it; sites with one source share
    their statistics. layout: axes of the stored weight, "o k" (linear), "k o" (addmm), "e o k" and "e k o" (fused experts).
    rows: the parts of a fused weight. Of fused experts, gathered_from: the node whose rows its input holds in the order
    of experts, if it is not made by experts itself; route: the node that says which rows belong to whom. router: it decides
    that, and is never rounded itself (it is small, and every engine reads it as it is).
    """

    path: str
    weight: str | None
    bias: str | None
    source: str
    op: str
    layout: str = "o k"
    rows: tuple[Part, ...] = ()
    gathered_from: str | None = None
    route: str | None = None
    router: bool = False

    @property
    def origin(self) -> str:
        """The node whose channels reach the site, whichever of its rows do: a reparametrization moves all of its sites."""
        return self.gathered_from or self.source


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Code:
    """The traced program of a segment, shared by every segment of the same structure and never edited.

    params: placeholder -> leaf path. examples: meta tensors for the segment's own inputs, in order.
    """

    graph: fx.Graph
    params: Mapping[str, str]
    constants: Mapping[str, Tensor]
    examples: tuple[Tensor, ...]
    out_spec: pytree.TreeSpec
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class ModuleGraph:
    """One segment as an immutable value; transforms return new ones.

    path: the segment's path in the model. dtype: what its leaves are stored in. selected: the sites a transform may touch (None: all).
    online: what still happens at run time to a site's input, per site path. notes: what stages report of a site.
    """

    code: Code
    params: Params
    path: str = ""
    dtype: torch.dtype = torch.float32
    online: Mapping[str, tuple[Op, ...]] = field(default_factory=dict)
    selected: frozenset[str] | None = None
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The selected sites, in the order in which the segment runs them."""
        return tuple(s for s in self.code.sites if self.selected is None or s.path in self.selected)

    def where(self, site: Site) -> str:
        """The site's full name in the model."""
        return f"{self.path}.{site.path}" if self.path else site.path

    def update(self, leaves: Mapping[str, Leaf]) -> "ModuleGraph":
        """The same graph with some leaves replaced."""
        return replace(self, params={**self.params, **leaves})

    def weight_ok(self, site: Site, expert: int | None = None) -> Tensor:
        """The site's weight as fp32 [..., o, k], whatever its layout, or that of one expert; refuses a rounded one."""
        leaf = self.params[site.weight] if site.weight else None
        if not isinstance(leaf, Tensor):
            raise QlabError(f"{self.where(site)} is quantized already; give each site one rounding method")
        W = leaf.float() if expert is None else leaf[expert].float()
        return W.mT if site.layout.endswith("k o") else W


def by_source(sites: Iterable[Site]) -> dict[str, tuple[Site, ...]]:
    """Sites grouped by the node that feeds them, in running order: they see the same rows."""
    return _grouped(sites, lambda site: site.source)


def by_origin(sites: Iterable[Site]) -> dict[str, tuple[Site, ...]]:
    """Sites grouped by the node whose channels they share, in running order."""
    return _grouped(sites, lambda site: site.origin)


def _grouped(sites: Iterable[Site], key: Callable[[Site], str]) -> dict[str, tuple[Site, ...]]:
    groups: dict[str, tuple[Site, ...]] = {}
    for site in sites:
        groups[key(site)] = (*groups.get(key(site), ()), site)
    return groups


def tensors_of(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tensors among a segment's inputs, in the order in which its graph takes them."""
    return tuple(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))


# ------------------------------------------------------------------ interpret
class _Interpreter(fx.Interpreter):
    """Runs a graph with its leaves dequantized where they are used, in the dtype of the input they meet."""

    def __init__(self, mg: ModuleGraph, graph: fx.Graph):
        super().__init__(nn.Module(), graph=graph)
        self.mg = mg
        self.by_weight = {s.weight: s for s in mg.code.sites if s.weight}

    def placeholder(self, target: str, args: tuple, kwargs: dict) -> Any:
        code = self.mg.code
        if target in code.constants:
            return code.constants[target]
        if target not in code.params:
            return super().placeholder(target, args, kwargs)
        leaf = self.mg.params[code.params[target]]
        return _Weight(code.params[target], leaf) if code.params[target] in self.by_weight else leaf

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target in SAME_VALUES and isinstance(args[0], _Weight):
            return args[0]  # a weight is read in the dtype of the input it meets
        if target in EXPERT_OPS and isinstance(args[1], _Weight):
            return self._each_expert(EXPERT_OPS[target], *args)
        if target in WEIGHT_OPS and isinstance(args[WEIGHT_OPS[target][1]], _Weight):
            x_at, w_at, b_at, layout = WEIGHT_OPS[target]
            site, x = self.by_weight[args[w_at].path], args[x_at]
            for op in self.mg.online.get(site.path, ()):
                x = op(x)
            W = dense(args[w_at].leaf, x.dtype)
            new = list(args)
            # codes are always [o, k]; an unquantized weight still has its own layout
            new[x_at], new[w_at] = x, W.mT if isinstance(args[w_at].leaf, QTensor) and layout == "k o" else W
            if b_at is not None and len(args) > b_at and args[b_at] is not None:
                new[b_at] = args[b_at].to(x.dtype)
            args = tuple(new)
        return super().call_function(target, args, kwargs)

    def _each_expert(self, layout: str, x_sk: Tensor, weight: "_Weight", bias_eo: Tensor | None, ends: Tensor) -> Tensor:
        for op in self.mg.online.get(self.by_weight[weight.path].path, ()):
            x_sk = op(x_sk, ends)

        def product(e: int, x_nk: Tensor) -> Tensor:  # one expert is dense at a time
            leaf = pytree.tree_map_only(Tensor, lambda t: t[e], weight.leaf)
            W = dense(leaf, x_nk.dtype)
            W_ok = W.mT if layout == "e k o" and isinstance(leaf, Tensor) else W
            return F.linear(x_nk, W_ok, None if bias_eo is None else bias_eo[e].to(x_nk.dtype))

        return each_expert(x_sk, ends, product)


@dataclass(frozen=True)
class _Weight:
    path: str
    leaf: Leaf


def interpret(graph: ModuleGraph, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the segment computes on these inputs, with every leaf as it is now. Differentiable; the reference reading."""
    out = _run(graph, graph.code.graph, args, kwargs)
    return pytree.tree_unflatten(list(out), graph.code.out_spec)


def _run(graph: ModuleGraph, code: fx.Graph, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors, traced = tensors_of(args, kwargs), graph.code.examples
    if len(tensors) != len(traced):
        raise QlabError(f"{graph.path or 'the segment'} was traced with {len(traced)} input tensors and is called with "
                        f"{len(tensors)}; trace it again for inputs of this form")
    return _Interpreter(graph, code).run(*tensors)


def inputs_of(graph: ModuleGraph, sources: Iterable[str], args: tuple, kwargs: dict[str, Any], everywhere: bool = False
              ) -> dict[str, Any]:  # fmt: skip
    """The tensors x [..., k] that reach the sites of each source, online operations included, and nothing beyond them.

    Only what the sources depend on is computed: the last projection of a block never runs here. Rows of experts come with
    what their route says (qlab.experts.route), under its node's name. everywhere: every token goes to every expert.
    """
    first = {source: sites[0] for source, sites in by_source(graph.code.sites).items()}
    wanted = tuple(sources)
    routes = tuple(sorted({route for s in wanted if (route := first[s].route)}))
    x = dict(zip(wanted + routes, _run(graph, _ending_at(graph.code, wanted + routes, everywhere), args, kwargs)))
    for source in wanted:
        ends = x[first[source].route][2:] if first[source].route else ()
        for op in graph.online.get(first[source].path, ()):
            x[source] = op(x[source], *ends)
    return x


@lru_cache(maxsize=32)
def _ending_at(code: Code, sources: tuple[str, ...], everywhere: bool = False) -> fx.Graph:
    """A copy of the program that returns these nodes and holds nothing they do not need."""
    copy = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    copy.graph_copy(code.graph, env)
    by_name = {old.name: new for old, new in env.items()}
    for node in copy.nodes:
        if everywhere and node.target is torch.ops.qlab.route.default:
            node.target = torch.ops.qlab.route_everywhere.default
    copy.output(tuple(by_name[s] for s in sources))
    copy.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or _writes(n))
    return copy


def _writes(node: fx.Node) -> bool:
    # an operation in place: who reads its target through another view does not show in the graph's edges
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
