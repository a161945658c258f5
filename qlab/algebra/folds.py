"""Where a scale at a site's input folds: what produces that input, found in the traced program.

A positive scale per channel can move upstream through every operation that is homogeneous in that
channel. So each candidate producer (a norm's weight, a linear's rows) labels its output channels,
and the labels are carried forward through the program (`qlab.algebra.channels`). A producer can
take the scale of a source if its labels cover all of the source's channels and none of them leaks
or reaches another source. Nothing here knows an architecture.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from qlab.algebra.channels import NONE, RULES, Labels, Rule
from qlab.algebra.graph import (
    SAME_VALUES,
    WEIGHT_OPS,
    Code,
    ModuleGraph,
    Site,
    aten,
    behind_casts,
    open_symbols,
)
from qlab.algebra.qtensor import Leaf, QTensor
from qlab.algebra.spec import Spec
from qlab.errors import QlabError

ROUNDED = 2**-8  # relative error that rounding a scale to bf16 may make
# operation -> positions of its weight and bias
NORMS = {
    aten.layer_norm.default: (2, 3),
    aten.rms_norm.default: (2, None),
}


@dataclass(frozen=True, kw_only=True)
class Producer:
    """A node whose output channel c is scaled by t[c] when (weight + offset)[c] and bias[c] are.

    rows: the weight is a matrix whose rows (columns where it is `transposed`) are the channels.
    """

    node: str
    weight: str
    bias: str | None
    offset: float
    rows: bool
    transposed: bool = False


@dataclass(frozen=True)
class Fold:
    """Scaling channel j of a source is scaling channel index_k[j] of the producer."""

    producer: Producer
    index_k: Tensor

    def tie(self, m_k: Tensor) -> Tensor:
        """For every channel the mean of m over all channels that share its producer channel [k]."""
        size = int(self.index_k.max()) + 1
        m_cpu = m_k.cpu()  # a GPU adds in any order
        total = m_cpu.new_zeros(size).index_add_(0, self.index_k, m_cpu)
        count = m_cpu.new_zeros(size).index_add_(0, self.index_k, torch.ones_like(m_cpu))
        return (total / count.clamp_min(1))[self.index_k].to(m_k.device)

    def stored(self, graph: ModuleGraph, m_k: Tensor) -> Tensor:
        """The scale that is really applied once the producer is rounded to its stored dtype.

        A norm's weight w is stored as round(w m), so the scale is the quotient of the two, and 1
        where w = 0. Rows stay in fp32 until a method rounds them or they are written, so their
        scale stays m. A rounded row takes m with its scales, or 1 where these cannot hold it.
        """
        if self.producer.rows:
            leaf = graph.params[self.producer.weight]
            if isinstance(leaf, Tensor):
                return m_k
            if not isinstance(leaf, QTensor):
                return torch.ones_like(m_k)
            usable = self._can_scale(leaf, m_k)
            return torch.where(usable if m_k.ndim == 1 else usable[:, None], m_k, 1.0)
        w, offset = _tensor(graph, self.producer.weight), self.producer.offset
        dtype = graph.stored_dtype(self.producer.weight)
        scaled = _scaled(w, offset, self._spread(m_k, len(w)), dtype)
        before = (_wide(w) + offset)[self.index_k]
        after = _wide(scaled)[self.index_k] + offset
        usable = (before != 0) & (after != 0) & (before.sign() == after.sign())
        ones = torch.ones_like(before)
        return torch.where(usable, after / before.where(usable, ones), ones).float()

    def apply(self, graph: ModuleGraph, m_k: Tensor) -> Mapping[str, Leaf]:
        """The producer's leaves with channel index_k[j] multiplied by m_k[j]."""
        p, leaf = self.producer, graph.params[self.producer.weight]
        leaves: dict[str, Leaf] = {}
        if not isinstance(leaf, Tensor | QTensor):
            raise QlabError(
                f"{graph.path}.{p.weight} is a {type(leaf).__name__}, whose rows take no scale; "
                "reparametrize first"
            )
        if isinstance(leaf, QTensor):
            if not self._can_scale(leaf, m_k).all():
                raise QlabError(
                    f"{graph.path}.{p.weight} is rounded already and its scales cannot take "
                    "others; reparametrize first"
                )
            t = self._spread(m_k, leaf.shape[-2])
            scales = (leaf.scales.float() * t[..., None]).to(leaf.scales.dtype)
            leaves[p.weight] = replace(leaf, scales=scales)
        elif p.rows:
            t = self._spread(m_k, leaf.shape[-1 if p.transposed else -2])
            leaves[p.weight] = _wide(leaf) * (t[..., None, :] if p.transposed else t[..., None])
        else:
            t = self._spread(m_k, len(leaf))
            leaves[p.weight] = _scaled(leaf, p.offset, t, graph.stored_dtype(p.weight))
        if p.bias:
            b, dtype = _tensor(graph, p.bias), graph.stored_dtype(p.bias)
            leaves[p.bias] = _wide(b) * t if p.rows else _scaled(b, 0.0, t, dtype)
        return leaves

    def _can_scale(self, q: QTensor, m_k: Tensor) -> Tensor:
        """[k]: whether the rounded row behind this channel can be multiplied by m, which rounds the
        row's scales a second time."""
        if not rows_move(q.spec):
            return torch.zeros_like(m_k, dtype=torch.bool)
        exact = q.scales.float() * self._spread(m_k, q.shape[-2])[..., None]
        close = (exact.to(q.scales.dtype).float() - exact).abs() <= ROUNDED * exact.abs()
        return close.all(-1)[..., self.index_k]

    def _spread(self, m_k: Tensor, size: int) -> Tensor:
        """The scale of the producer's channels: [k] -> [size], or of experts [e, 1, k] -> [e,
        size]. Channels that feed nothing here get 1."""
        m = m_k if m_k.ndim == 1 else m_k[:, 0]
        ones = torch.ones(*m.shape[:-1], size, dtype=torch.float32, device=m.device)
        return ones.index_copy_(-1, self.index_k.to(m.device), m.float())


