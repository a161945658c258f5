"""Activation quantization: the inputs of linear layers are rounded to nearest at run time
(`online.QuantizeInput`)."""

from dataclasses import replace

import torch

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import Float, Spec
from qlab.algebra.stats import Stats
from qlab.algebra.transform import Stage, Transform
from qlab.errors import QlabError

DYNAMIC = (
    "use an input spec whose scales are found at run time (mxfp4, fp8-channel), or leave them "
    "out of quantize_inputs"
)


def quantize_inputs(spec: Spec) -> Transform:
    """Round the input of every selected site at run time.

    spec: its tiles lie over [tokens, channels], so that fp8-channel has one scale per token. Chain
    it behind the rounding of weights, whose statistics are those of inputs that are not rounded.
    NVFP4's global scale is stored beside the weight. It is measured on the calibration data, so
    that the largest input gets the largest scale.
    """
    needs = frozenset({"absmax"} if spec.outer else ())

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        online = dict(graph.online)
        for site in graph.sites:
            if site.router:
                continue
            outer = None
            if isinstance(spec, Float) and spec.outer:
                if site.route:
                    raise QlabError(
                        f"{graph.where(site)} is one of fused experts, whose inputs have no "
                        f"stored scale; {DYNAMIC}"
                    )
                outer = spec.global_scale(stats[site.source, "absmax"].amax())
            online[site.path] = (*online.get(site.path, ()), QuantizeInput(spec, outer=outer))
        return replace(graph, online=online), stats

    form = QuantizeInput(spec, outer=torch.ones(1, dtype=torch.float32) if spec.outer else None)
    return (
        Stage(
            "quantize_inputs",
            needs,
            run,
            detail=str(form.input_spec),
            sitewise=True,
            online=(form,),
        ),
    )
