"""What a segment computes: its graph run node by node, with every leaf as it is at that moment. The reference reading."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qlab.errors import QlabError
from qlab.graph import WEIGHT_OPS, Code, ModuleGraph, by_source, tensors_of
from qlab.qtensor import QTensor, dense


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
        path = code.params[target]
        return _Weight(path) if path in self.by_weight else self.mg.params[path]

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target in WEIGHT_OPS and isinstance(args[WEIGHT_OPS[target][1]], _Weight):
            x_at, w_at, b_at, layout = WEIGHT_OPS[target]
            site, x = self.by_weight[args[w_at].path], args[x_at]
            for op in self.mg.online.get(site.path, ()):
                x = op(x)
            leaf = self.mg.params[args[w_at].path]
            W = dense(leaf, x.dtype)
            new = list(args)
            # codes are always [o, k]; an unquantized weight still has its own layout
            new[x_at], new[w_at] = x, W.mT if isinstance(leaf, QTensor) and layout == "k o" else W
            if b_at is not None and len(args) > b_at and args[b_at] is not None:
                new[b_at] = args[b_at].to(x.dtype)
            args = tuple(new)
        return super().call_function(target, args, kwargs)


@dataclass(frozen=True)
class _Weight:
    """Stands for a site's weight until the site runs."""

    path: str


def interpret(graph: ModuleGraph, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the segment computes on these inputs, with every leaf as it is now. Differentiable; the reference reading."""
    out = _run(graph, graph.code.graph, args, kwargs)
    return pytree.tree_unflatten(list(out), graph.code.out_spec)


def _run(graph: ModuleGraph, code: fx.Graph, args: tuple, kwargs: dict[str, Any]) -> Any:
    return _Interpreter(graph, code).run(*_tensors(graph, args, kwargs))


def _tensors(graph: ModuleGraph, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    tensors, traced = tensors_of(args, kwargs), graph.code.examples
    if len(tensors) != len(traced):
        raise QlabError(f"{graph.path or 'the segment'} was traced with {len(traced)} input tensors and is called with "
                        f"{len(tensors)}; trace it again for inputs of this form")
    return tensors


def inputs_of(graph: ModuleGraph, sources: Iterable[str], args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors x [..., k] that reach the sites of each source, online operations included, and nothing beyond them.

    Only what the sources depend on is computed: the last projection of a block never runs here.
    """
    wanted = tuple(sources)
    x = dict(zip(wanted, _run(graph, _ending_at(graph.code, wanted), args, kwargs)))
    return {source: _online(graph, source, x[source]) for source in wanted}


def _online(graph: ModuleGraph, source: str, x: Tensor) -> Tensor:
    """The input of a source's sites, once their online operations have run."""
    for op in graph.online.get(by_source(graph.code.sites)[source][0].path, ()):
        x = op(x)
    return x


@lru_cache(maxsize=32)
def _ending_at(code: Code, sources: tuple[str, ...]) -> fx.Graph:
    """A copy of the program that returns these nodes and holds nothing they do not need."""
    copy = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    copy.graph_copy(code.graph, env)
    by_name = {old.name: new for old, new in env.items()}
    copy.output(tuple(by_name[s] for s in sources))
    copy.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or _writes(n))
    return copy


def _writes(node: fx.Node) -> bool:
    # an operation in place: who reads its target through another view does not show in the graph's edges
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class Walk:
    """One run of a segment that stops at sources, so that its leaves may change behind the stop before it goes on.

    Sources are visited in running order (`by_source`); the graph given to each step is read where it runs. A walk that
    forgets its values starts over at the next step and arrives at the same ones.
    """

    def __init__(self, code: Code):
        self.code = code
        self.nodes = list(code.graph.nodes)
        self.inputs = sum(node.op == "placeholder" for node in self.nodes)
        self.env: dict[fx.Node, Any] = {}
        self.done = 0

    def to(self, graph: ModuleGraph, source: str, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The tensor x [..., k] that reaches the sites of a source, online operations included."""
        node = next(n for n in self.nodes if n.name == source)
        self._advance(graph, max(self.done, self.nodes.index(node) + 1), args, kwargs)
        return _online(graph, source, self.env[node])

    def end(self, graph: ModuleGraph, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the segment returns."""
        out = self._advance(graph, len(self.nodes), args, kwargs)
        self.forget()
        return pytree.tree_unflatten(list(out), self.code.out_spec)

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
        """Bytes of the values that are waiting to be used, beside the segment's own inputs and leaves."""
        waiting = [v for n, v in self.env.items() if n.op != "placeholder" and isinstance(v, Tensor)]
        return sum(s.nbytes() for s in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in waiting}.values())


@lru_cache(maxsize=32)
def _last_uses(code: Code) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """node -> the values nobody needs once it has run. The input of a source lives until its last site has."""
    nodes = list(code.graph.nodes)
    at = {node: i for i, node in enumerate(nodes)}
    last = {node: max((at[user] for user in node.users), default=at[node]) for node in nodes}
    weights = {path: name for name, path in code.params.items()}
    by_name = {node.name: node for node in nodes}
    for site in code.sites:
        used = max((at[user] for user in by_name[weights[site.weight]].users), default=0) if site.weight else 0
        last[by_name[site.source]] = max(last[by_name[site.source]], used)
    uses: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node, i in last.items():
        if node.op != "output":
            uses[nodes[i]] = (*uses.get(nodes[i], ()), node)
    return uses
