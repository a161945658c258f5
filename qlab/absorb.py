"""Fold online scales into what produces a site's input, found by a walk over the graph: no table of architectures.

A positive scale per channel can move upstream through every operation that is homogeneous in that channel. So each
candidate producer (a norm's weight, a linear's rows) labels its output channels with their numbers, and the labels are
carried forward through the traced program: views move them, attention copies them from values to outputs (under
grouped queries one label reaches several channels), a product with something unlabelled keeps them, and any other
operation *leaks* them. A source can be scaled by a producer if labels cover all of its channels and none of those
labels leaks or reaches another source.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from qlab.errors import QlabError
from qlab.graph import SAME_VALUES, WEIGHT_OPS, Code, ModuleGraph, aten, behind_casts, by_origin, placed
from qlab.qtensor import Leaf
from qlab.transform import Multiply, Stage, Transform

LAYOUT = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int, aten.t.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.flatten.using_ints,
    aten.unflatten.int, aten.narrow.default, aten.repeat_interleave.self_int,
    aten.repeat.default,
})  # fmt: skip
HOMOGENEOUS = SAME_VALUES | {aten.relu.default, aten.neg.default, aten.leaky_relu.default, aten.abs.default}
PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
HARMLESS = frozenset({aten.sym_size.int, aten.new_empty.default, aten.new_zeros.default, aten.empty_like.default})
NORMS = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2, None)}  # positions of weight and bias
NONE = -1  # the label of a channel that this producer does not feed


@dataclass(frozen=True)
class Producer:
    """A node whose output channel c is scaled by t[c] when (weight + offset)[c] and bias[c] are."""

    node: str
    weight: str
    bias: str | None
    offset: float
    rows: bool  # the weight is a matrix whose rows (columns when `transposed`) are the channels
    transposed: bool = False


@dataclass(frozen=True)
class Fold:
    """Scaling channel j of a source is scaling channel index_k[j] of the producer."""

    producer: Producer
    index_k: Tensor

    def tie(self, m_k: Tensor) -> Tensor:
        """The mean of m over the channels of the source that one producer channel feeds, back on the source [k]."""
        size = int(self.index_k.max()) + 1
        total = m_k.new_zeros(size).index_add_(0, self.index_k, m_k)
        count = m_k.new_zeros(size).index_add_(0, self.index_k, torch.ones_like(m_k))
        return (total / count.clamp_min(1))[self.index_k]

    def stored(self, graph: ModuleGraph, m_k: Tensor) -> Tensor:
        """The scale that is really applied once the producer is rounded to its stored dtype.

        Norm weights w are stored as round(w m): the exact scale is their quotient, 1 where w = 0. Rows are kept in
        fp32 until they are rounded by a method or written, so there the scale stays m.
        """
        if self.producer.rows:
            return m_k
        w = _tensor(graph, self.producer.weight)
        before = (w.float() + self.producer.offset)[self.index_k]
        after = _scaled(w, self.producer.offset, self._spread(m_k, len(w)), graph.dtype).float()[self.index_k] + self.producer.offset
        usable = (before != 0) & (after != 0) & (before.sign() == after.sign())
        return torch.where(usable, after / before.where(usable, torch.ones_like(before)), torch.ones_like(before))

    def apply(self, graph: ModuleGraph, m_k: Tensor) -> Mapping[str, Leaf]:
        """The producer's leaves with channel index_k[j] multiplied by m_k[j]."""
        p = self.producer
        w = _tensor(graph, p.weight)
        t = self._spread(m_k, w.shape[-1] if p.transposed or w.ndim == 1 else w.shape[-2])
        if p.rows:
            leaves: dict[str, Leaf] = {p.weight: w.float() * (t[..., None, :] if p.transposed else t[..., None])}
        else:
            leaves = {p.weight: _scaled(w, p.offset, t, graph.dtype)}
        if p.bias:
            b = _tensor(graph, p.bias)
            leaves[p.bias] = b.float() * t if p.rows else _scaled(b, 0.0, t, graph.dtype)
        return leaves

    def _spread(self, m_k: Tensor, size: int) -> Tensor:
        """[k] -> [size], or experts' own [e, 1, k] -> [e, size]."""
        m = m_k if m_k.ndim == 1 else m_k[:, 0]
        return torch.ones(*m.shape[:-1], size, device=m.device).index_copy_(-1, self.index_k.to(m.device), m.float())


def _scaled(w: Tensor, offset: float, t: Tensor, stored: torch.dtype) -> Tensor:
    return ((w.float() + offset) * t - offset).to(stored).to(w.dtype)


def _tensor(graph: ModuleGraph, path: str) -> Tensor:
    leaf = graph.params[path]
    if not isinstance(leaf, Tensor):
        raise QlabError(f"{graph.path}.{path} is rounded already and no scale can be folded into it; reparametrize first")
    return leaf


