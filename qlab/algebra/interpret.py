"""What a segment computes: its traced program, run node by node on its leaves.

This is the reference for every faster way to run a segment. `interpret` runs all of it, `inputs_of`
only what the inputs of some sites depend on, and a `Walk` stops at every source, so that leaves may
change behind it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from qlab.algebra.edges import as_read, edges_of, run_ops
from qlab.algebra.experts import EXPERT_OPS, Rows, each_expert
from qlab.algebra.graph import (
    SAME_VALUES,
    WEIGHT_OPS,
    Code,
    ModuleGraph,
    by_source,
    fits,
    placed,
    tensors_of,
)
from qlab.algebra.leaf import Fetched, dense
from qlab.algebra.products import product_dtype
from qlab.algebra.wires import Wire, wire_named, wires
from qlab.errors import QlabError

NARROW = (torch.bfloat16, torch.float16)


class _Interpreter(fx.Interpreter):
    """Runs a graph. A site's weight is made dense where it is used, in the dtype of the input that
    it meets."""

    def __init__(self, mg: ModuleGraph, graph: fx.Graph):
        super().__init__(nn.Module(), graph=graph)
        # An error of an insert says what is wrong; where its node was traced adds nothing to that.
        self.extra_traceback = False
        self.mg = mg
        self.by_weight = {s.weight: s for s in mg.code.sites if s.weight}
        tensors = (t for t in pytree.tree_leaves(dict(mg.params)) if isinstance(t, Tensor))
        self.device = next((t.device for t in tensors), torch.device("cpu"))
        self.edges = edges_of(mg)
        self.whole = graph is mg.code.graph

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a node, after the inserts on the edges that lead to it."""
        # a program that ends early has an output of its own
        if n.name not in self.edges or (n.op == "output" and not self.whole):
            return super().fetch_args_kwargs_from_env(n)
        of_node = self.edges[n.name]
        leaves, form = pytree.tree_flatten(
            (n.args, n.kwargs), is_leaf=lambda a: isinstance(a, fx.Node)
        )
        values = [fx.map_arg(leaf, self.env.__getitem__) for leaf in leaves]
        ends = values[3] if n.target in EXPERT_OPS else None
        for place, inserts in of_node.items():
            for wire, ops in inserts:
                values[place] = run_ops(wire, ops, values[place], ends)
        return pytree.tree_unflatten(values, form)

    def placeholder(self, target: str, args: tuple, kwargs: dict) -> Any:
        code = self.mg.code
        if target in code.constants:
            return code.constants[target].to(self.device)
        if target not in code.params:
            return super().placeholder(target, args, kwargs)
        path = code.params[target]
        return _Weight(path) if path in self.by_weight else self.mg.running(path)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target in SAME_VALUES and isinstance(args[0], _Weight):
            return args[0]  # casts of a weight are skipped: it takes the dtype of its input
        if target in EXPERT_OPS and isinstance(args[1], _Weight):
            return self._each_expert(EXPERT_OPS[target], *args)
        if target in WEIGHT_OPS and isinstance(args[WEIGHT_OPS[target][1]], _Weight):
            return self._site(target, args, kwargs)
        return super().call_function(target, *placed(args, kwargs, self.device))

    def _site(self, target: Any, args: tuple, kwargs: dict) -> Tensor:
        """The operation of a site."""
        x_at, w_at, b_at, layout = WEIGHT_OPS[target]
        leaf = self.mg.running(args[w_at].path)
        run_operation = super().call_function

        def product(x: Tensor) -> Tensor:
            W, wide = dense(leaf, x.dtype), product_dtype(x)
            if not isinstance(leaf, Tensor) and layout == "k o":
                W = W.mT  # every leaf but a tensor is [o, k] in every layout
            new = list(args)
            new[x_at], new[w_at] = x.to(wide), W.to(wide)
            if b_at is not None and len(args) > b_at and args[b_at] is not None:
                new[b_at] = args[b_at].to(x.dtype).to(wide)
            return run_operation(target, *placed(tuple(new), kwargs, self.device)).to(x.dtype)

        return _multiplied(leaf, product, args[x_at])

    def _each_expert(
        self, layout: str, x_sk: Tensor, weight: "_Weight", bias_eo: Tensor | None, ends: Tensor
    ) -> Tensor:
        """The site of fused experts, of which one is dense at a time."""

        def product(e: int, leaf: Any, x_nk: Tensor) -> Tensor:
            W, wide = dense(leaf, x_nk.dtype), product_dtype(x_nk)
            W_ok = (W.mT if layout == "e k o" and isinstance(leaf, Tensor) else W).to(wide)
            bias_o = None if bias_eo is None else bias_eo[e].to(x_nk.dtype).to(wide)
            return F.linear(x_nk.to(wide), W_ok, bias_o).to(x_nk.dtype)

        def of_expert(e: int, x_nk: Tensor) -> Tensor:
            leaf = self.mg.running(weight.path, e)
            return _multiplied(leaf, partial(product, e, leaf), x_nk)

        return each_expert(x_sk, ends, of_expert)


