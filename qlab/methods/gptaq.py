"""GPTAQ: aim at what the unquantized model computes, since the inputs are off already.

The paper (Li et al. 2025, asymmetric calibration) aims while it rounds. Here the weight is moved in
closed form before it is rounded, so that any method can follow.

Legend: x the input as the quantized sites before it make it, x' the input in the reference model,
H = E x^T x, D = E (x' - x)^T x, W_ok weight.
"""

import math
from dataclasses import replace

import torch

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.operations import Operations
from qlab.algebra.spec import Spec
from qlab.algebra.stats import Stats
from qlab.algebra.transform import Stage, Transform, chain
from qlab.algebra.views import EachWeight
from qlab.errors import QlabError
from qlab.methods.gptq import gptq
from qlab.methods.obs import check_damp, cholesky
from qlab.methods.qronos import aimed_at, aimed_by_source


def aim_at_reference(strength: float = 0.5, damp: float = 0.01) -> Transform:
    """W <- W + strength * W D (H + damp mean(diag H) I)^-1, with D = E (x' - x)^T x.

    With strength 1 this minimizes `E |V x - W x'|^2 + damp mean(diag H) |V - W|^2` over V. A
    smaller strength aims at W times a point between x and x'. Without drift D, W stays bit for bit.
    Routers stay as every engine reads them, and so do routed experts: the tokens that reach an
    expert differ between the two models, so their rows have no counterpart. Behind a mask the
    weight before it is aimed, and what the mask left follows on the support.

    Args:
        strength: the share of the way from x to x', not 0.
        damp: fraction of mean(diag H) that is added to the diagonal of H, from 0 to 1. It is raised
            where H needs it, and the report holds it as `aim_damp`.

    Returns:
        A transform of one stage, which rounds nothing. It needs calibration data.

    Raises:
        QlabError: strength is 0 or not finite, or damp is not from 0 to 1.

    Source:
        Li et al. 2025, GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration.

    Example:
        >>> import qlab
        >>> for stage in qlab.chain(qlab.aim_at_reference(strength=1), qlab.rtn("int4-g64")):
        ...     print(stage.name, stage.detail)
        aim_at_reference strength 1, damp 0.01
        rtn grid minmax
    """
    check_damp(damp)
    if not 0 < abs(strength) < math.inf:
        raise QlabError(
            f"strength is {strength}, with which no weight would move as it should; give a share "
            "such as 0.5"
        )

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        notes = dict(graph.notes)
        for source, sites in aimed_by_source(graph).items():
            drift = stats[source, "drift"]
            if not drift.sum_kk.any():
                continue
            try:
                factor, used = cholesky(stats[source, "second_moment"].mean_kk, damp)
            except QlabError as error:
                raise QlabError(f"{graph.where(sites[0])}: {error}") from error
            for site in sites:
                support = graph.support_ok(site)
                W_ok = graph.weight_ok(site) if support is None else graph.target_ok(site)
                # H is symmetric: W D H^-1 = (H^-1 (W D)^T)^T
                W_ok = W_ok + strength * torch.cholesky_solve((W_ok @ drift.mean_kk).mT, factor).mT
                graph = aimed_at(graph, site, W_ok, support, stats[source, "second_moment"])
                notes[site.path] = {**notes.get(site.path, {}), "aim_damp": used}
        return replace(graph, notes=notes), stats

    stage = Stage(
        "aim_at_reference",
        frozenset({"second_moment", "drift"}),
        run,
        EachWeight(),
        detail=f"strength {strength:g}, damp {damp:g}",
        workspace=3,
        operations=Operations(square=1 / 3, rows=2),
    )
    return (stage,)


def gptaq(spec: Spec) -> Transform:
    """GPTAQ: chain(aim_at_reference(), gptq(spec)).

    Args:
        spec: the number grid to round to, or its name such as "int4-g64".

    Returns:
        A transform of two stages. It needs calibration data.

    Source:
        Li et al. 2025, GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration.

    Example:
        >>> import qlab
        >>> [stage.name for stage in qlab.gptaq("int4-g64")]
        ['aim_at_reference', 'gptq']
    """
    return chain(aim_at_reference(), gptq(spec))
