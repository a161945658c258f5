"""Activation quantization: x is rounded to nearest at run time, as the weights were beforehand."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.errors import QlabError
from qlab.graph import ModuleGraph
from qlab.methods.grid import encode, minmax
from qlab.qtensor import QTensor, dense, round_codes
from qlab.spec import Float, InputSpec, Spec
from qlab.stats import Stats
from qlab.transform import Stage, Transform

DYNAMIC = "use an input spec whose scales are found at run time (mxfp4, fp8-channel), or leave them out of quantize_inputs"


@dataclass(frozen=True)
class QuantizeInput:
    """The online operation x -> dense(round(x)) on the grid `minmax`, x [..., k] seen as [tokens, k], computed in fp32.

    A last group of channels that is not full is filled up with zeros. Its gradient is the straight-through one: that of x -> x.

    scales, zeros [1, 1] or outer [1]: what was fixed beforehand; None is found for the x at hand.
    """

    spec: Spec
    scales: Tensor | None = None
    zeros: Tensor | None = None
    outer: Tensor | None = None

    @property
    def input_spec(self) -> InputSpec:
        """The operation without its tensors."""
        return InputSpec(self.spec, self.scales is not None or self.outer is not None)

    def __call__(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._rounded(x)
        with torch.no_grad():
            rounded = self._rounded(x)
        return rounded + (x - x.detach())  # which adds 0

    def _rounded(self, x: Tensor) -> Tensor:
        x_nk, k = x.flatten(0, -2).float(), x.shape[-1]
        x_nk = F.pad(x_nk, (0, -k % (self.spec.tile.cols or k)))
        scales, zeros, outer = (None if t is None else t.to(x.device) for t in (self.scales, self.zeros, self.outer))
        if scales is None:
            q = encode(minmax, x_nk, self.spec, outer=outer)
        else:
            q = QTensor(round_codes(x_nk, scales, zeros, self.spec, outer), scales, zeros, self.spec, outer)
        return dense(q, torch.float32)[:, :k].reshape(x.shape).to(x.dtype)


def quantize_inputs(spec: Spec) -> Transform:
    """Round what enters every selected site at run time, with a scale for every token, group of channels or whole x.

    spec: its tiles lie over [tokens, channels], so that 'fp8-channel' has one scale per token. Chain it behind what
    rounds the weights: statistics are those of the inputs before it. NVFP4's global scale is stored with the weights, and
    is measured on the calibration data: the largest input gets the largest scale.
    """
    needs = frozenset({"absmax"} if spec.outer else ())

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        online = dict(graph.online)
        for site in (s for s in graph.sites if not s.router):
            outer = None
            if isinstance(spec, Float) and spec.outer:
                if site.route:
                    raise QlabError(f"{graph.where(site)} is one of fused experts, whose inputs have no stored scale; {DYNAMIC}")
                outer = spec.global_scale(stats[site.source, "absmax"].amax())
            online[site.path] = (*online.get(site.path, ()), QuantizeInput(spec, outer=outer))
        return replace(graph, online=online), stats

    form = QuantizeInput(spec, outer=torch.ones(1) if spec.outer else None)
    return (Stage("quantize_inputs", needs, run, detail=str(form.input_spec), sitewise=True, online=(form,)),)
