"""One segment of a model (a decoder block) as an immutable value.

`Code` is the traced program, shared by all segments of the same structure. `Site`s are its
operations with a weight. `ModuleGraph` is one segment: a program and its leaves, by path.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from qlab.algebra.experts import EXPERT_OPS
from qlab.algebra.leaf import Structured, dense, of_expert
from qlab.algebra.qtensor import Params
from qlab.algebra.tracing.taken_apart import Form, take_apart
from qlab.errors import QlabError

aten = torch.ops.aten
# x -> x; an operation that is `per_expert` is also given the ends of the experts' rows
Op = Callable[..., Tensor]

# Operations that hand on the same numbers, channel for channel. A site's input is what stands
# before them.
SAME_VALUES = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten._to_copy.default,
        aten.type_as.default,
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.detach_.default,
        aten.dropout.default,
        aten.lift_fresh_copy.default,
    }
)
RESHAPES = frozenset({aten.reshape.default, aten._unsafe_view.default})
# Operations that move numbers and change none.
LAYOUT = frozenset(
    {
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.transpose.int,
        aten.permute.default,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.slice.Tensor,
        aten.select.int,
        aten.t.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.narrow.default,
        aten.repeat_interleave.self_int,
        aten.repeat.default,
    }
)
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


def weight_of(code: "Code", product: fx.Node) -> str | None:
    """The name of the leaf that a product of WEIGHT_OPS multiplies by; None of what is computed."""
    weight = product.args[WEIGHT_OPS[product.target][1]]
    return code.params.get(behind_casts(weight).name) if isinstance(weight, fx.Node) else None


def is_matrix(shape: Iterable[Any]) -> bool:
    """Whether a parameter of this shape may be a matrix: more than one axis is longer than 1."""
    return sum(n > 1 for n in shape) > 1


def open_symbols(size: Any) -> set:
    """The symbols in a size of a traced tensor. There are none where the program fixes the size."""
    return size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()


def placed(
    args: tuple, kwargs: Mapping[str, Any], device: torch.device
) -> tuple[tuple, dict[str, Any]]:
    """An operation's arguments with `device` in the place of every device among them: what a
    segment makes itself (a mask, positions) lies where its inputs do, not where it was traced."""

    def place(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    return tuple(map(place, args)), {name: place(a) for name, a in kwargs.items()}


@dataclass(frozen=True)
class Site:
    """One operation of a segment that has a weight.

    path: the module's path inside the segment. weight, bias: paths of the leaves. source: the graph
    node that feeds it; sites of one source share their statistics. layout: the axes of the stored
    weight, "o k" (linear), "k o" (addmm), "e o k" or "e k o" (fused experts).

    Of fused experts: gathered_from is the node whose rows the input holds in the order of experts,
    unless experts made the input; route is the node that says which rows belong to which expert;
    choices is the number of experts that a token goes to.

    router: it decides where tokens go, or is a gate of one number per token (of a shared expert).
    Routers are small, and every engine reads them dense, so they are never rounded. outside: the
    weight lies around the blocks (the head, a projector).
    """

    path: str
    weight: str | None
    bias: str | None
    source: str
    layout: str = "o k"
    gathered_from: str | None = None
    route: str | None = None
    choices: int = 1
    router: bool = False
    outside: bool = False

    @property
    def origin(self) -> str:
        """The node whose channels reach the site, in whatever rows. Sites of one origin share a
        change of basis."""
        return self.gathered_from or self.source


@dataclass(frozen=True)
class Given:
    """One of the tensors that a segment is called with."""

    index: int


@dataclass(frozen=True)
class Made:
    """One of the tensors that a segment leaves in what it is called with."""

    index: int


@dataclass(frozen=True)
class Left:
    """The lists, dictionaries and objects that a segment was called with, as it leaves them: their
    form and leaves."""

    form: Form
    leaves: tuple[Any, ...]


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Code:
    """The traced program of a segment, shared by all segments of the same structure. It is never
    edited.

    graph: the program. params: placeholder -> path of the leaf. constants: placeholder -> tensor.
    inputs: the shape of each input tensor, with None for a size that may be any. out_spec: the form
    of what the segment returns. sites: its operations with a weight, in running order.

    outputs: what the program gives, as it was traced: the leaves of what the segment returns, then
    the tensors that it leaves in its arguments. left: where those lie there. unread: path of a
    matrix that is used but is no site's weight -> the reason; it stays dense, and no step reaches
    it. kept: where in its attributes the module leaves tensors, which no program does.
    """

    graph: fx.Graph
    params: Mapping[str, str]
    constants: Mapping[str, Tensor]
    inputs: tuple[tuple[int | None, ...], ...]
    out_spec: pytree.TreeSpec
    sites: tuple[Site, ...]
    outputs: tuple[Any, ...] = ()
    left: Left | None = None
    unread: Mapping[str, str] = field(default_factory=dict)
    kept: tuple[tuple[Any, ...], ...] = ()


@dataclass(frozen=True)
class ModuleGraph:
    """One segment as an immutable value. Transforms return new ones.

    code: its program. params: path -> leaf: a tensor, a QTensor or any other (`leaf.Structured`).
    path: the segment's path in the model. dtype: what most of its leaves are stored in. online,
    online_outputs: site path -> the operations at run time on the site's input, and on its output.
    online_values: wire -> those on any other value (`wires`); `inserts` are all of them. selected,
    selected_wires: paths of the sites, and names of the wires, that a transform may touch (None:
    all). notes: site path -> what stages report of it. outers: site path -> a global scale that was
    fixed beforehand.

    supports: leaf -> bool [..., o, k], False where a step set the weight to 0, so that it stays 0.
    targets: leaf -> what the weight is to be near to, in the layout of its dense form, where that
    is not the leaf itself.

    stored: leaf -> the dtype that the files hold it in, where that is not `dtype`. held: leaf ->
    the dtype that the model computes with, where that is not the leaf's own.
    """

    code: Code
    params: Params
    path: str = ""
    dtype: torch.dtype = torch.float32
    online: Mapping[str, tuple[Op, ...]] = field(default_factory=dict)
    online_outputs: Mapping[str, tuple[Op, ...]] = field(default_factory=dict)
    selected: frozenset[str] | None = None
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    outers: Mapping[str, Tensor] = field(default_factory=dict)
    stored: Mapping[str, torch.dtype] = field(default_factory=dict)
    held: Mapping[str, torch.dtype] = field(default_factory=dict)
    supports: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    online_values: Mapping[str, tuple[Op, ...]] = field(default_factory=dict)
    selected_wires: frozenset[str] | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """The selected sites, in the order in which the segment runs them."""
        return tuple(s for s in self.code.sites if self.selected is None or s.path in self.selected)

    @property
    def inserts(self) -> Mapping[str, tuple[Op, ...]]:
        """Wire -> the operations on it at run time, where there are any: those at the inputs and
        outputs of sites, and on other values."""
        of_sites = {
            **{f"{path}:in": ops for path, ops in self.online.items()},
            **{f"{path}:out": ops for path, ops in self.online_outputs.items()},
        }
        return {wire: ops for wire, ops in {**of_sites, **self.online_values}.items() if ops}

    def with_inserts(self, inserts: Mapping[str, tuple[Op, ...]]) -> "ModuleGraph":
        """The same graph with these operations on its wires, and no others."""
        online, outputs, values = {}, {}, {}
        paths = {site.path for site in self.code.sites}  # of other modules too there are values
        for wire, ops in inserts.items():
            owner, _, kind = wire.rpartition(":")
            if kind == "in" and owner in paths:
                online[owner] = ops
            elif kind == "out" and owner in paths:
                outputs[owner] = ops
            else:
                values[wire] = ops
        return replace(self, online=online, online_outputs=outputs, online_values=values)

    def inserting(self, wire: str, *ops: Op) -> "ModuleGraph":
        """The same graph with operations on a wire, behind those that are there."""
        inserts = self.inserts
        return self.with_inserts({**inserts, wire: (*inserts.get(wire, ()), *ops)})

    def where(self, site: Site) -> str:
        """The site's full name in the model."""
        return f"{self.path}.{site.path}" if self.path else site.path

    def update(self, leaves: Mapping[str, Tensor | Structured]) -> "ModuleGraph":
        """The same graph with some leaves replaced. A new tensor is its own target; the target of
        any other leaf is what was the target before it."""
        targets = {name: t for name, t in self.targets.items() if name not in leaves}
        for name, leaf in leaves.items():
            before = self.targets.get(name, self.params.get(name))
            if not isinstance(leaf, Tensor) and isinstance(before, Tensor):
                targets[name] = before
        return replace(self, params={**self.params, **leaves}, targets=targets)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype in which an unquantized leaf is written."""
        return self.stored.get(name, self.dtype)

    def running(self, name: str, expert: int | None = None) -> Tensor | Structured:
        """A leaf, or one expert of it, as the model computes with it. A leaf that is still as the
        files hold it is cast to the dtype that the model holds it in."""
        leaf = self.params[name]
        if expert is not None:
            leaf = of_expert(leaf, expert)
        as_in_files = (
            name in self.held and isinstance(leaf, Tensor) and leaf.dtype == self.stored_dtype(name)
        )
        return leaf.to(self.held[name]) if as_in_files else leaf

    def weight_ok(self, site: Site, expert: int | None = None) -> Tensor:
        """The site's weight in fp32, [..., o, k] in every layout, or that of one expert [o, k].
        Refuses a weight that is quantized."""
        leaf = self.params[site.weight] if site.weight else None
        if not isinstance(leaf, Tensor):
            raise QlabError(
                f"{self.where(site)} is quantized already; give each site one rounding method"
            )
        W = leaf.float() if expert is None else leaf[expert].float()
        return W.mT if site.layout.endswith("k o") else W

    def leaf_ok(self, site: Site, expert: int | None = None) -> Tensor | Structured:
        """The site's leaf, or that of one expert, as it is; a tensor as `weight_ok` gives it."""
        leaf = self.params[site.weight or ""]
        if isinstance(leaf, Tensor):
            return self.weight_ok(site, expert)
        return leaf if expert is None else of_expert(leaf, expert)

    def target_ok(self, site: Site, expert: int | None = None) -> Tensor:
        """What the site's weight is to be near to, in fp32 [..., o, k], or that of one expert.
        Codes that no step of this run made are their own target."""
        target = self.targets.get(site.weight or "")
        if target is None:
            return dense(self.leaf_ok(site, expert), torch.float32)
        W = target.float() if expert is None else target[expert].float()
        return W.mT if site.layout.endswith("k o") else W

    def support_ok(self, site: Site, expert: int | None = None) -> Tensor | None:
        """Where the site's weight may differ from 0, bool [..., o, k]; None where it may
        everywhere."""
        support = self.supports.get(site.weight or "")
        return support if support is None or expert is None else support[expert]

    def shares_memory(self, site: Site) -> bool:
        """Whether `weight_ok` is a view of the leaf, which is float32 already, and no copy."""
        leaf = self.params[site.weight] if site.weight else None
        return isinstance(leaf, Tensor) and leaf.dtype == torch.float32


