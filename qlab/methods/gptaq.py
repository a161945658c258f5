"""GPTAQ: round towards what the unquantized model computes, not towards what the weight makes of
inputs that are off already.

Source: Li et al. 2025 (GPTAQ, asymmetric calibration), in closed form and before the rounding, so
that any method can follow.

Legend: x input as the quantized sites before it make it, x' the reference model's, H = E x^T x, D =
E (x' - x)^T x.
"""

import math
from dataclasses import replace

import torch

from qlab.algebra.graph import ModuleGraph, by_source
from qlab.algebra.qtensor import Leaf
from qlab.algebra.spec import Spec
from qlab.algebra.stats import Stats
from qlab.algebra.transform import Stage, Transform, chain
from qlab.errors import QlabError
from qlab.methods.gptq import gptq
from qlab.methods.obs import check_damp, cholesky


def aim_at_reference(strength: float = 0.5, damp: float = 0.01) -> Transform:
    """W <- W + strength * W D (H + damp mean(diag H) I)^-1.

    With strength 1 it is the minimum over V of E |V x - W x'|^2 + damp mean(diag H) |V - W|^2; a
    smaller strength aims at W times a point between x and x'. Damping is raised where H needs it
    and noted as `aim_damp`; beyond 1 it is an error. Without drift, as on the reference's own
    activations, W stays as it is, bit for bit. Routers stay too, as every engine reads them, and
    weights of routed experts: which tokens reach an expert differs between the two models, so that
    their rows have no pairs.
    """
    check_damp(damp)
    if not 0 < abs(strength) < math.inf:
        raise QlabError(
            f"strength is {strength}, with which no weight would move as it should; give a share "
            "such as 0.5"
        )

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        leaves: dict[str, Leaf] = {}
        notes = dict(graph.notes)
        for source, sites in by_source(
            s for s in graph.sites if not s.route and not s.router
        ).items():
            if not (drift := stats[source, "drift"]).sum_kk.any():
                continue
            try:
                factor, used = cholesky(stats[source, "second_moment"].mean_kk, damp)
            except QlabError as error:
                raise QlabError(f"{graph.where(sites[0])}: {error}") from error
            for site in sites:
                W_ok = graph.weight_ok(site)
                assert site.weight is not None  # weight_ok refuses it otherwise
                W_ok = (
                    W_ok + strength * torch.cholesky_solve((W_ok @ drift.mean_kk).mT, factor).mT
                )  # H is symmetric
                leaves[site.weight] = W_ok if site.layout == "o k" else W_ok.mT.contiguous()
                notes[site.path] = {**notes.get(site.path, {}), "aim_damp": used}
        return replace(graph.update(leaves), notes=notes), stats

    return (
        Stage(
            "aim_at_reference",
            frozenset({"second_moment", "drift"}),
            run,
            detail=f"strength {strength:g}, damp {damp:g}",
            sitewise=True,
            workspace=3,
        ),
    )


def gptaq(spec: Spec) -> Transform:
    """chain(aim_at_reference(), gptq(spec))."""
    return chain(aim_at_reference(), gptq(spec))
