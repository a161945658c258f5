"""LoaQ's target: a weight whose output is added to the residual stream also makes up for what the
stream lacks already.

W* = W + a (W D + S) (H + damp mean(diag H) I)^-1 with S = E (r' - r)^T x minimizes
E |r + V x - r' - W x'|^2 with a ridge at a = 1, so that the sum that leaves the block is aimed at,
not the output alone. As in `qlab.methods.qronos`, a and the damping are chosen for every input on
tokens that were held out, with a = 0 among the candidates. Inputs of other weights, and those of
programs that do not show the sum, get Qronos' target.

Legend: r, r' the stream before the weight's output is added, in the quantized and in the reference
model; x, x', H, D, W_ok as in `qlab.methods.qronos`.
Source: LoaQ (arXiv 2509.06297).
"""

from collections.abc import Sequence

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.operations import Operations
from qlab.algebra.stats import Drifting, Stats, add_known, add_moments
from qlab.algebra.transform import Stage, Transform, costing
from qlab.algebra.views import EachWeight
from qlab.methods.qronos import DAMPS, aimed, aimed_by_source, check_damps, listed

NEEDS = frozenset({"second_moment", "drift_fitted", "held_out", "stream_fitted", "stream_held_out"})


def aim_in_stream(damps: Sequence[float] = DAMPS) -> Transform:
    """`aim_held_out`, which also makes up for the drift of the residual stream.

    It does so where the output of a weight is added to the stream as it is; elsewhere it is
    `aim_held_out`.

    Args:
        damps: fractions of mean(diag H) to choose from, each from 0 to 1.

    Returns:
        A transform of one stage, which rounds nothing. It needs calibration data. Its report holds
        `aim_strength`, `aim_damp` and `aim_gain`, as that of `aim_held_out`.

    Raises:
        QlabError: damps is empty, or one of them is not from 0 to 1.

    Source:
        Lin and Wan 2025, LoaQ: Layer-wise Output Approximation Quantization.

    Example:
        >>> import qlab
        >>> for stage in qlab.chain(qlab.aim_in_stream(), qlab.rtn("int4-g64")):
        ...     print(stage.name, stage.detail)
        aim_in_stream damp 0.01, 0.1 or 1
        rtn grid minmax
    """
    check_damps(damps)

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        for source, sites in aimed_by_source(graph).items():
            held_out, of_held = stats[source, "held_out"], stats[source, "stream_held_out"]
            drift = add_moments(stats[source, "drift_fitted"], held_out.drift)
            total = Drifting(stats[source, "second_moment"], drift)
            stream = add_known(stats[source, "stream_fitted"], of_held), of_held
            if drift.sum_kk.any() or stream[0].sum_kk.any():
                graph = aimed(graph, sites, total, held_out, damps, stream)
        return graph, stats

    detail = f"damp {listed(damps)}"
    stage = Stage("aim_in_stream", NEEDS, run, EachWeight(), detail=detail, workspace=4)
    return costing((stage,), Operations(square=2.5, rows=6))
