"""AWQ: scale input channels so that those that matter lose less in rounding (Lin et al. 2023).

x W^T = (x m) (W / m)^T for any scale m_k of the channels, and m is folded into what produces x, so
that nothing is left to do at run time. The scale is searched as m = 1 / s, s = mean|x|^ratio.
Where inputs are rounded too, the same scale makes their channels more alike, and what their
rounding costs is part of what is searched for.

Legend: W_ok weight, H mean second moment of the input x, m_k what x is multiplied by (1 / s in the
paper), x_nk a sample of inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import fsum

import torch
from torch import Tensor

from qlab.algebra.folds import Fold, rows_move
from qlab.algebra.gauge import Element, Source, Turn, gauge
from qlab.algebra.graph import ModuleGraph
from qlab.algebra.online import QuantizeInput
from qlab.algebra.operations import Operations
from qlab.algebra.qtensor import shared_outer
from qlab.algebra.spec import Spec, described, with_scale_dtype
from qlab.algebra.stats import Moment
from qlab.algebra.transform import Transform, chain
from qlab.algebra.views import Gauged
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

    x_nk: a sample of it, None where it is not rounded. share: its tokens, divided by the most
    tokens that any input of its origin has.
    """

    weights: Sequence[Tensor]
    moment: Moment
    absmean_k: Tensor
    x_nk: Tensor | None = None
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


def input_loss(weights: Sequence[Tensor], x_nk: Tensor, m_k: Tensor, spec: Spec) -> float:
    """The output error of rounding x m: the sum over weights of mean |(Q(x m) / m - x) W^T|^2 over
    the rows of a sample; 0 where it has none."""
    if not len(x_nk):
        return 0.0
    moved_nk = x_nk * m_k
    error_nk = (QuantizeInput(spec)(moved_nk) - moved_nk) / m_k
    return fsum(float((error_nk @ W_ok.mT).square().sum()) for W_ok in weights) / len(x_nk)


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


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What the scale is searched for: the spec and the grid of weights, and the spec of inputs,
    None where they stay as they are."""

    spec: Spec
    grid: Grid
    inputs: Spec | None = None

    def loss(self, one: Input, m_k: Tensor) -> float:
        """The output error of one input and its weights after scaling by m."""
        of_weights = scaled_loss(one.weights, one.moment, m_k, self.spec, self.grid)
        if self.inputs is None or one.x_nk is None:
            return of_weights
        return of_weights + input_loss(one.weights, one.x_nk, m_k, self.inputs)


def search(graph: ModuleGraph, fold: Fold, inputs: Sequence[Input], rounding: Rounding) -> Choice:
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
        return fsum(i.share * rounding.loss(i, m_k) for i in among)

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


def inputs_of(turn: Turn) -> list[Input]:
    """The inputs of the readers of one wire: one per source, and one per expert."""
    inputs = [_input(source) for source in turn.sources()]
    most = max(i.moment.tokens for i in inputs)
    return [replace(i, share=i.moment.tokens / max(most, 1)) for i in inputs]


def _input(source: Source) -> Input:
    total_k, count = source.stats["absmean"]
    return Input(
        weights=source.weights,
        moment=source.stats["second_moment"],
        absmean_k=total_k / max(count, 1),
        x_nk=source.stats["sample"].x_nk if "sample" in source.stats else None,
    )


def _scale(turn: Turn, rounding: Rounding) -> Element | None:
    """The searched scale of a wire: of all that its readers see, or of every expert that makes its
    own."""
    if turn.fold is None:
        return None
    graph = turn.graph
    rounding = replace(rounding, spec=with_scale_dtype(rounding.spec, graph.dtype))
    inputs = inputs_of(turn)
    groups = [[one] for one in inputs] if turn.apart else [inputs]
    choices = [search(graph, turn.fold, group, rounding) for group in groups]
    m = torch.stack([c.m_k for c in choices])[:, None] if turn.apart else choices[0].m_k
    energy = fsum(i.share * fsum(map(i.moment.output_error, i.weights)) for i in inputs)
    energy = max(energy, 1e-30)
    note = {
        "awq_ratio": [c.ratio for c in choices] if turn.apart else choices[0].ratio,
        "awq_loss": sum(c.loss for c in choices) / energy,
        "awq_rtn_loss": sum(c.identity_loss for c in choices) / energy,
    }
    return Element(M=m, M_inv=1 / m, notes=note)


def awq_scale(spec: Spec, grid: Grid = weighted, inputs: Spec | None = None) -> Transform:
    """AWQ's scale m_k at every input that can take one, folded upstream. Chain a rounding behind.

    x W^T = (x m) (W / m)^T, so the function stays. Inputs whose scale nothing upstream can take
    (behind a post-norm or GELU) keep m = 1. Channels that one producer channel feeds (grouped
    queries) get one scale. A norm before a mixture gets one scale for the router, the shared and
    the routed experts, whose losses count by their tokens; inside the experts each has its own.

    Args:
        spec: the number grid that the weights will be rounded to, or its name such as "int4-g64".
        grid: how scales and zero points are chosen (see GRIDS).
        inputs: the number grid that inputs will be rounded to at run time, or its name such as
            "mxfp4". What that costs is then part of the loss. None leaves them as they are.

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
    rounding = Rounding(spec=spec, grid=grid, inputs=inputs)
    needs, detail = {"second_moment", "absmean"}, f"for {described(spec)}, grid {grid.name}"
    if inputs is not None:
        needs, detail = needs | {"sample"}, f"{detail}, inputs {inputs}"
    searching, *folding = gauge(
        "awq_scale",
        "*:in",
        lambda turn: _scale(turn, rounding),
        needs,
        detail=detail,
    )
    # Where rounded rows can take a scale, sources are solved one after the other: a value
    # projection is rounded before the scale of the output projection moves its rows.
    view = Gauged(by_source=rows_move(spec))
    counted = Operations(rows=24)  # the output error of each ratio
    return (replace(searching, view=view, workspace=4, operations=counted), *folding)


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
