"""Keys without what all of them share: the mean over tokens c is taken from every key before it is
cached.

    softmax_t(q (k_t - c)^T) = softmax_t(q k_t^T - q c^T) = softmax_t(q k_t^T)

so attention stays and nothing has to add c again. Keys of many models have channels with a mean far
from 0, of which a rounding with a scale for each token is the coarser. c is the mean of keys as
they are cached, behind rotary positions and rotations in front. Legend: c_k [channels of all
heads]. Source: the smoothing of keys of SageAttention (Zhang et al. 2025), which takes the mean of
the text at hand; here it is that of the calibration data, so that tokens are cached once.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.insert import insert
from qlab.algebra.online import Subtract
from qlab.algebra.scores import refuse_seen_shifts
from qlab.algebra.statistic import Stat
from qlab.algebra.stats import Stats
from qlab.algebra.transform import Transform
from qlab.algebra.views import Shifted
from qlab.algebra.wires import Wire

KEYS = "re:.*:key"  # the wires
# a shift as codecs are asked about it
FORM = Subtract(torch.zeros(1, dtype=torch.float32))
MEAN = Stat(
    lambda o: (o.x_nk.float().sum(0), len(o.x_nk)),
    lambda a, b: (a[0] + b[0], a[1] + b[1]),
    lambda state, M: (state[0] * M if M.ndim == 1 else state[0] @ M, state[1]),
    lambda k: (torch.zeros(k, dtype=torch.float32), 0),
    name="mean",
)


def centre_keys() -> Transform:
    """Take from all keys the mean over the calibration tokens, at run time. Chain the rounding of
    keys behind.

    The function stays: a softmax does not see what is added to all scores of a query. Blocks
    without an attention that the program shows stay as they are.

    Returns:
        A transform of one stage. It needs calibration data. No format has a place for it, so a plan
        refuses to write it; `qlab.apply` evaluates it.

    Raises:
        QlabError: before any work, an attention that does more to its scores than to scale, mask
            and add to them before the softmax: caps, and sinks beside them.

    Source:
        Zhang et al. 2025, SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference
        Acceleration (smoothing of keys).

    Example:
        >>> import qlab
        >>> cache = qlab.kv_cache("int4-token")
        >>> [stage.name for stage in qlab.chain(qlab.rotate_scores(), qlab.centre_keys(), cache)]
        ['rotate_scores', 'centre_keys', 'kv_cache']
    """

    def make(wire: Wire, stats: Mapping[str, Any]) -> Subtract:
        sum_k, tokens = stats["mean"]
        return Subtract(sum_k / max(tokens, 1))

    (put,) = insert("centre_keys", KEYS, make, {MEAN})

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        refuse_seen_shifts(graph, "centre_keys")
        return put.apply(graph, stats)

    return (replace(put, apply=run, view=Shifted(KEYS, (FORM,))),)
