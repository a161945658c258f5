"""Fold online scales into what produces a site's input, found by a walk over the graph: no table of
architectures.

A positive scale per channel can move upstream through every operation that is homogeneous in that
channel. So each candidate producer (a norm's weight, a linear's rows) labels its output channels,
and the labels are carried forward through the traced program (`qlab.algebra.channels`). A source
can be scaled by a producer if labels cover all of its channels and none of those labels leaks or
reaches another source.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from qlab.algebra.channels import NONE, Labels
from qlab.algebra.graph import (
    SAME_VALUES,
    WEIGHT_OPS,
    Code,
    ModuleGraph,
    aten,
    behind_casts,
    by_origin,
    open_symbols,
)
from qlab.algebra.online import Multiply
from qlab.algebra.qtensor import Leaf, QTensor
from qlab.algebra.spec import Spec
from qlab.algebra.transform import Stage, Transform
from qlab.errors import QlabError

ROUNDED = 2**-8  # relative: what rounding a scale to bf16 may cost
NORMS = {
    aten.layer_norm.default: (2, 3),
    aten.rms_norm.default: (2, None),
}  # positions of weight and bias


@dataclass(frozen=True, kw_only=True)
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
        """The mean of m over the channels of the source that one producer channel feeds, back on
        the source [k]."""
        size, here = int(self.index_k.max()) + 1, m_k.cpu()  # a GPU adds in any order
        total = here.new_zeros(size).index_add_(0, self.index_k, here)
        count = here.new_zeros(size).index_add_(0, self.index_k, torch.ones_like(here))
        return (total / count.clamp_min(1))[self.index_k].to(m_k.device)

    def stored(self, graph: ModuleGraph, m_k: Tensor) -> Tensor:
        """The scale that is really applied once the producer is rounded to its stored dtype.

        Norm weights w are stored as round(w m): the exact scale is their quotient, 1 where w = 0.
        Rows are kept in fp32 until they are rounded by a method or written, so there the scale
        stays m. A rounded row moves with its scales; where they cannot hold theirs times m, it is
        1.
        """
        if self.producer.rows:
            leaf = graph.params[self.producer.weight]
            return (
                torch.where(self._held(leaf, m_k), m_k, 1.0) if isinstance(leaf, QTensor) else m_k
            )
        w = _tensor(graph, self.producer.weight)
        stored = graph.stored_dtype(self.producer.weight)
        before = (_wide(w) + self.producer.offset)[self.index_k]
        after = (
            _wide(_scaled(w, self.producer.offset, self._spread(m_k, len(w)), stored))[self.index_k]
            + self.producer.offset
        )
        usable = (before != 0) & (after != 0) & (before.sign() == after.sign())
        return torch.where(
            usable, after / before.where(usable, torch.ones_like(before)), torch.ones_like(before)
        ).float()

    def apply(self, graph: ModuleGraph, m_k: Tensor) -> Mapping[str, Leaf]:
        """The producer's leaves with channel index_k[j] multiplied by m_k[j]."""
        p, leaf = self.producer, graph.params[self.producer.weight]
        if isinstance(leaf, QTensor):
            if not self._held(leaf, m_k).all():
                raise QlabError(
                    f"{graph.path}.{p.weight} is rounded already and its scales cannot take "
                    "others; reparametrize first"
                )
            t = self._spread(m_k, leaf.shape[-2])
            leaves: dict[str, Leaf] = {
                p.weight: replace(
                    leaf, scales=(leaf.scales.float() * t[..., None]).to(leaf.scales.dtype)
                )
            }
        elif p.rows:
            t = self._spread(m_k, leaf.shape[-1 if p.transposed else -2])
            leaves = {p.weight: _wide(leaf) * (t[..., None, :] if p.transposed else t[..., None])}
        else:
            t = self._spread(m_k, len(leaf))
            leaves = {p.weight: _scaled(leaf, p.offset, t, graph.stored_dtype(p.weight))}
        if p.bias:
            b = _tensor(graph, p.bias)
            leaves[p.bias] = (
                _wide(b) * t if p.rows else _scaled(b, 0.0, t, graph.stored_dtype(p.bias))
            )
        return leaves

    def _held(self, q: QTensor, m_k: Tensor) -> Tensor:
        """[k]: whether the rounded row that makes this channel can be scaled by m, which rounds its
        scales once more."""
        if not rows_move(q.spec):
            return torch.zeros_like(m_k, dtype=torch.bool)
        exact = q.scales.float() * self._spread(m_k, q.shape[-2])[..., None]
        close = (exact.to(q.scales.dtype).float() - exact).abs() <= ROUNDED * exact.abs()
        return close.all(-1)[..., self.index_k]

    def _spread(self, m_k: Tensor, size: int) -> Tensor:
        """[k] -> [size], or experts' own [e, 1, k] -> [e, size]."""
        m = m_k if m_k.ndim == 1 else m_k[:, 0]
        return torch.ones(*m.shape[:-1], size, dtype=torch.float32, device=m.device).index_copy_(
            -1, self.index_k.to(m.device), m.float()
        )


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
    """Whether rows that are rounded to this spec can still be scaled: each has scales of its own,
    of more than 8 bits.

    Rounding commutes with scaling rows, but for how the scales themselves are rounded.
    """
    return spec.tile.rows == 1 and (spec.scale_dtype is None or spec.scale_dtype.itemsize > 1)