def lone_weight(
    path: str,
    W_ok: Tensor,
    dtype: torch.dtype | None = None,
    outside: bool = False,
    outer: Tensor | None = None,
) -> ModuleGraph:
    """A weight [o, k] by itself as a segment of one site, for stages that need no data.

    dtype: that of most of its model, which its scales take; the default is its own. outer: the
    global scale that it shares with weights elsewhere.
    """
    site = Site(path=path, weight="weight", bias=None, source=path, outside=outside)
    code = Code(
        graph=fx.Graph(),
        params={},
        constants={},
        inputs=(),
        out_spec=pytree.tree_structure(None),
        sites=(site,),
    )
    outers = {} if outer is None else {path: outer}
    return ModuleGraph(code, {"weight": W_ok}, dtype=dtype or W_ok.dtype, outers=outers)


def by_source(sites: Iterable[Site]) -> dict[str, tuple[Site, ...]]:
    """Sites grouped by the node that feeds them, in running order. They see the same rows."""
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
    """The tensors among a segment's arguments, in the order in which its program takes them."""
    return tuple(x for x in take_apart((args, kwargs))[0] if isinstance(x, Tensor))


def runs_on(code: Code, tensors: Sequence[Tensor]) -> bool:
    """Whether a program is for inputs of these shapes."""
    if len(tensors) != len(code.inputs):
        return False
    return all(fits(t, sizes) for t, sizes in zip(tensors, code.inputs))


def fits(t: Tensor, sizes: Sequence[int | None]) -> bool:
    """Whether a tensor is of a traced shape, in which None is any size."""
    return t.ndim == len(sizes) and all(n in (None, m) for n, m in zip(sizes, t.shape))