# ------------------------------------------------------------------ search
@lru_cache(maxsize=32)
def folds(code: Code) -> Mapping[str, Fold]:
    """source -> where a scale on its channels can go, for every source that has such a place (the nearest one)."""
    found: dict[str, Fold] = {}
    for producer in _producers(code):  # later ones are nearer to the sources and take precedence
        walk = _Labels(code, producer.node)
        walk.run(*[torch.empty(_concrete(n), device="meta", dtype=n.meta["val"].dtype)
                   for n in code.graph.nodes if n.op == "placeholder"])
        for source, index in walk.reached.items():
            others = {int(c) for s, i in walk.reached.items() if s != source for c in i.unique()}
            mine = set(index.unique().tolist())
            if NONE not in mine and not mine & (walk.leaked | others):
                found[source] = Fold(producer, index)
    return found


def _concrete(node: fx.Node) -> tuple[int, ...]:
    # Every symbolic size becomes 3: sizes that the trace made equal stay equal, and the labels stay small.
    def value(d: Any) -> int:
        return d if isinstance(d, int) else int(d.node.expr.subs(dict.fromkeys(d.node.expr.free_symbols, 3)))

    return tuple(value(d) for d in node.meta["val"].shape)


def _producers(code: Code) -> list[Producer]:
    found = []
    sites = {s.weight: s for s in code.sites}
    for node in code.graph.nodes:
        if node.target in WEIGHT_OPS and (w := code.params.get(behind_casts(node.args[WEIGHT_OPS[node.target][1]]).name)) in sites:
            b_at = WEIGHT_OPS[node.target][2]
            if b_at is not None and len(node.args) > b_at and not _own(code, node.args[b_at]):
                continue
            found.append(Producer(node.name, w, sites[w].bias, 0.0, True, sites[w].layout.endswith("k o")))
        elif node.target in NORMS:
            w_at, b_at = NORMS[node.target]
            args = (*node.args, *[None] * 4)
            weight, bias = (code.params.get(a.name) if isinstance(a, fx.Node) else None for a in
                            (args[w_at], args[b_at] if b_at else None))
            if weight and _own(code, args[w_at]) and (b_at is None or _own(code, args[b_at])):
                found.append(Producer(node.name, weight, bias, 0.0, False))
        elif node.target is aten.mul.Tensor:
            for operand in node.args[:2]:
                if (vector := _vector(code, operand)) and operand.meta["val"].shape[0] == node.meta["val"].shape[-1]:
                    found.append(Producer(node.name, vector[0], None, vector[1], False))
    return found


def _own(code: Code, node: fx.Node | None) -> bool:
    """Whether this is a leaf that nothing else reads, or absent: then scaling it is felt here alone."""
    return node is None or (node.name in code.params and len(node.users) == 1)


def _vector(code: Code, node: Any) -> tuple[str, float] | None:
    """(path, offset) if the node is a parameter [k] used once, behind casts and an added constant (Gemma's 1 + w)."""
    offset = 0.0
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.users) == 1:
        if node.target is aten.add.Tensor and isinstance(node.args[1], int | float):
            offset += node.args[1] * node.kwargs.get("alpha", 1)
        elif node.target not in SAME_VALUES:
            return None
        node = node.args[0]
    if isinstance(node, fx.Node) and node.name in code.params and len(node.users) == 1 and node.meta["val"].ndim == 1:
        return code.params[node.name], offset
    return None


