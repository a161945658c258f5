"""SmoothQuant: outliers of inputs move into weights, which lose less by it (Xiao et al. 2022).

x W^T = (x / s) (W s)^T with s = max|x|^alpha / max|W|^(1 - alpha) for every input channel, and
1 / s is folded into what produces x.

Legend: W_ok weight, s_k the smoothing scale, m_k = 1 / s_k what x is multiplied by.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlab.algebra.gauge import Element, Turn, gauge
from qlab.algebra.transform import Transform
from qlab.errors import QlabError

LEAST = 1e-5  # the paper's code keeps scales above this


def smoothing(absmax_k: Tensor, weightmax_k: Tensor, alpha: float) -> Tensor:
    """s_k = max|x|^alpha / max|W|^(1 - alpha). A channel that is 0 in all inputs or all weights
    has nothing to move, and keeps s = 1."""
    s_k = absmax_k**alpha / weightmax_k.clamp_min(LEAST) ** (1 - alpha)
    return torch.where((absmax_k > 0) & (weightmax_k > 0), s_k.clamp_min(LEAST), 1.0)


def _scale(turn: Turn, alpha: float) -> Element | None:
    """The scale of a wire: of all that its readers see, or of every expert that makes its own."""
    if turn.fold is None:
        return None
    sources = turn.sources()
    inputs = [source.stats["absmax"] for source in sources]
    weights = [_largest(source.weights) for source in sources]
    if not turn.apart:
        inputs, weights = [torch.stack(inputs).amax(0)], [torch.stack(weights).amax(0)]
    scales = [1 / smoothing(*pair, alpha) for pair in zip(inputs, weights)]
    m = turn.stored(torch.stack(scales)[:, None] if turn.apart else scales[0])
    return Element(M=m, M_inv=1 / m, notes={"smoothing": float(1 / m.min())})


def _largest(weights: Sequence[Tensor]) -> Tensor:
    """max|W| [k] over the rows of several weights."""
    return torch.stack([W_ok.abs().amax(0) for W_ok in weights]).amax(0)


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

    return gauge(
        "smoothquant",
        "*:in",
        lambda turn: _scale(turn, alpha),
        frozenset({"absmax"}),
        detail=f"alpha {alpha:g}",
    )
