"""AWQ: scale input channels so that those that matter lose less in rounding (Lin et al. 2023).

x W^T = (x m) (W / m)^T for any scale m_k of the channels, and m is folded into what produces x, so
that nothing is left to do at run time. The scale is searched as m = 1 / s, s = mean|x|^ratio.

Legend: W_ok weight, H mean second moment of the input x, m_k what x is multiplied by (1 / s in the
paper).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import fsum

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
ROWS = 128  # rows of each weight, evenly spread, that choose the ratio

# Losses are added up by fsum, whose result does not depend on the order in which sites are visited.


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A scale m_k, the ratio that gives it, its loss, and the loss of the identity m = 1."""

    m_k: Tensor
    ratio: float
    loss: float
    identity_loss: float


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input: the weights [o, k] that it meets, its second moment, and mean|x| [k].

    share: its tokens, divided by the most tokens that any input of its origin has.
    """

    weights: Sequence[Tensor]
    moment: Moment
    absmean_k: Tensor
    share: float = 1.0


def scaled_loss(
    weights: Sequence[Tensor], moment: Moment, m_k: Tensor, spec: Spec, grid: Grid
) -> float:
    """The output error after scaling by m: the sum over weights of tr(D H' D^T), where D is the
    rounding error of W / m and H' = m H m.

    W / m and the diagonal of H' are computed as `reparametrize` computes them, so that ties in
    rounding fall as they did here.
    """
    h_k = moment.sum_kk.diagonal() * m_k * m_k / max(moment.tokens, 1)
    moved = [W_ok * (1 / m_k) for W_ok in weights]
    outer = shared_outer(moved, spec)
    errors = lambda D_ok: moment.output_errors(D_ok.mul_(m_k))
    losses_o = [encode_rows(grid, W_ok, spec, h_k, errors, outer)[1] for W_ok in moved]
    return fsum(float(loss_o.sum()) for loss_o in losses_o)


def least_ratio(loss: Callable[[float], float]) -> float:
    """The ratio of the least loss.

    Ratios are tried upwards from 0 until two in a row were no better. Then the vertex of the
    parabola through the best ratio and its two neighbours is tried.
    """
    losses = [loss(0.0)]
    while len(losses) <= STEPS and losses.index(min(losses)) > len(losses) - 3:
        losses.append(loss(len(losses) / STEPS))
    least = min(losses)
    best = losses.index(least)
    if not 0 < best < len(losses) - 1:
        return best / STEPS
    below, above = losses[best - 1], losses[best + 1]
    vertex = (best + (below - above) / (below - 2 * least + above) / 2) / STEPS
    return vertex if loss(vertex) < least else best / STEPS


def search(
    graph: ModuleGraph, fold: Fold, inputs: Sequence[Input], spec: Spec, grid: Grid
) -> Choice:
    """The scale s = mean|x|^ratio, divided by sqrt(max s * min s), of the least output error.

    Every scale is scored as it will be stored (`Fold.stored`). ROWS rows of each weight choose the
    ratio. On all rows it is then compared with s = 1, which is taken unless the loss falls. Inputs
    that no token reached keep s = 1.
    """
    seen = fsum(i.share for i in inputs)
    weighted_sum = torch.stack([i.absmean_k.double() * i.share for i in inputs]).sum(0)
    absmean_k = weighted_sum.float() / max(seen, 1e-30)
    importance = fold.tie(absmean_k).clamp_min(1e-4)

    def scale(ratio: float) -> Tensor:
        s = importance**ratio
        return fold.stored(graph, (s.max() * s.min()).sqrt() / s)

    def total(among: Sequence[Input], m_k: Tensor) -> float:
        return fsum(i.share * scaled_loss(i.weights, i.moment, m_k, spec, grid) for i in among)

    ones = torch.ones_like(importance)
    identity_loss = total(inputs, ones)
    identity = Choice(m_k=ones, ratio=0.0, loss=identity_loss, identity_loss=identity_loss)
    few_rows = [replace(i, weights=[_spread_rows(W) for W in i.weights]) for i in inputs]
    ratio = least_ratio(lambda r: total(few_rows, scale(r))) if seen else 0.0
    if not ratio:
        return identity
    m_k = scale(ratio)
    scaled = Choice(m_k=m_k, ratio=ratio, loss=total(inputs, m_k), identity_loss=identity_loss)
    return scaled if scaled.loss < identity.loss else identity


def _spread_rows(W_ok: Tensor) -> Tensor:
    return W_ok[:: max(1, len(W_ok) // ROWS)]


def _inputs(graph: ModuleGraph, stats: Stats, sites: Iterable[Site]) -> list[Input]:
    """The inputs of the sites of one origin: one per source, and one per expert."""
    inputs: list[Input] = []
    for source, group in by_source(sites).items():
        moments, means = stats[source, "second_moment"], stats[source, "absmean"]
        if group[0].route is None:
            inputs.append(_input([graph.weight_ok(s) for s in group], moments, means))
            continue
        for e, (moment, absmean) in enumerate(zip(moments.states, means.states)):
            inputs.append(_input([graph.weight_ok(s, e) for s in group], moment, absmean))
    most = max(i.moment.tokens for i in inputs)
    return [replace(i, share=i.moment.tokens / max(most, 1)) for i in inputs]


def _input(weights: Sequence[Tensor], moment: Moment, absmean: tuple[Tensor, int]) -> Input:
    total_k, count = absmean
    return Input(weights=weights, moment=moment, absmean_k=total_k / max(count, 1))


def _scale_origin(
    graph: ModuleGraph, stats: Stats, sites: Sequence[Site], fold: Fold, spec: Spec, grid: Grid
) -> tuple[ModuleGraph, Stats]:
    """The graph with the searched scale at the inputs of one origin, whose sites these are."""
    inputs = _inputs(graph, stats, sites)
    apart = len(graph.params[fold.producer.weight].shape) == 3  # each expert has its own scale
    groups = [[one] for one in inputs] if apart else [inputs]
    choices = [search(graph, fold, group, spec, grid) for group in groups]
    m = torch.stack([c.m_k for c in choices])[:, None] if apart else choices[0].m_k
    graph, stats = reparametrize(graph, stats, sites[0].origin, m, 1 / m)
    energy = fsum(i.share * fsum(map(i.moment.output_error, i.weights)) for i in inputs)
    energy = max(energy, 1e-30)
    note = {
        "awq_ratio": [c.ratio for c in choices] if apart else choices[0].ratio,
        "awq_loss": sum(c.loss for c in choices) / energy,
        "awq_rtn_loss": sum(c.identity_loss for c in choices) / energy,
    }
    notes = dict(graph.notes)
    for site in sites:
        notes[site.path] = {**notes.get(site.path, {}), **note}
    return replace(graph, notes=notes), stats


def awq_scale(spec: Spec, grid: Grid = weighted) -> Transform:
    """AWQ's scale m_k at every input that can take one, folded upstream. Chain a rounding behind.

    x W^T = (x m) (W / m)^T, so the function stays. Inputs whose scale nothing upstream can take
    (behind a post-norm or GELU) keep m = 1. Channels that one producer channel feeds (grouped
    queries) get one scale. A norm before a mixture gets one scale for the router, the shared and
    the routed experts, whose losses count by their tokens; inside the experts each has its own.

    Args:
        spec: the number grid that the weights will be rounded to, or its name such as "int4-g64".
        grid: how scales and zero points are chosen (see GRIDS).

    Returns:
        A transform of two stages, awq_scale and absorb. The report holds the ratio, the loss, and
        the loss without scaling.

    Source:
        Lin et al. 2023, AWQ: Activation-aware Weight Quantization.

    Example:
        >>> import qlab
        >>> for stage in qlab.awq_scale("int4-g64"):
        ...     print(stage.name, stage.detail)
        awq_scale for int4-g64, grid weighted
        absorb
    """

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        places = folds(graph.code)
        settled = with_scale_dtype(spec, graph.dtype)
        for origin, sharing in by_origin(graph.sites).items():
            # A router gets the scale of its input as well, but it is never rounded.
            rounded = [site for site in sharing if not site.router]
            if origin in places and rounded:
                graph, stats = _scale_origin(graph, stats, rounded, places[origin], settled, grid)
        return graph, stats

    # Where rounded rows can take a scale, sources are solved one after the other: a value
    # projection is rounded before the scale of the output projection moves its rows.
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
    """AWQ: chain(awq_scale(spec, grid), rtn(spec, grid)).

    Args:
        spec: the number grid to round to, or its name such as "int4-g64".
        grid: how scales and zero points are chosen, in the search and in the rounding (see GRIDS).

    Returns:
        A transform of three stages. It needs calibration data.

    Source:
        Lin et al. 2023, AWQ: Activation-aware Weight Quantization.

    Example:
        >>> import qlab
        >>> [stage.name for stage in qlab.awq("int4-g64")]
        ['awq_scale', 'absorb', 'rtn']
    """
    return chain(awq_scale(spec, grid), rtn(spec, grid))