class _Labels(fx.Interpreter):
    """Carries a producer's channel numbers forward beside meta values of every node."""

    def __init__(self, code: Code, producer: str):
        super().__init__(nn.Module(), graph=code.graph)
        self.producer = producer
        self.sites = {s.weight: s for s in code.sites}
        self.code = code
        self.labels: dict[fx.Node, Any] = {}
        self.leaked: set[int] = set()
        self.reached: dict[str, Tensor] = {}

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, *placed(args, kwargs, torch.device("meta")))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        labelled = [a for a in n.all_input_nodes if a in self.labels]
        if n.name == self.producer:
            self.labels[n] = torch.arange(value.shape[-1]).expand(value.shape)
        elif n.op == "output" or (labelled and n.op == "call_function"):
            out = self._follow(n, value) if n.op == "call_function" else None
            if out is not None:
                self.labels[n] = out
            elif n.target not in HARMLESS and not self._reaches_site(n):
                for a in labelled:
                    self._leak(self.labels[a])
        return value

    def _leak(self, labels: Any) -> None:
        for t in labels if isinstance(labels, list | tuple) else [labels]:
            self.leaked |= {c for c in t.unique().tolist() if c != NONE}

    def _reaches_site(self, n: fx.Node) -> bool:
        if n.target not in WEIGHT_OPS:
            return False
        x_at, w_at, _, _ = WEIGHT_OPS[n.target]
        site = self.sites.get(self.code.params.get(behind_casts(n.args[w_at]).name, ""))
        if site is None or n.args[x_at] not in self.labels:
            return False
        rows = self.labels[n.args[x_at]].flatten(0, -2)
        if not (rows == rows[0]).all():
            return False
        if site.origin in self.reached and not torch.equal(self.reached[site.origin], rows[0]):
            return False
        self.reached[site.origin] = rows[0].clone()
        return True

    def _follow(self, n: fx.Node, value: Any) -> Any:
        """Labels of the node's output, or None where the operation is not homogeneous in the labelled operand."""
        args = [self.labels.get(a) if isinstance(a, fx.Node) else None for a in n.args]
        first = args[0] if args else None
        others = [a for a in args[1:] if a is not None]
        if n.target is operator.getitem:
            return first[n.args[1]]
        if n.target in HOMOGENEOUS and first is not None and not others:
            return first.expand(value.shape)
        if n.target in LAYOUT and first is not None:
            rest, kwargs = self.fetch_args_kwargs_from_env(n)
            return n.target(first, *rest[1:], **kwargs)
        if n.target in (aten.mul.Tensor, aten.div.Tensor) and len(others) + (first is not None) == 1:
            return None if n.target is aten.div.Tensor and others else (first if not others else others[0]).expand(value.shape)
        if n.target is aten.add.Tensor and first is not None and others and torch.equal(first, others[0]):
            return first
        if n.target in (aten.cat.default, aten.stack.default):
            return self._concatenate(n)
        if n.target is aten.einsum.default:
            return self._contract(n)
        if n.target is aten.index.Tensor and first is not None and len(n.args[1]) == 1:  # rows, in another order
            return first[:1].expand(value.shape) if (first == first[:1]).all() else None
        if n.target in PRODUCTS and first is None and len(others) == 1:
            return _mixed_over_tokens(others[0], value.shape)
        if n.target is aten.scaled_dot_product_attention.default and args[2] is not None:
            for scored in args[:2]:  # queries and keys of a fused projection go into the softmax; its values go on
                if scored is not None:
                    self._leak(scored)
            heads = value.shape[-3] // args[2].shape[-3]
            return _mixed_over_tokens(args[2].repeat_interleave(heads, dim=-3), value.shape)
        return None

    def _concatenate(self, n: fx.Node) -> Tensor:
        (parts, *rest), kwargs = self.fetch_args_kwargs_from_env(n)
        inputs = n.args[0]
        assert isinstance(inputs, list | tuple)
        return n.target([self.labels.get(node, torch.full(v.shape, NONE)) for node, v in zip(inputs, parts)], *rest, **kwargs)


    def _contract(self, n: fx.Node) -> Tensor | None:
        """Labels of a sum of products with one labelled operand, where all terms of a sum carry the same one."""
        (equation, operands, *_), _ = self.fetch_args_kwargs_from_env(n)
        labelled = [node for node in n.args[1] if node in self.labels]
        if len(labelled) > 1:
            return None

        def mean(power: int) -> Tensor:  # of the labels' powers over the terms of each sum
            ones = [torch.ones(value.shape, dtype=torch.float64) for value in operands]
            powers = [self.labels[node].double() ** power if node in labelled else one for node, one in zip(n.args[1], ones)]
            return torch.einsum(equation, powers) / torch.einsum(equation, ones)

        return mean(1).long() if torch.equal(mean(1) ** 2, mean(2)) else None


def _mixed_over_tokens(labels: Tensor, shape: torch.Size) -> Tensor | None:
    """Labels of P @ V: a mixture over tokens keeps V's channels if every token carries the same ones."""
    same = (labels == labels[..., :1, :]).all()
    return labels[..., :1, :].expand(shape) if same else None


# ------------------------------------------------------------------ absorb
def fold_scales(graph: ModuleGraph) -> ModuleGraph:
    """Every leading online scale that a producer can take, folded into it; the others stay in `online`."""
    places = folds(graph.code)
    for source, sites in by_origin(graph.code.sites).items():
        ops = [graph.online.get(s.path, ()) for s in sites]
        if source not in places or not all(o and isinstance(o[0], Multiply) for o in ops):
            continue
        scales = [o[0].m_k for o in ops if isinstance(o[0], Multiply)]
        if not all(torch.equal(m, scales[0]) for m in scales[1:]) or not (scales[0] > 0).all():
            continue  # relu and its like let only positive scales through
        online = {path: rest for path, rest in {**graph.online, **{s.path: graph.online[s.path][1:] for s in sites}}.items() if rest}
        graph = replace(graph.update(places[source].apply(graph, scales[0])), online=online)
    return graph


def absorb() -> Transform:
    """A lossless stage: fold_scales on every segment."""
    return (Stage("absorb", frozenset(), lambda graph, stats: (fold_scales(graph), stats)),)