# ------------------------------------------------------------------ search
@lru_cache(maxsize=32)
def folds(code: Code) -> Mapping[str, Fold]:
    """source -> where a scale on its channels can go, for every source that has such a place (the
    nearest one)."""
    found: dict[str, Fold] = {}
    for producer in _producers(code):  # later ones are nearer to the sources and take precedence
        walk = _labelled(code, producer.node)
        for source, index in walk.reached.items():
            others = {int(c) for s, i in walk.reached.items() if s != source for c in i.unique()}
            mine = set(index.unique().tolist())
            if NONE not in mine and not mine & (walk.leaked | others):
                found[source] = Fold(producer, index)
    return found


def _labelled(code: Code, producer: str) -> Labels:
    """Labels at a small size; at the traced one for programs that hold for some lengths only, as
    loops over blocks of tokens do."""
    try:
        (walk := Labels(code, producer)).run(*_inputs(code, small=True))
    except RuntimeError:
        (walk := Labels(code, producer)).run(*_inputs(code, small=False))
    return walk


def _inputs(code: Code, small: bool) -> list[Tensor]:
    """Tensors on meta for everything that enters a program, as it was traced, or small, so that
    labels are: with 3 for every size that its trace left open, where sizes that were equal there
    stay equal. A size that is always the last one counts channels, and is kept."""
    entering = [n.meta["val"] for n in code.graph.nodes if n.op == "placeholder"]
    last = {
        symbol: d.node.hint for t in entering for d in t.shape[-1:] for symbol in open_symbols(d)
    }
    for symbol in {symbol for t in entering for d in t.shape[:-1] for symbol in open_symbols(d)}:
        last.pop(symbol, None)

    def size(d: Any) -> int:
        if not small or not open_symbols(d):
            return int(d.node.hint) if open_symbols(d) else int(d)
        return int(d.node.expr.subs({symbol: last.get(symbol, 3) for symbol in open_symbols(d)}))

    return [torch.empty([size(d) for d in t.shape], device="meta", dtype=t.dtype) for t in entering]


def _producers(code: Code) -> list[Producer]:
    found = []
    sites = {s.weight: s for s in code.sites}
    for node in code.graph.nodes:
        if (
            node.target in WEIGHT_OPS
            and (w := code.params.get(behind_casts(node.args[WEIGHT_OPS[node.target][1]]).name))
            in sites
        ):
            b_at = WEIGHT_OPS[node.target][2]
            if b_at is not None and len(node.args) > b_at and not _own(code, node.args[b_at]):
                continue
            found.append(
                Producer(
                    node=node.name,
                    weight=w,
                    bias=sites[w].bias,
                    offset=0.0,
                    rows=True,
                    transposed=sites[w].layout.endswith("k o"),
                )
            )
        elif node.target in NORMS:
            w_at, b_at = NORMS[node.target]
            args = (*node.args, *[None] * 4)
            weight, bias = (
                code.params.get(a.name) if isinstance(a, fx.Node) else None
                for a in (args[w_at], args[b_at] if b_at else None)
            )
            if weight and _own(code, args[w_at]) and (b_at is None or _own(code, args[b_at])):
                found.append(
                    Producer(node=node.name, weight=weight, bias=bias, offset=0.0, rows=False)
                )
        elif node.target is aten.mul.Tensor:
            for operand in node.args[:2]:
                if (vector := _vector(code, operand)) and operand.meta["val"].shape[0] == node.meta[
                    "val"
                ].shape[-1]:
                    found.append(
                        Producer(
                            node=node.name,
                            weight=vector[0],
                            bias=None,
                            offset=vector[1],
                            rows=False,
                        )
                    )
    return found


def _own(code: Code, node: fx.Node | None) -> bool:
    """Whether this is a leaf that nothing else reads, or absent: then scaling it is felt here
    alone."""
    return node is None or (node.name in code.params and len(node.users) == 1)


def _vector(code: Code, node: Any) -> tuple[str, float] | None:
    """(path, offset) if the node is a parameter [k] used once, behind casts and an added constant
    (Gemma's 1 + w)."""
    offset = 0.0
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.users) == 1:
        if node.target is aten.add.Tensor and isinstance(node.args[1], int | float):
            offset += node.args[1] * node.kwargs.get("alpha", 1)
        elif node.target not in SAME_VALUES:
            return None
        node = node.args[0]
    if (
        isinstance(node, fx.Node)
        and node.name in code.params
        and len(node.users) == 1
        and node.meta["val"].ndim == 1
    ):
        return code.params[node.name], offset
    return None


# ------------------------------------------------------------------ absorb
def fold_scales(graph: ModuleGraph) -> ModuleGraph:
    """Every leading online scale that a producer can take, folded into it; the others stay in
    `online`."""
    places = folds(graph.code)
    for source, sites in by_origin(graph.code.sites).items():
        ops = [graph.online.get(s.path, ()) for s in sites]
        if source not in places or not all(o and isinstance(o[0], Multiply) for o in ops):
            continue
        scales = [o[0].m_k for o in ops if isinstance(o[0], Multiply)]
        if not all(torch.equal(m, scales[0]) for m in scales[1:]) or not (scales[0] > 0).all():
            continue  # relu and its like let only positive scales through
        one = bool((scales[0] == 1).all())  # rounded rows that cannot move have no other
        online = {
            path: rest
            for path, rest in {
                **graph.online,
                **{s.path: graph.online[s.path][1:] for s in sites},
            }.items()
            if rest
        }
        graph = replace(
            graph if one else graph.update(places[source].apply(graph, scales[0])), online=online
        )
    return graph


def absorb() -> Transform:
    """A lossless stage: fold_scales on every segment."""
    return (
        Stage(
            "absorb", frozenset(), lambda graph, stats: (fold_scales(graph), stats), lossless=True
        ),
    )
