"""SmoothQuant: outliers of inputs move into weights, which lose less by it (Xiao et al. 2022).

x W^T = (x / s) (W s)^T with s = max|x|^alpha / max|W|^(1 - alpha) for every input channel, and
1 / s is folded into what produces x.

Legend: W_ok weight, s_k the smoothing scale, m_k = 1 / s_k what x is multiplied by.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qlab.algebra.absorb import Fold, absorb, folds
from qlab.algebra.graph import ModuleGraph, Site, by_origin, by_source
from qlab.algebra.reparametrize import reparametrize
from qlab.algebra.stats import Stats
from qlab.algebra.transform import Stage, Transform, chain
from qlab.errors import QlabError

LEAST = 1e-5  # the paper's code keeps scales above this


def smoothing(absmax_k: Tensor, weightmax_k: Tensor, alpha: float) -> Tensor:
    """s_k = max|x|^alpha / max|W|^(1 - alpha). A channel that is 0 in all inputs or all weights
    has nothing to move, and keeps s = 1."""
    s_k = absmax_k**alpha / weightmax_k.clamp_min(LEAST) ** (1 - alpha)
    return torch.where((absmax_k > 0) & (weightmax_k > 0), s_k.clamp_min(LEAST), 1.0)


def _maxima(graph: ModuleGraph, stats: Stats, sites: Sequence[Site]) -> list[tuple[Tensor, Tensor]]:
    """max|x| and max|W| [k] of the inputs of one origin: a pair per source, and one per expert."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for source, group in by_source(sites).items():
        absmax = stats[source, "absmax"]
        routed = group[0].route is not None
        experts = range(len(absmax.states)) if routed else [None]
        for e in experts:
            weights = [graph.weight_ok(site, e).abs().amax(0) for site in group]
            pairs.append((absmax if e is None else absmax.states[e], torch.stack(weights).amax(0)))
    return pairs


def _smooth_origin(
    graph: ModuleGraph, stats: Stats, sites: Sequence[Site], fold: Fold, alpha: float
) -> tuple[ModuleGraph, Stats]:
    """The graph with the scale at the inputs of one origin, whose sites these are."""
    pairs = _maxima(graph, stats, sites)
    apart = len(graph.params[fold.producer.weight].shape) == 3  # each expert has its own scale
    if not apart:
        inputs, weights = zip(*pairs)
        pairs = [(torch.stack(inputs).amax(0), torch.stack(weights).amax(0))]
    scales = [fold.tie(1 / smoothing(*pair, alpha)) for pair in pairs]
    m = fold.stored(graph, torch.stack(scales)[:, None] if apart else scales[0])
    graph, stats = reparametrize(graph, stats, sites[0].origin, m, 1 / m)
    note = {"smoothing": float(1 / m.min())}
    notes = dict(graph.notes)
    for site in sites:
        notes[site.path] = {**notes.get(site.path, {}), **note}
    return replace(graph, notes=notes), stats


def smoothquant(alpha: float = 0.5) -> Transform:
    """SmoothQuant's scale at every input that can take one, folded upstream. Chain a rounding
    behind, and the rounding of inputs.

    The function stays. Inputs whose scale nothing upstream can take (behind a post-norm or GELU)
    keep s = 1. Channels that one producer channel feeds (grouped queries) get one scale. A norm
    before a mixture gets one scale for all that reads it; inside the experts each has its own.

    Args:
        alpha: the share of the outliers that moves into the weights: 0 moves none of the inputs'
            range, 1 all of it.

    Returns:
        A transform of two stages, smoothquant and absorb. The report holds the largest s.

    Raises:
        QlabError: alpha is no number from 0 to 1.

    Source:
        Xiao et al. 2022, SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
        Language Models.

    Example:
        >>> import qlab
        >>> w8 = qlab.chain(qlab.smoothquant(alpha=0.6), qlab.rtn("int8-channel"))
        >>> [(stage.name, stage.detail) for stage in w8]
        [('smoothquant', 'alpha 0.6'), ('absorb', ''), ('rtn', 'grid minmax')]
    """
    if not 0 <= alpha <= 1:
        raise QlabError(f"smoothquant's alpha is {alpha}; give a number from 0 to 1, such as 0.5")

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        places = folds(graph.code)
        for origin, sharing in by_origin(graph.sites).items():
            # A router gets the scale of its input as well, but it is never rounded.
            rounded = [site for site in sharing if not site.router]
            if origin in places and rounded:
                graph, stats = _smooth_origin(graph, stats, rounded, places[origin], alpha)
        return graph, stats

    smooth = Stage(
        "smoothquant", frozenset({"absmax"}), run, detail=f"alpha {alpha:g}", reparametrizes=True
    )
    return chain((smooth,), absorb())