def _scaled(w: Tensor, offset: float, t: Tensor, stored: torch.dtype) -> Tensor:
    return ((_wide(w) + offset) * t - offset).to(stored).to(w.dtype)


def _wide(t: Tensor) -> Tensor:
    """In the dtype in which folds are computed: float32, or the tensor's own where that is
    wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _tensor(graph: ModuleGraph, path: str) -> Tensor:
    leaf = graph.params[path]
    assert isinstance(leaf, Tensor)  # norm weights and biases are never rounded
    return leaf


def rows_move(spec: Spec) -> bool:
    """Whether rows that are rounded to this spec can still be scaled: each row has scales of its
    own, of more than 8 bits. Rounding commutes with scaling a row, but for the rounding of the
    scales themselves."""
    return spec.tile.rows == 1 and (spec.scale_dtype is None or spec.scale_dtype.itemsize > 1)


# ------------------------------------------------------------------ search
@lru_cache(maxsize=32)
def folds(code: Code) -> Mapping[str, Fold]:
    """source -> the nearest place that can take a scale of its channels, where there is one."""
    places: dict[str, Fold] = {}
    for producer in _producers(code):  # later producers are nearer to the sources
        walk = walked(code, producer.node)
        for source, index in walk.reached.items():
            others = {int(c) for s, i in walk.reached.items() if s != source for c in i.unique()}
            mine = set(index.unique().tolist())
            if NONE not in mine and not mine & (walk.leaked | others):
                places[source] = Fold(producer, index)
    return places


def walked(code: Code, producer: str, rules: Mapping[Any, Rule] = RULES) -> Labels:
    """The labels after a run on small inputs, or on inputs as they were traced, for programs that
    hold only for some lengths (loops over blocks of tokens). A program whose sizes are numbers that
    it computes runs on no shapes alone, and no label reaches a site."""
    walk = Labels(code, producer, rules)
    if any(
        torch.Tag.data_dependent_output in getattr(n.target, "tags", ()) for n in code.graph.nodes
    ):
        return walk
    try:
        walk.run(*_meta_inputs(code, small=True))
    except RuntimeError:
        walk = Labels(code, producer, rules)
        walk.run(*_meta_inputs(code, small=False))
    return walk


def _meta_inputs(code: Code, small: bool) -> list[Tensor]:
    """Meta tensors for every graph input.

    With `small`, each open dimension becomes 3 (equal symbols stay equal), so that label tensors
    are cheap. A dimension that only appears last counts channels and keeps its size.
    """
    values = [n.meta["val"] for n in code.graph.nodes if n.op == "placeholder"]
    rows = {symbol for t in values for d in t.shape[:-1] for symbol in open_symbols(d)}
    channels = {
        symbol: d.node.hint for t in values for d in t.shape[-1:] for symbol in open_symbols(d)
    }

    def size(d: Any) -> int:
        symbols = open_symbols(d)
        if not symbols:
            return int(d)
        if not small:
            return int(d.node.hint)
        sizes = {s: channels[s] if s in channels and s not in rows else 3 for s in symbols}
        return int(d.node.expr.subs(sizes))

    return [torch.empty([size(d) for d in t.shape], device="meta", dtype=t.dtype) for t in values]


def _producers(code: Code) -> list[Producer]:
    """The nodes that could take a scale of their output channels, in running order."""
    sites = {site.weight: site for site in code.sites}
    producers: list[Producer] = []
    for node in code.graph.nodes:
        if node.target in WEIGHT_OPS:
            producers += _linear(code, sites, node)
        elif node.target in NORMS:
            producers += _norm(code, node)
        elif node.target is aten.mul.Tensor:
            producers += _vectors(code, node)
    return producers


def _linear(code: Code, sites: Mapping[str | None, Site], node: fx.Node) -> list[Producer]:
    """The rows of a site's weight."""
    _, w_at, b_at, _ = WEIGHT_OPS[node.target]
    weight = code.params.get(behind_casts(node.args[w_at]).name)
    if weight not in sites:
        return []
    bias = node.args[b_at] if b_at is not None and len(node.args) > b_at else None
    if not _own(code, bias):
        return []
    site = sites[weight]
    return [
        Producer(
            node=node.name,
            weight=weight,
            bias=site.bias,
            offset=0.0,
            rows=True,
            transposed=site.layout.endswith("k o"),
        )
    ]


