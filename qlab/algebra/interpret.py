"""What a segment computes: its graph run node by node, with every leaf as it is at that moment. The
reference reading."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qlab.algebra.experts import EXPERT_OPS, Rows, each_expert
from qlab.algebra.graph import (
    SAME_VALUES,
    WEIGHT_OPS,
    Code,
    ModuleGraph,
    Op,
    Site,
    by_source,
    fits,
    placed,
    tensors_of,
)
from qlab.algebra.products import product_dtype
from qlab.algebra.qtensor import QTensor, dense
from qlab.errors import QlabError

NARROW = (torch.bfloat16, torch.float16)


class _Interpreter(fx.Interpreter):
    """Runs a graph with its leaves dequantized where they are used, in the dtype of the input they
    meet."""

    def __init__(self, mg: ModuleGraph, graph: fx.Graph):
        super().__init__(nn.Module(), graph=graph)
        self.mg = mg
        self.by_weight = {s.weight: s for s in mg.code.sites if s.weight}
        self.device = next(
            (t.device for t in pytree.tree_leaves(dict(mg.params)) if isinstance(t, Tensor)),
            torch.device("cpu"),
        )

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
            return args[0]  # a weight is read in the dtype of the input it meets
        if target in EXPERT_OPS and isinstance(args[1], _Weight):
            return self._each_expert(EXPERT_OPS[target], *args)
        if target in WEIGHT_OPS and isinstance(args[WEIGHT_OPS[target][1]], _Weight):
            x_at, w_at, b_at, layout = WEIGHT_OPS[target]
            site, x = self.by_weight[args[w_at].path], args[x_at]
            for op in self.mg.online.get(site.path, ()):
                x = op(x)
            leaf = self.mg.running(args[w_at].path)
            W, wide = dense(leaf, x.dtype), product_dtype(x)
            new = list(args)
            # codes are always [o, k]; an unquantized weight still has its own layout
            new[x_at], new[w_at] = (
                x.to(wide),
                (W.mT if isinstance(leaf, QTensor) and layout == "k o" else W).to(wide),
            )
            if b_at is not None and len(args) > b_at and args[b_at] is not None:
                new[b_at] = args[b_at].to(x.dtype).to(wide)
            y = super().call_function(target, *placed(tuple(new), kwargs, self.device)).to(x.dtype)
            for op in self.mg.online_outputs.get(site.path, ()):
                y = op(y)
            return y
        return super().call_function(target, *placed(args, kwargs, self.device))

    def _each_expert(
        self, layout: str, x_sk: Tensor, weight: "_Weight", bias_eo: Tensor | None, ends: Tensor
    ) -> Tensor:
        for op in self.mg.online.get(self.by_weight[weight.path].path, ()):
            x_sk = _run_op(op, x_sk, ends)

        def product(e: int, x_nk: Tensor) -> Tensor:  # one expert is dense at a time
            leaf = self.mg.running(weight.path, e)
            W, wide = dense(leaf, x_nk.dtype), product_dtype(x_nk)
            W_ok = (W.mT if layout == "e k o" and isinstance(leaf, Tensor) else W).to(wide)
            bias_o = None if bias_eo is None else bias_eo[e].to(x_nk.dtype).to(wide)
            return F.linear(x_nk.to(wide), W_ok, bias_o).to(x_nk.dtype)

        return each_expert(x_sk, ends, product)


class _Wide(_Interpreter):
    """The same in float32 where the program was traced in a narrower dtype: it casts to that at
    fixed places."""

    def placeholder(self, target: str, args: tuple, kwargs: dict) -> Any:
        value = super().placeholder(target, args, kwargs)
        return value.float() if isinstance(value, Tensor) and value.dtype in NARROW else value

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        wide_args = tuple(_wide(a) for a in args)
        return super().call_function(
            target, wide_args, {name: _wide(a) for name, a in kwargs.items()}
        )


def _wide(argument: Any) -> Any:
    return torch.float32 if isinstance(argument, torch.dtype) and argument in NARROW else argument


@dataclass(frozen=True)
class _Weight:
    """Stands for a site's weight until the site runs."""

    path: str


