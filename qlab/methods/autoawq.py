"""AWQ's scales as AutoAWQ and llm-compressor search them, for comparison with qlab's own.

    s_k = mean|x_k|^r / (w_k^(1 - r) + 1e-4),  divided by sqrt(max * min),  r = 0, 1/20, ..., 19/20

w_k is the mean over rows of |W_ok| / (the largest of its group). Both score a ratio by rounding
W s to nearest on whole ranges. AutoAWQ's r = 0 is not s = 1, so it can be worse than no scale;
llm-compressor's first candidate is s = 1. AutoAWQ then clips every group.

They score the output of the module around the weights (attention, or the gated pair); here it is
the summed output errors of the weights that read the input, from its second moment, and the same
thing for projections back into the residual stream.

Legend: W_ok weight, m_k = 1 / s_k what x is multiplied by.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import fsum

import torch
from torch import Tensor

from qlab.algebra.cell import Cell, Weight
from qlab.algebra.gauge import Element, Turn, gauge
from qlab.algebra.grid import encode, minmax
from qlab.algebra.leaf import dense
from qlab.algebra.operations import Operations
from qlab.algebra.spec import Spec, described, with_scale_dtype
from qlab.algebra.stats import Moment
from qlab.algebra.transform import Transform, at, chain, costing, each_cell
from qlab.methods.awq import Input, inputs_of, scaled_loss
from qlab.methods.rtn import rtn

RATIOS = [i / 20 for i in range(20)]
SHRUNKEN = [1 - i / 20 for i in range(10)]  # AutoAWQ clips a group to these shares of its range
# Which weights AutoAWQ does not clip: those that make queries and keys.
UNCLIPPED = "re:(?!.*(q_|k_|query|key|Wqkv)).*"

ScaleOf = Callable[[Tensor, Tensor, float], Tensor]  # mean|x_k|, w_k and a ratio -> s_k


def weight_mean(weights: Sequence[Tensor], spec: Spec) -> Tensor:
    """w_k: the mean over the rows of all weights of |W| / (the largest of its group + 1e-6)."""
    sums = [_relative_sizes(W_ok, spec).double().sum(0) for W_ok in weights]  # in any order
    return (torch.stack(sums).sum(0) / sum(map(len, weights))).float()


def _relative_sizes(W_ok: Tensor, spec: Spec) -> Tensor:
    """|W| [o, k] over the largest of its group."""
    groups = W_ok.abs().unflatten(-1, (-1, spec.tile.cols or W_ok.shape[-1]))
    return (groups / (groups.amax(-1, keepdim=True) + 1e-6)).flatten(-2)


def scale(absmean_k: Tensor, w_k: Tensor, ratio: float) -> Tensor:
    """s_k of a ratio."""
    s_k = (absmean_k**ratio / (w_k ** (1 - ratio) + 1e-4)).clamp_min(1e-4)
    s_k = s_k / (s_k.max() * s_k.min()).sqrt()
    return torch.where(s_k.isfinite(), s_k, 1.0)


def scale_or_one(absmean_k: Tensor, w_k: Tensor, ratio: float) -> Tensor:
    """s_k of a ratio, of which 0 stands for s = 1."""
    return scale(absmean_k, w_k, ratio) if ratio else torch.ones_like(absmean_k)


def _searched(turn: Turn, spec: Spec, scale_of: ScaleOf) -> Element | None:
    """The scale of the least loss among the ratios."""
    if turn.fold is None:
        return None
    settled, inputs = with_scale_dtype(spec, turn.graph.dtype), inputs_of(turn)
    groups = [[one] for one in inputs] if turn.apart else [inputs]
    chosen = [_least(turn, group, settled, scale_of) for group in groups]
    m = torch.stack([m_k for m_k, _ in chosen])
    m = turn.stored(m[:, None] if turn.apart else m[0])
    ratios = [ratio for _, ratio in chosen]
    return Element(M=m, M_inv=1 / m, notes={"awq_ratio": ratios if turn.apart else ratios[0]})


def _least(
    turn: Turn, inputs: Sequence[Input], spec: Spec, scale_of: ScaleOf
) -> tuple[Tensor, float]:
    """m_k of the best ratio, and that."""
    assert turn.fold is not None
    seen = fsum(i.share for i in inputs)
    absmean_k = torch.stack([i.absmean_k.double() * i.share for i in inputs]).sum(0)
    absmean_k = (absmean_k / max(seen, 1e-30)).float()
    w_k = weight_mean([W for i in inputs for W in i.weights], spec)
    best, least = (torch.ones_like(absmean_k), 0.0), torch.inf
    for ratio in RATIOS if seen else ():
        s_k = scale_of(absmean_k, w_k, ratio)
        m_k = turn.fold.stored(turn.graph, turn.fold.tie(1 / s_k))
        loss = fsum(i.share * scaled_loss(i.weights, i.moment, m_k, spec, minmax) for i in inputs)
        if loss < least:
            best, least = (m_k, ratio), loss
    return best


def awq_clip(spec: Spec) -> Transform:
    """AWQ's clipping: of every group the share of its range, from all to 55 %, with the least
    output error of the group alone after rounding.

    Args:
        spec: the number grid that the weights will be rounded to, or its name such as "int4-g64".

    Returns:
        A transform of one stage, which rounds nothing. Chain a rounding behind. It needs
        calibration data.

    Source:
        Lin et al. 2023, AWQ: Activation-aware Weight Quantization; AutoAWQ's code.
    """

    def fn(weight: Weight) -> Cell:
        W_ok = dense(weight.cell.leaf, torch.float32)
        settled = with_scale_dtype(spec, torch.float32)
        clipped, share = clip(W_ok, weight.stats["second_moment"], settled)
        return weight.cell.put(clipped, clipped=share)

    stages = each_cell("awq_clip", fn, {"second_moment"}, detail=f"for {described(spec)}")
    n = spec.tile.cols
    products = 2 * len(SHRUNKEN)  # with the moments of a group, or of a row
    counted = Operations(elements=products * n) if n else Operations(rows=products)
    return costing(stages, counted)


def clip(W_ok: Tensor, moment: Moment, spec: Spec) -> tuple[Tensor, float]:
    """The clipped weight, and the share of groups that were clipped."""
    n = spec.tile.cols or W_ok.shape[1]
    H_gnn = torch.stack([moment.mean_kk[i : i + n, i : i + n] for i in range(0, W_ok.shape[1], n)])
    W_ogn = W_ok.unflatten(1, (-1, n))
    largest_og = W_ogn.abs().amax(-1, keepdim=True)
    best, least = W_ogn, torch.full_like(largest_og, torch.inf)
    for share in SHRUNKEN:
        limit = largest_og * share
        shrunken = W_ogn.clamp(-limit, limit)
        rounded = dense(encode(minmax, shrunken.flatten(1), spec), torch.float32)
        D_ogn = (rounded - W_ok).unflatten(1, (-1, n))
        products = torch.einsum("ogn,gnm->ogm", D_ogn, H_gnn)
        e_og = torch.linalg.vecdot(products, D_ogn)[..., None]
        better = e_og < least
        best, least = torch.where(better, shrunken, best), torch.where(better, e_og, least)
    return best.flatten(1), float((best != W_ogn).any(-1).float().mean())


def _scales(name: str, spec: Spec, scale_of: ScaleOf) -> Transform:
    searching, *folding = gauge(
        name,
        "*:in",
        partial(_searched, spec=spec, scale_of=scale_of),
        frozenset({"second_moment", "absmean"}),
        detail=f"for {described(spec)}",
    )
    # the output error of each ratio
    return (*costing((searching,), Operations(rows=2 * len(RATIOS))), *folding)


def autoawq(spec: Spec) -> Transform:
    """AWQ as AutoAWQ does it: scales without s = 1 among them, clipping, and RTN.

    Args:
        spec: the number grid to round to, or its name such as "int4-g64".

    Returns:
        A transform of four stages. It needs calibration data. Use `awq` for quality; this is there
        to compare with.

    Source:
        Lin et al. 2023, AWQ: Activation-aware Weight Quantization; AutoAWQ's quantize/quantizer.py.
    """
    clipping = at(UNCLIPPED, awq_clip(spec))
    return chain(_scales("autoawq_scale", spec, scale), clipping, rtn(spec))


def llmcompressor_awq(spec: Spec) -> Transform:
    """AWQ as llm-compressor does it: scales with s = 1 among them, and RTN.

    Args:
        spec: the number grid to round to, or its name such as "int4-g64".

    Returns:
        A transform of three stages. It needs calibration data. Use `awq` for quality; this is there
        to compare with.

    Source:
        Lin et al. 2023, AWQ: Activation-aware Weight Quantization; llm-compressor 0.14.
    """
    return chain(_scales("llmcompressor_awq_scale", spec, scale_or_one), rtn(spec))
