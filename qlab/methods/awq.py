"""AWQ: scale the input channels that matter before rounding, and fold the scales upstream (Lin et
al. 2023).

Legend: W_ok weight, H mean second moment of the input x, m_k what x is multiplied by (1 / s in the
paper).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import fsum  # whose result does not depend on the order in which sites are visited

import torch
from torch import Tensor

from qlab.algebra.absorb import Fold, absorb, folds, rows_move
from qlab.algebra.graph import ModuleGraph, Site, by_origin, by_source
from qlab.algebra.qtensor import shared_outer
from qlab.algebra.reparametrize import reparametrize
from qlab.algebra.spec import Spec, described, with_scale_dtype
from qlab.algebra.stats import Moment, Stats
from qlab.algebra.transform import Stage, Transform, chain
from qlab.methods.grid import Grid, encode_rows, weighted
from qlab.methods.rtn import rtn

STEPS = 10  # ratios are tried in steps of 1 / STEPS
ROWS = 128  # of each weight, evenly spread, choose the ratio


@dataclass(frozen=True)
class Choice:
    """What the search found for one source: m_k, its ratio and loss, and the loss of the
    identity."""

    m_k: Tensor
    ratio: float
    loss: float
    identity_loss: float


@dataclass(frozen=True)
class Input:
    """Weights [o, k] of one input, its second moment, mean|x| [k], and its tokens as a share of the
    most that any sees."""

    weights: Sequence[Tensor]
    moment: Moment
    absmean_k: Tensor
    share: float = 1.0


def scaled_loss(
    weights: Sequence[Tensor], moment: Moment, m_k: Tensor, spec: Spec, grid: Grid
) -> float:
    """sum over weights of tr(D H' D^T), D the rounding error of W / m, H' = m H m: the output error
    after scaling.

    W / m and the diagonal of H' are computed as reparametrize does it, so that ties go the way they
    were scored.
    """
    h_k = moment.sum_kk.diagonal() * m_k * m_k / max(moment.tokens, 1)
    moved = [W_ok * (1 / m_k) for W_ok in weights]
    outer = shared_outer(moved, spec)
    errors = lambda D_ok: moment.output_errors(D_ok.mul_(m_k))
    return fsum(float(encode_rows(grid, W, spec, h_k, errors, outer)[1].sum()) for W in moved)


def least_ratio(loss: Callable[[float], float]) -> float:
    """The ratio with the least loss: of those on a walk up from 0 that ends where two steps found
    nothing better, and of the vertex of the parabola through the best of them and its
    neighbours."""
    losses = [loss(0.0)]
    while len(losses) <= STEPS and losses.index(min(losses)) > len(losses) - 3:
        losses.append(loss(len(losses) / STEPS))
    best = losses.index(least := min(losses))
    if 0 < best < len(losses) - 1:
        below, above = losses[best - 1], losses[best + 1]
        vertex = (best + (below - above) / (below - 2 * least + above) / 2) / STEPS
        if loss(vertex) < least:
            return vertex
    return best / STEPS


def search(
    graph: ModuleGraph, fold: Fold, inputs: Sequence[Input], spec: Spec, grid: Grid
) -> Choice:
    """The scale s = mean|x|^ratio, normalised by sqrt(max min), with the least output error; s = 1
    is a candidate.

    Every scale is scored as it will be stored (`Fold.stored`). ROWS rows of each weight choose the
    ratio, which is compared with the identity on all rows, so the loss is never above the
    identity's. Inputs that no token reached keep 1.
    """
    seen = fsum(i.share for i in inputs)
    absmean_k = torch.stack([i.absmean_k.double() * i.share for i in inputs]).sum(0).float() / max(
        seen, 1e-30
    )
    importance = fold.tie(absmean_k).clamp_min(1e-4)

    def scale(ratio: float) -> Tensor:
        s = importance**ratio
        return fold.stored(graph, (s.max() * s.min()).sqrt() / s)

    def total(among: Sequence[Input], m_k: Tensor) -> float:
        return fsum(i.share * scaled_loss(i.weights, i.moment, m_k, spec, grid) for i in among)

    some = [replace(i, weights=[W[:: max(1, len(W) // ROWS)] for W in i.weights]) for i in inputs]
    one = torch.ones_like(importance)
    identity = Choice(one, 0.0, loss := total(inputs, one), loss)
    ratio = least_ratio(lambda r: total(some, scale(r))) if seen else 0.0
    found = (
        Choice(m_k := scale(ratio), ratio, total(inputs, m_k), identity.loss) if ratio else identity
    )
    return found if found.loss < identity.loss else identity


def _inputs(graph: ModuleGraph, stats: Stats, sites: Iterable[Site]) -> list[Input]:
    """What the weights of one origin see: dense ones all tokens, each expert its own."""
    found: list[Input] = []
    for source, group in by_source(sites).items():
        moments, means = stats[source, "second_moment"], stats[source, "absmean"]
        if group[0].route is None:
            found.append(_input([graph.weight_ok(s) for s in group], moments, means))
        else:
            found += [
                _input([graph.weight_ok(s, e) for s in group], *own)
                for e, own in enumerate(zip(moments.states, means.states))
            ]
    most = max(i.moment.tokens for i in found)
    return [replace(i, share=i.moment.tokens / max(most, 1)) for i in found]


def _input(weights: Sequence[Tensor], moment: Moment, absmean: tuple[Tensor, int]) -> Input:
    total_k, count = absmean
    return Input(weights, moment, total_k / max(count, 1))


def awq_scale(spec: Spec, grid: Grid = weighted) -> Transform:
    """Lossless: for every origin whose scale can be folded upstream, the searched scale, folded.

    Channels that one producer channel feeds (grouped queries) are scaled together. Origins that
    nothing can take a scale for (post-norm inputs, behind GELU) stay as they are. A norm before a
    mixture gets one scale for the router, shared and routed experts, whose losses count by their
    tokens; inside the experts each has a scale of its own.
    Solved source after source where `rows_move` for the spec: a value projection is rounded then
    before its rows are scaled.
    """

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        places, settled = folds(graph.code), with_scale_dtype(spec, graph.dtype)
        for origin, sharing in by_origin(graph.sites).items():
            sites = [
                s for s in sharing if not s.router
            ]  # a router is scaled with them, and never rounded
            if origin not in places or not sites:
                continue
            inputs, own = (
                _inputs(graph, stats, sites),
                len(graph.params[places[origin].producer.weight].shape) == 3,
            )
            choices = [
                search(graph, places[origin], group, settled, grid)
                for group in ([[i] for i in inputs] if own else [inputs])
            ]
            m = torch.stack([c.m_k for c in choices])[:, None] if own else choices[0].m_k
            graph, stats = reparametrize(graph, stats, origin, m, 1 / m)
            energy = max(
                fsum(i.share * fsum(map(i.moment.output_error, i.weights)) for i in inputs), 1e-30
            )
            note = {
                "awq_ratio": [c.ratio for c in choices] if own else choices[0].ratio,
                "awq_loss": sum(c.loss for c in choices) / energy,
                "awq_rtn_loss": sum(c.identity_loss for c in choices) / energy,
            }
            graph = replace(
                graph,
                notes={
                    **graph.notes,
                    **{s.path: {**graph.notes.get(s.path, {}), **note} for s in sites},
                },
            )
        return graph, stats

    search_stage = Stage(
        "awq_scale",
        frozenset({"second_moment", "absmean"}),
        run,
        detail=f"for {described(spec)}, grid {grid.name}",
        reparametrizes=True,
        sitewise=rows_move(spec),
        workspace=4,
    )
    return chain((search_stage,), absorb())


def awq(spec: Spec, grid: Grid = weighted) -> Transform:
    """chain(awq_scale(spec), rtn(spec)) on one grid."""
    return chain(awq_scale(spec, grid), rtn(spec, grid))