def interpret(graph: ModuleGraph, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the segment computes on these inputs, with every leaf as it is now. Differentiable; the
    reference reading."""
    returned = outputs_of(graph, args, kwargs)[: graph.code.out_spec.num_leaves]
    return pytree.tree_unflatten(list(returned), graph.code.out_spec)


def outputs_of(
    graph: ModuleGraph, args: tuple, kwargs: dict[str, Any], wide: bool = False
) -> tuple[Any, ...]:
    """All that the segment's program gives on these inputs (see Code.outputs).

    wide: in float32 throughout, also where the model computes in bfloat16 or float16.
    """
    reading = _Wide if wide else _Interpreter
    return tuple(reading(graph, graph.code.graph).run(*_tensors(graph, args, kwargs)))


def _run(graph: ModuleGraph, code: fx.Graph, args: tuple, kwargs: dict[str, Any]) -> Any:
    return _Interpreter(graph, code).run(*_tensors(graph, args, kwargs))


def _tensors(graph: ModuleGraph, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
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
    """What reaches the sites of each source, online operations included, and nothing beyond them.

    Only what the sources depend on is computed: the last projection of a block never runs here.
    calibrate_all_experts: every token goes to every expert, for statistics.
    """
    wanted = tuple(sources)
    routes = tuple(sorted({r for s in wanted if (r := _first(graph, s).route)}))
    env = dict(
        zip(
            wanted + routes,
            _run(
                graph, _ending_at(graph.code, wanted + routes, calibrate_all_experts), args, kwargs
            ),
        )
    )
    return {source: _arriving(graph, source, env) for source in wanted}


def _first(graph: ModuleGraph, source: str) -> Site:
    return by_source(graph.code.sites)[source][0]


def _arriving(graph: ModuleGraph, source: str, env: Mapping[str, Any]) -> Rows:
    """The input of a source's sites, once their online operations have run."""
    site, x = _first(graph, source), env[source]
    _, tokens, ends = env[site.route] if site.route else (None, None, None)
    for op in graph.online.get(site.path, ()):
        x = _run_op(op, x, ends)
    return Rows(x, tokens, ends)


def _run_op(op: Op, x: Tensor, ends: Tensor | None) -> Tensor:
    return op(x, ends) if getattr(op, "per_expert", False) else op(x)


@lru_cache(maxsize=32)
def _ending_at(code: Code, sources: tuple[str, ...], calibrate_all_experts: bool) -> fx.Graph:
    """A copy of the program that returns these nodes and holds nothing they do not need."""
    copy = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    copy.graph_copy(code.graph, env)
    by_name = {old.name: new for old, new in env.items()}
    for node in copy.nodes:
        if calibrate_all_experts and node.target is torch.ops.qlab.route.default:
            node.target = torch.ops.qlab.route_everywhere.default
    copy.output(tuple(by_name[s] for s in sources))
    copy.eliminate_dead_code(
        is_impure_node=lambda n: n.op in ("placeholder", "output") or _writes(n)
    )
    return copy


def _writes(node: fx.Node) -> bool:
    # an operation in place: who reads its target through another view does not show in the graph's
    # edges
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class Walk:
    """One run of a segment that stops at sources, so that its leaves may change behind the stop
    before it goes on.

    Sources are visited in running order (`by_source`); the graph given to each step is read where
    it runs. A walk that forgets its values starts over at the next step and arrives at the same
    ones.
    """

    def __init__(self, code: Code):
        self.code = code
        self.nodes = list(code.graph.nodes)
        self.inputs = sum(node.op == "placeholder" for node in self.nodes)
        self.env: dict[fx.Node, Any] = {}
        self.done = 0

    def to(self, graph: ModuleGraph, source: str, args: tuple, kwargs: dict[str, Any]) -> Rows:
        """What reaches the sites of a source, online operations included."""
        node = next(n for n in self.nodes if n.name == source)
        self._advance(graph, max(self.done, self.nodes.index(node) + 1), args, kwargs)
        return _arriving(graph, source, {n.name: value for n, value in self.env.items()})

    def end(self, graph: ModuleGraph, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All that the segment's program gives."""
        out = self._advance(graph, len(self.nodes), args, kwargs)
        self.forget()
        return tuple(out)

    def _advance(self, graph: ModuleGraph, stop: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        interpreter = _Interpreter(graph, self.code.graph)
        interpreter.args_iter = iter(_tensors(graph, args, kwargs) if not self.done else ())
        interpreter.env, value = self.env, None
        stop = max(stop, self.inputs)  # they come all at once, when the walk begins
        for node in self.nodes[self.done : stop]:
            self.env[node] = value = interpreter.run_node(node)
            for dead in _last_uses(self.code).get(node, ()):
                del self.env[dead]
        self.done = max(self.done, stop)
        return value

    def forget(self) -> None:
        """Let go of every value."""
        self.env, self.done = {}, 0

    def nbytes(self) -> int:
        """Bytes of the values that are waiting to be used, beside the segment's own inputs and
        leaves."""
        waiting = [
            v for n, v in self.env.items() if n.op != "placeholder" and isinstance(v, Tensor)
        ]
        return sum(
            s.nbytes()
            for s in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in waiting}.values()
        )


@lru_cache(maxsize=32)
def _last_uses(code: Code) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """node -> the values nobody needs once it has run. The input of a source, and a route, live
    until the last site has."""
    nodes = list(code.graph.nodes)
    at = {node: i for i, node in enumerate(nodes)}
    last = {node: max((at[user] for user in node.users), default=at[node]) for node in nodes}
    weights = {path: name for name, path in code.params.items()}
    by_name = {node.name: node for node in nodes}
    for site in code.sites:
        used = (
            max((at[user] for user in by_name[weights[site.weight]].users), default=0)
            if site.weight
            else 0
        )
        for held in filter(None, (site.source, site.route)):
            last[by_name[held]] = max(last[by_name[held]], used)
    uses: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node, i in last.items():
        if node.op != "output":
            uses[nodes[i]] = (*uses.get(nodes[i], ()), node)
    return uses