def _norm(code: Code, node: fx.Node) -> list[Producer]:
    """The weight and bias of a norm."""
    w_at, b_at = NORMS[node.target]
    args = dict(enumerate(node.args))
    gain, bias = vector(code, args.get(w_at)), None if b_at is None else args.get(b_at)
    if gain is None or not _own(code, bias):
        return []
    weight, offset = gain
    return [
        Producer(
            node=node.name,
            weight=weight,
            bias=None if bias is None else code.params[bias.name],
            offset=offset,
            rows=False,
        )
    ]


def _vectors(code: Code, node: fx.Node) -> list[Producer]:
    """A parameter [k] that the output is multiplied by, as norms written out by hand do."""
    producers = []
    for operand in node.args[:2]:
        gain = vector(code, operand)
        if gain and operand.meta["val"].shape[0] == node.meta["val"].shape[-1]:
            weight, offset = gain
            producers.append(
                Producer(node=node.name, weight=weight, bias=None, offset=offset, rows=False)
            )
    return producers


def _own(code: Code, node: fx.Node | None) -> bool:
    """Whether this is a leaf that no other node reads, or no node at all."""
    return node is None or (node.name in code.params and len(node.users) == 1)


def vector(code: Code, node: Any) -> tuple[str, float] | None:
    """(path, offset) of a parameter [k] that is used once, behind casts and an added constant
    (Gemma's 1 + w)."""
    offset = 0.0
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.users) == 1:
        if node.target is aten.add.Tensor and isinstance(node.args[1], int | float):
            offset += node.args[1] * node.kwargs.get("alpha", 1)
        elif node.target not in SAME_VALUES:
            return None
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.name not in code.params:
        return None
    used_once, is_vector = len(node.users) == 1, node.meta["val"].ndim == 1
    return (code.params[node.name], offset) if used_once and is_vector else None
