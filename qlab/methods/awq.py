"""AWQ: scale the input channels that matter before rounding, and fold the scales upstream (Lin et al. 2023).

Legend: W_ok weight, H mean second moment of the input x, m_k what x is multiplied by (1 / s in the paper).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlab.absorb import Fold, absorb, folds
from qlab.graph import ModuleGraph, by_source
from qlab.methods.grid import Grid, encode, weighted
from qlab.methods.rtn import rtn
from qlab.qtensor import dense, shared_outer
from qlab.spec import Spec, with_scale_dtype
from qlab.stats import STATS, Moment, Stats, quadratic
from qlab.transform import Stage, Transform, chain, reparametrize

RATIOS = tuple(i / 10 for i in range(11))
ROWS = 128  # of each weight, evenly spread, rank the candidates


@dataclass(frozen=True)
class Choice:
    """What the search found for one source: m_k, its ratio and loss, and the loss of the identity."""

    m_k: Tensor
    ratio: float
    loss: float
    identity_loss: float


def scaled_loss(weights: Sequence[Tensor], moment: Moment, m_k: Tensor, spec: Spec, grid: Grid) -> float:
    """sum over weights of tr(D H' D^T), D the rounding error of W / m, H' = m H m: the output error after scaling.

    H' and W / m are computed as reparametrize does it, so that ties go the way they were scored.
    """
    H = STATS["second_moment"].transport(moment, m_k).mean_kk
    outer = shared_outer((W_ok * (1 / m_k) for W_ok in weights), spec)
    total = 0.0
    for W_ok in weights:
        W = W_ok * (1 / m_k)
        total += quadratic(dense(encode(grid, W, spec, H, outer), torch.float32) - W, H)
    return total


def search(graph: ModuleGraph, fold: Fold, weights: Sequence[Tensor], absmean_k: Tensor, moment: Moment, spec: Spec,
           grid: Grid) -> Choice:  # fmt: skip
    """The scale s = mean|x|^ratio, normalised by sqrt(max min), with the least output error; s = 1 is a candidate.

    Every scale is scored as it will be stored (`Fold.stored`). ROWS rows of each weight rank the ratios; the two best and
    the identity are compared on all rows, so the loss is never above the identity's.
    """
    importance = fold.tie(absmean_k).clamp_min(1e-4)

    def scale(ratio: float) -> Tensor:
        s = importance**ratio
        return fold.stored(graph, (s.max() * s.min()).sqrt() / s)

    some = [W[:: max(1, len(W) // ROWS)] for W in weights]
    ranked = sorted(RATIOS[1:], key=lambda r: scaled_loss(some, moment, scale(r), spec, grid))
    one = torch.ones_like(importance)
    identity = best = Choice(one, 0.0, loss := scaled_loss(weights, moment, one, spec, grid), loss)
    for ratio in ranked[:2]:
        m_k = scale(ratio)
        loss = scaled_loss(weights, moment, m_k, spec, grid)
        if loss < best.loss:
            best = Choice(m_k, ratio, loss, identity.loss)
    return best


def awq_scale(spec: Spec, grid: Grid = weighted) -> Transform:
    """Lossless: for every source whose scale can be folded upstream, the searched scale, folded.

    Channels that one producer channel feeds (grouped queries) are scaled together. Sources that nothing can take a
    scale for (post-norm inputs, behind GELU) stay as they are.
    """

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        places, settled = folds(graph.code), with_scale_dtype(spec, graph.dtype)
        for source, sites in by_source(graph.sites).items():
            if source not in places:
                continue
            total_k, count = stats[source, "absmean"]
            moment = stats[source, "second_moment"]
            weights = [graph.weight_ok(s) for s in sites]
            choice = search(graph, places[source], weights, total_k / max(count, 1), moment, settled, grid)
            graph, stats = reparametrize(graph, stats, source, choice.m_k, 1 / choice.m_k)
            energy = sum(quadratic(W, moment.mean_kk) for W in weights)
            note = {"awq_ratio": choice.ratio, "awq_loss": choice.loss / energy, "awq_rtn_loss": choice.identity_loss / energy}
            graph = replace(graph, notes={**graph.notes, **{s.path: {**graph.notes.get(s.path, {}), **note} for s in sites}})
        return graph, stats

    search_stage = Stage("awq_scale", frozenset({"second_moment", "absmean"}), run,
                         detail=f"grid {grid.name}", reparametrizes=True)
    return chain((search_stage,), absorb())


def awq(spec: Spec, grid: Grid = weighted) -> Transform:
    """chain(awq_scale(spec), rtn(spec)) on one grid."""
    return chain(awq_scale(spec, grid), rtn(spec, grid))
