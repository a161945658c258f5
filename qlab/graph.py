"""One segment of a model as a value: an exported graph, its weight-bearing sites and a mapping of leaves."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qlab.errors import QlabError
from qlab.qtensor import Leaf, Params

aten = torch.ops.aten
Op = Callable[[Tensor], Tensor]

# Operations that hand on the same numbers, channel for channel: a site's input is looked up behind them.
SAME_VALUES = frozenset({
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default, aten.alias.default,
    aten.clone.default, aten.contiguous.default, aten.detach.default, aten.detach_.default, aten.dropout.default,
    aten.lift_fresh_copy.default,
})  # fmt: skip
RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
# operation -> positions of (input, weight, bias), and the weight's layout
WEIGHT_OPS: Mapping[Any, tuple[int, int, int | None, str]] = {
    aten.linear.default: (0, 1, 2, "o k"),
    aten.addmm.default: (1, 2, 0, "k o"),
    aten.mm.default: (0, 1, None, "k o"),
    aten.matmul.default: (0, 1, None, "k o"),
}


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of a fused weight (qkv, gate_up) that the graph uses apart from the others."""

    start: int
    stop: int


@dataclass(frozen=True)
class Site:
    """One weight-bearing operation of a segment, or a value (`weight` None) that can be quantized without one.

    path: the module's path inside the segment. source: the graph node that feeds it; sites with one source share
    their statistics. layout: axes of the stored weight, "o k" (linear), "k o" (addmm), "e o k" (fused experts).
    rows: the parts of a fused weight.
    """

    path: str
    weight: str | None
    bias: str | None
    source: str
    op: str
    layout: str = "o k"
    rows: tuple[Part, ...] = ()


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

    def weight_ok(self, site: Site) -> Tensor:
        """The site's weight as fp32 [..., o, k], whatever its layout; refuses one that is rounded already."""
        leaf = self.params[site.weight] if site.weight else None
        if not isinstance(leaf, Tensor):
            raise QlabError(f"{self.where(site)} is quantized already; give each site one rounding method")
        W = leaf.float()
        return W.mT if site.layout.endswith("k o") else W


def by_source(sites: Iterable[Site]) -> dict[str, tuple[Site, ...]]:
    """Sites grouped by the node that feeds them, in running order."""
    groups: dict[str, tuple[Site, ...]] = {}
    for site in sites:
        groups[site.source] = (*groups.get(site.source, ()), site)
    return groups


# ------------------------------------------------------------------ trace
class _OnTensors(nn.Module):
    """The segment as a function of the tensors among its inputs; everything else is part of its structure."""

    def __init__(self, segment: nn.Module, args: tuple, kwargs: dict[str, Any]):
        super().__init__()
        self.segment = segment
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))

    def forward(self, *tensors: Tensor) -> Any:
        feed = iter(tensors)
        args, kwargs = pytree.tree_unflatten([next(feed) if isinstance(x, Tensor) else x for x in self.leaves], self.spec)
        return self.segment(*args, **kwargs)


def tensors_of(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tensors among a segment's inputs, in the order in which its graph takes them."""
    return tuple(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))