def _multiplied(leaf: Any, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """product(x). With a leaf that is fetched it is computed once more on the way back, so that no
    gradient waits for it with the weight in its hands."""
    if isinstance(leaf, Fetched) and torch.is_grad_enabled():
        return checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)
    return product(x)


class _Wide(_Interpreter):
    """The same in float32 throughout. A program that was traced in a narrower dtype casts to it at
    fixed places; those casts go to float32 instead."""

    def placeholder(self, target: str, args: tuple, kwargs: dict) -> Any:
        value = super().placeholder(target, args, kwargs)
        return value.float() if isinstance(value, Tensor) and value.dtype in NARROW else value

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        wide_args = tuple(_wide(a) for a in args)
        wide_kwargs = {name: _wide(a) for name, a in kwargs.items()}
        return super().call_function(target, wide_args, wide_kwargs)


def _wide(argument: Any) -> Any:
    return torch.float32 if isinstance(argument, torch.dtype) and argument in NARROW else argument


@dataclass(frozen=True)
class _Weight:
    """Stands for a site's weight until the site runs."""

    path: str


def interpret(graph: ModuleGraph, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the segment returns for these arguments. Differentiable."""
    returned = outputs_of(graph, args, kwargs)[: graph.code.out_spec.num_leaves]
    return pytree.tree_unflatten(list(returned), graph.code.out_spec)


def outputs_of(
    graph: ModuleGraph, args: tuple, kwargs: dict[str, Any], wide: bool = False
) -> tuple[Any, ...]:
    """All outputs of the segment's program for these arguments (`Code.outputs`).

    wide: in float32 throughout, also where the model computes in bfloat16 or float16.
    """
    interpreter = _Wide if wide else _Interpreter
    return tuple(interpreter(graph, graph.code.graph).run(*_tensors(graph, args, kwargs)))


def _tensors(graph: ModuleGraph, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tensors among a segment's arguments. Refuses shapes that its program is not for."""
    tensors, traced = tensors_of(args, kwargs), graph.code.inputs
    where = graph.path or "the segment"
    if len(tensors) != len(traced):
        raise QlabError(
            f"{where} was traced with {len(traced)} input tensors and is called with "
            f"{len(tensors)}; trace it again for inputs of this form"
        )
    for t, sizes in zip(tensors, traced):
        if not fits(t, sizes):
            known = ", ".join("any" if n is None else str(n) for n in sizes)
            raise QlabError(
                f"{where} was traced with an input of ({known}) and is called with "
                f"{tuple(t.shape)}, for which its program may differ; use windows of one length, "
                "or trace it again"
            )
    return tensors


def inputs_of(
    graph: ModuleGraph,
    sources: Iterable[str],
    args: tuple,
    kwargs: dict[str, Any],
    calibrate_all_experts: bool = False,
) -> dict[str, Rows]:
    """The inputs of the sites of each source, after their online operations; of a source that is
    the name of a wire, what the wire brings, as rows.

    Only what those inputs depend on is computed: the last projection of a block never runs.
    calibrate_all_experts: every token goes to every expert.
    """
    asked = {source: _wire(graph.code, source) for source in sources}
    nodes = tuple((wire.node, _first_reader(graph.code, wire)) for wire in asked.values())
    routes = tuple(sorted({w.site.route for w in asked.values() if w.site and w.site.route}))
    ends = (*nodes, *((route, None) for route in routes))
    program = _ending_at(graph.code, ends, calibrate_all_experts)
    values = _Interpreter(graph, program).run(*_tensors(graph, args, kwargs))
    routed = dict(zip(routes, values[len(nodes) :]))
    return {
        source: _arriving(graph, wire, {**routed, wire.node: value})
        for (source, wire), value in zip(asked.items(), values)
    }


def values_at(
    graph: ModuleGraph,
    ends: Iterable[tuple[str, str | None]],
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[Any, ...]:
    """The values of nodes, each as it is in front of the operation that is named beside it, or at
    the end with None. Nothing else is computed."""
    program = _ending_at(graph.code, tuple(ends), False)
    return tuple(_Interpreter(graph, program).run(*_tensors(graph, args, kwargs)))


def _first_reader(code: Code, wire: Wire) -> str | None:
    """The operation that reads a wire first; None of inputs of sites, whose node is read."""
    if wire.kind == "in":
        return None
    places = {node.name: i for i, node in enumerate(code.graph.nodes)}
    return min((name for name, _ in wire.edges), key=places.__getitem__)


def _wire(code: Code, source: str) -> Wire:
    """A wire by its name, or the input of the first site that a node feeds."""
    sites = by_source(code.sites).get(source)
    return wire_named(code, f"{sites[0].path}:in" if sites else source)


def _arriving(graph: ModuleGraph, wire: Wire, values: Mapping[str, Any]) -> Rows:
    """What a wire brings, after its inserts. values: by name of node."""
    route = wire.site.route if wire.site else None
    _, tokens, ends = values[route] if route else (None, None, None)
    x = as_read(graph, wire.node, values[wire.node])
    if not wire.whole:
        x = run_ops(wire, graph.inserts.get(wire.name, ()), x, ends)
    return Rows(wire.rows(x), tokens, ends)


@lru_cache(maxsize=32)
def _ending_at(
    code: Code, ends: tuple[tuple[str, str | None], ...], calibrate_all_experts: bool
) -> fx.Graph:
    """A copy of the program that returns values of nodes and computes nothing else.

    ends: nodes, each with the operation in front of which its value is taken, since a program may
    write to it later; with None it is taken at the end.
    """
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    copy.graph_copy(code.graph, copies)
    by_name = {node.name: copied for node, copied in copies.items()}
    for node in copy.nodes:
        if calibrate_all_experts and node.target is torch.ops.qlab.route.default:
            node.target = torch.ops.qlab.route_everywhere.default
    in_place = any(map(_writes, copy.nodes))

    def taken(name: str, reader: str | None) -> fx.Node:
        if not in_place or reader not in by_name:
            return by_name[name]
        with copy.inserting_before(by_name[reader]):
            return copy.call_function(torch.ops.aten.clone.default, (by_name[name],))

    values = [taken(name, reader) for name, reader in ends]
    copy.output(tuple(values))
    copy.eliminate_dead_code(
        is_impure_node=lambda n: n.op in ("placeholder", "output") or _writes(n)
    )
    return copy


def _writes(node: fx.Node) -> bool:
    """Whether this is an operation in place. Nodes that read its target through another view do not
    depend on it by the graph's edges."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class Walk:
    """One run of a segment that stops at sources, so that leaves may change behind a stop before
    the run goes on.

    Sources are visited in running order (`by_source`). Each step reads the leaves of the graph that
    it is given. A walk that forgets its values starts over at the next step.
    """

    def __init__(self, code: Code):
        self.code = code
        self.nodes = list(code.graph.nodes)
        self.inputs = sum(node.op == "placeholder" for node in self.nodes)
        self.env: dict[fx.Node, Any] = {}
        self.position = 0  # nodes that have run

    def to(self, graph: ModuleGraph, source: str, args: tuple, kwargs: dict[str, Any]) -> Rows:
        """The input of a source's sites, or what a wire brings, as `inputs_of` gives it."""
        wire = _wire(self.code, source)
        places = {node.name: i for i, node in enumerate(self.nodes)}
        # the value of a wire may be written to until it is read
        of_source = wire.kind == "in"
        stop = places[wire.node] + 1 if of_source else min(places[n] for n, _ in wire.edges)
        self._advance(graph, max(self.position, stop), args, kwargs)
        return _arriving(graph, wire, {n.name: value for n, value in self.env.items()})

    def end(self, graph: ModuleGraph, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All outputs of the segment's program (`Code.outputs`)."""
        out = self._advance(graph, len(self.nodes), args, kwargs)
        self.forget()
        return tuple(out)

    def _advance(self, graph: ModuleGraph, stop: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the nodes before `stop`, and return the value of the last one."""
        interpreter = _Interpreter(graph, self.code.graph)
        inputs = () if self.position else _tensors(graph, args, kwargs)
        interpreter.args_iter = iter(inputs)
        interpreter.env, value = self.env, None
        stop = max(stop, self.inputs)  # a walk takes all inputs when it begins
        for node in self.nodes[self.position : stop]:
            self.env[node] = value = interpreter.run_node(node)
            for dead in _last_uses(self.code).get(node, ()):
                del self.env[dead]
        self.position = max(self.position, stop)
        return value

    def value(self, name: str) -> Any:
        """The value of a node that is still to be read."""
        return next(value for node, value in self.env.items() if node.name == name)

    def ahead(
        self,
        graph: ModuleGraph,
        ends: Sequence[tuple[str, str | None]],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> list[Any]:
        """The values of nodes, each in front of the operation that is named beside it or, with
        None, at once. The walk goes on to there, so the leaves that it passes may not change any
        more."""
        places = {node.name: i for i, node in enumerate(self.nodes)}
        stops = (places[node] + 1 if reader is None else places[reader] for node, reader in ends)
        self._advance(graph, max(self.position, *stops), args, kwargs)
        return [self.value(node) for node, _ in ends]

    def forget(self) -> None:
        """Let go of every value."""
        self.env, self.position = {}, 0

    def nbytes(self) -> int:
        """Bytes of the values that are waiting to be used, without inputs and leaves."""
        storages = {}
        for node, value in self.env.items():
            if node.op != "placeholder" and isinstance(value, Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


@lru_cache(maxsize=32)
def _last_uses(code: Code) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """node -> the values that nothing needs once it has run. The input of a source, and a route,
    live until the last site that they feed has run."""
    nodes = list(code.graph.nodes)
    places = {node: i for i, node in enumerate(nodes)}
    by_name = {node.name: node for node in nodes}
    placeholders = {path: by_name[name] for name, path in code.params.items()}
    last = {
        node: max((places[user] for user in node.users), default=places[node]) for node in nodes
    }
    for site in code.sites:
        if site.weight is None:
            continue
        used = max((places[user] for user in placeholders[site.weight].users), default=0)
        for name in (site.source, site.route):
            if name:
                last[by_name[name]] = max(last[by_name[name]], used)
    for wire in wires(code).values():
        if wire.kind == "out" and wire.site and wire.site.route:
            read = max(places[by_name[name]] for name, _ in wire.edges)
            last[by_name[wire.site.route]] = max(last[by_name[wire.site.route]], read)
    uses: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node, place in last.items():
        if node.op != "output":
            uses[nodes[place]] = (*uses.get(nodes[place], ()), node)
    return uses
