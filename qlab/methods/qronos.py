"""Qronos' and QEP's target: the weight nearest to the reference's outputs on the inputs that the
quantized model makes, as far as that holds on tokens that it was not fitted to.

W* = W + a W D (H + damp mean(diag H) I)^-1 minimizes E |V x - W x'|^2 with a ridge, where a = 1 is
Qronos and a = 1/2 QEP's default. Both find that the whole step overfits. Here the strength a and
the damping are chosen for every input: fitted to three quarters of the calibration tokens, the step
C = W D (H + ...)^-1 changes the error on the others by a^2 tr(C H C^T) - 2 a tr(C (W D)^T), with H
and D of those, whose minimum over a is exact. a = 0 is among the candidates, so that the target is
never worse there. Inputs of many correlated channels, as of down_proj, get a fraction of what
normalized inputs get.

Zeros of a mask stay. W is then the weight before it, and the leaf L follows its target to
L + b (W* - W) on the support, where b, 0 to 1, is exact for every row of
tr((W* - L') H (W* - L')^T): on the support the leaf is never further from the new target.

Legend: x the input as the quantized sites before it make it, x' the input in the reference model,
H = E x^T x, D = E (x' - x)^T x, W_ok weight, C_ok its correction at a = 1.
Sources: Qronos (arXiv 2505.11695), QEP (arXiv 2504.09629).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlab.algebra.graph import ModuleGraph, Site, by_source
from qlab.algebra.operations import Operations
from qlab.algebra.stats import Drifting, Moment, Stats
from qlab.algebra.transform import Stage, Transform, costing
from qlab.algebra.views import EachWeight
from qlab.errors import QlabError
from qlab.methods.obs import check_damp, cholesky

DAMPS = (0.01, 0.1, 1.0)


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A step towards the reference. strength: a. damp: of H, as a fraction of mean(diag H). gain:
    by how much it lowers the error on the tokens that were held out, as a share of tr(W H W^T)."""

    strength: float
    damp: float
    gain: float


def correction(W_ok: Tensor, seen: Drifting, damp: float) -> Tensor:
    """C = W D (H + damp mean(diag H) I)^-1."""
    return step_of(W_ok @ seen.drift.mean_kk, seen.moment, damp)


def step_of(pull_ok: Tensor, moment: Moment, damp: float) -> Tensor:
    """P (H + damp mean(diag H) I)^-1 of a pull P, such as W D."""
    return solved(pull_ok, cholesky(moment.mean_kk, damp)[0])


def solved(pull_ok: Tensor, factor_kk: Tensor) -> Tensor:
    """P H^-1, with the lower factor of H."""
    # H is symmetric: P H^-1 = (H^-1 P^T)^T
    return torch.cholesky_solve(pull_ok.mT, factor_kk).mT


def _factor(moment: Moment, damp: float) -> Tensor | None:
    """The factor of what is left of sums, None where that is no second moment for rounding."""
    try:
        return cholesky(moment.mean_kk, damp)[0]
    except QlabError:
        if not moment.sum_kk.isfinite().all():
            raise
        return None


def rest(total: Drifting, part: Drifting) -> Drifting:
    """The tokens of `total` that are not in `part`."""
    return Drifting(*(_less(a, b) for a, b in zip(total, part)))


def _less(total: Moment, part: Moment) -> Moment:
    return Moment(total.sum_kk - part.sum_kk, total.tokens - part.tokens)


def choose(W_ok: Tensor, fitted: Drifting, held_out: Drifting, damps: Sequence[float]) -> Aim:
    """The strength, 0 to 1, and the damping with the least error on the tokens that were held out.
    W_ok: all weights of an input, one below the other."""
    pulls = [W_ok @ part.drift.mean_kk for part in (fitted, held_out)]
    return choose_step(W_ok, (pulls[0], fitted.moment), (pulls[1], held_out.moment), damps)


def choose_step(
    W_ok: Tensor,
    fitted: tuple[Tensor, Moment],
    held_out: tuple[Tensor, Moment],
    damps: Sequence[float],
) -> Aim:
    """The same of any pull [o, k], each with the second moment of the tokens that it is of.

    The tokens to fit to are those of all sums less those held out. Where one that is held out
    outweighs all others by far, as a rotated outlier does, what is left of the sums is rounding: no
    second moment, to which nothing is fitted.
    """
    best = Aim(strength=0.0, damp=damps[0], gain=0.0)
    (pull_ok, moment), (held_pull_ok, held_moment) = fitted, held_out
    if not moment.tokens or not held_moment.tokens:
        return best
    size = max(held_moment.output_error(W_ok), 1e-30)
    for damp in damps:
        factor_kk = _factor(moment, damp)
        if factor_kk is None:
            continue
        C_ok = solved(pull_ok, factor_kk)
        slope, curvature = float((C_ok * held_pull_ok).sum()), held_moment.output_error(C_ok)
        strength = min(max(slope / max(curvature, 1e-30), 0.0), 1.0)
        gain = (2 * strength * slope - strength**2 * curvature) / size
        if gain > best.gain:
            best = Aim(strength=strength, damp=damp, gain=gain)
    return best