def trace(module: nn.Module, args: tuple, kwargs: dict[str, Any], path: str = "") -> ModuleGraph:
    """torch.export (non-strict) of one segment with weights lifted to inputs and every input dimension dynamic.

    `args` and `kwargs` are example inputs; tensor dimensions of size 1 are fixed to 1, the others stay symbolic.
    Refuses by name: a segment that export cannot trace, a weight used by an operation qlab does not know.
    """
    tensors = tensors_of(args, kwargs)
    auto = tuple({d: torch.export.Dim.AUTO for d, n in enumerate(t.shape) if n > 1} for t in tensors)
    where = path or type(module).__name__
    try:
        wrapped = _OnTensors(module, args, kwargs)
        exported = torch.export.export(wrapped, tensors, dynamic_shapes=(auto,), strict=False)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise QlabError(f"{where} ({type(module).__name__}) cannot be traced by torch.export: {reason}") from error
    graph = exported.graph
    for node in list(graph.nodes):  # these pin the graph to the device and dtype of the trace
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    signature = exported.graph_signature
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    params = {name: target.removeprefix("segment.") for name, target in lifted.items()}
    constants = {name: exported.constants[key] for name, key in signature.inputs_to_lifted_tensor_constants.items()}
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None  # an exported program always has one
    examples = tuple(t.to("meta") for t in tensors)
    code = Code(graph, params, constants, examples, out_spec, _sites(graph, params, where))
    leaves: dict[str, Leaf] = {name: t.detach() for name, t in module.named_parameters(remove_duplicate=False)}
    leaves |= {name: t for name, t in module.named_buffers(remove_duplicate=False) if name in params.values()}
    return ModuleGraph(code, leaves, path, next((t.dtype for t in leaves.values() if isinstance(t, Tensor)), torch.float32))


def root(node: fx.Node) -> fx.Node:
    """The node behind casts, copies and reshapes that keep the channel axis."""
    while node.op == "call_function":
        keeps = node.target in RESHAPES and node.meta["val"].shape[-1] == node.args[0].meta["val"].shape[-1]
        if node.target not in SAME_VALUES and not keeps:
            break
        node = node.args[0]
    return node


def _sites(graph: fx.Graph, params: Mapping[str, str], where: str) -> tuple[Site, ...]:
    sites, explained = [], set()
    for node in graph.nodes:
        if node.target not in WEIGHT_OPS:
            continue
        x_at, w_at, b_at, layout = WEIGHT_OPS[node.target]
        w = node.args[w_at]
        if w.name not in params:
            continue  # attention's own products, or a derived weight that _refuse_unknown finds
        bias = node.args[b_at] if b_at is not None and len(node.args) > b_at else None
        bias_path = params.get(bias.name) if bias is not None else None
        path = params[w.name].rpartition(".")[0] or params[w.name]
        sites.append(Site(path, params[w.name], bias_path, root(node.args[x_at]).name, node.target.name(), layout,
                          _parts(node)))
        explained.add((node, w))
    _refuse_unknown(graph, params, explained, where)
    return tuple(sites)


def _refuse_unknown(graph: fx.Graph, params: Mapping[str, str], explained: set, where: str) -> None:
    used: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in params and node.meta["val"].ndim >= 2:
            for user in node.users:
                if (user, node) not in explained:
                    raise QlabError(f"{where}.{params[node.name]} {tuple(node.meta['val'].shape)} is used by {user.target}, "
                                    "a weight-bearing operation qlab does not know; known are linear, addmm, mm and matmul")
                if params[node.name] in used:
                    raise QlabError(f"{where}.{params[node.name]} is used by two operations, {used[params[node.name]]} and "
                                    f"{user}; qlab needs one use per weight")
                used[params[node.name]] = user


def _parts(node: fx.Node) -> tuple[Part, ...]:
    """Row ranges that a fused output is cut into, read off its slices, splits and chunks along the channel axis."""
    users, last = list(node.users), node.meta["val"].ndim - 1
    while len(users) == 1 and users[0].target in SAME_VALUES:
        node, users = users[0], list(users[0].users)
    width, cuts = int(node.meta["val"].shape[-1]), set()
    for user in users:
        along = user.args[1] if len(user.args) > 1 and user.target is aten.slice.Tensor else user.args[-1]
        if user.target is aten.slice.Tensor and along in (-1, last):
            cuts.add((user.args[2] or 0, min(user.args[3], width)))
        elif user.target in (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default) and along in (-1, last):
            start = 0
            for piece in user.meta["val"]:
                cuts.add((start, start := start + int(piece.shape[-1])))
    return tuple(Part(*cut) for cut in sorted(cuts)) if len(cuts) > 1 else ()