def aim_held_out(damps: Sequence[float] = DAMPS) -> Transform:
    """W <- W + a W D (H + damp mean(diag H) I)^-1, with a and damp chosen on held-out tokens.

    For every input the strength a, from 0 to 1, and the damping are those with the least error on a
    quarter of the calibration tokens, when fitted to the others. The step itself is then fitted to
    all of them. Without drift, or without enough tokens to hold some out, weights stay bit for bit.
    Routers and routed experts stay as they are, as with `aim_at_reference`. Behind a mask the
    weight before it is aimed, and what the mask left follows on the support.

    Args:
        damps: fractions of mean(diag H) to choose from, each from 0 to 1.

    Returns:
        A transform of one stage, which rounds nothing. It needs calibration data. Its report holds
        `aim_strength`, `aim_damp` and `aim_gain`, the share of the held-out outputs' square by
        which their error fell.

    Raises:
        QlabError: damps is empty, or one of them is not from 0 to 1.

    Source:
        Zhang et al. 2025, Qronos: Correcting the Past by Shaping the Future; Arai and Ichikawa
        2025, Quantization Error Propagation.

    Example:
        >>> import qlab
        >>> for stage in qlab.chain(qlab.aim_held_out(), qlab.rtn("int4-g64")):
        ...     print(stage.name, stage.detail)
        aim_held_out damp 0.01, 0.1 or 1
        rtn grid minmax
    """
    check_damps(damps)

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        for source, sites in aimed_by_source(graph).items():
            total = Drifting(stats[source, "second_moment"], stats[source, "drift"])
            if total.drift.sum_kk.any():
                graph = aimed(graph, sites, total, stats[source, "held_out"], damps, None)
        return graph, stats

    needs = frozenset({"second_moment", "drift", "held_out"})
    detail = f"damp {listed(damps)}"
    stage = Stage("aim_held_out", needs, run, EachWeight(), detail=detail, workspace=4)
    return costing((stage,), Operations(square=2.5, rows=6))


def listed(damps: Sequence[float]) -> str:
    """The fractions in words."""
    *others, last = (f"{damp:g}" for damp in damps)
    return f"{', '.join(others)} or {last}" if others else last


def check_damps(damps: Sequence[float]) -> None:
    """Refuse no fractions to choose from, and those that are none."""
    if not damps:
        raise QlabError("damps is empty; give at least one fraction of mean(diag H)")
    for damp in damps:
        check_damp(damp)


Stream = tuple[Moment, Moment]  # what sums lack already: of all tokens, and of those held out


def pull_of(W_ok: Tensor, drift: Moment, stream: Moment | None) -> Tensor:
    """W D, and what the sum lacks that the output goes into."""
    pull_ok = W_ok @ drift.mean_kk
    return pull_ok if stream is None or not stream.tokens else pull_ok + stream.mean_kk


def aimed_by_source(graph: ModuleGraph) -> Mapping[str, Sequence[Site]]:
    """The sites whose weights are aimed, by their input: all but routers and routed experts."""
    return by_source([site for site in graph.sites if not site.route and not site.router])


def aimed(
    graph: ModuleGraph,
    sites: Sequence[Site],
    total: Drifting,
    held_out: Drifting,
    damps: Sequence[float],
    stream: Stream | None,
) -> ModuleGraph:
    """The graph with the weights of one input moved."""
    supports = [graph.support_ok(site) for site in sites]
    weights = [
        graph.weight_ok(site) if support is None else graph.target_ok(site)
        for site, support in zip(sites, supports)
    ]
    W_ok, fitted = torch.cat(weights), rest(total, held_out)
    of_all, of_held, of_rest = (None, None, None) if stream is None else (*stream, _less(*stream))
    held = pull_of(W_ok, held_out.drift, of_held), held_out.moment
    moved = weights
    try:
        rest_ = pull_of(W_ok, fitted.drift, of_rest), fitted.moment
        aim = choose_step(W_ok, rest_, held, damps)
        if aim.strength:
            factor, _ = cholesky(total.moment.mean_kk, aim.damp)
            pulls = [pull_of(W, total.drift, of_all) for W in weights]
            moved = [W + aim.strength * solved(P, factor) for W, P in zip(weights, pulls)]
    except QlabError as error:
        raise QlabError(f"{graph.where(sites[0])}: {error}") from error
    note = {"aim_strength": aim.strength, "aim_damp": aim.damp, "aim_gain": aim.gain}
    notes = dict(graph.notes)
    for site in sites:
        notes[site.path] = {**notes.get(site.path, {}), **note}
    if aim.strength:
        for site, W_ok, support in zip(sites, moved, supports):
            graph = aimed_at(graph, site, W_ok, support, total.moment)
    return replace(graph, notes=notes)


def aimed_at(
    graph: ModuleGraph, site: Site, W_ok: Tensor, support: Tensor | None, moment: Moment
) -> ModuleGraph:
    """The graph with another target of a site, and with what lies nearest to it as its leaf."""
    name = site.weight or ""
    if support is None:
        return graph.update({name: _in_layout(W_ok, site)})
    step_ok = W_ok - graph.target_ok(site)
    leaf_ok = followed(graph.weight_ok(site), W_ok, step_ok * support, moment)
    moved = graph.update({name: _in_layout(leaf_ok, site)})
    return replace(moved, targets={**graph.targets, name: _in_layout(W_ok, site)})


def _in_layout(W_ok: Tensor, site: Site) -> Tensor:
    return W_ok if site.layout == "o k" else W_ok.mT.contiguous()


def followed(leaf_ok: Tensor, target_ok: Tensor, step_ok: Tensor, moment: Moment) -> Tensor:
    """L + b S, with b, 0 to 1, for every row the least of tr((T - L - b S) H (T - L - b S)^T)."""
    H_kk = moment.mean_kk
    slope_o = torch.linalg.vecdot((target_ok - leaf_ok) @ H_kk, step_ok)
    curvature_o = torch.linalg.vecdot(step_ok @ H_kk, step_ok)
    share_o = (slope_o / curvature_o.clamp_min(1e-30)).clamp(0, 1)
    return leaf_ok + share_o[:, None] * step_ok
