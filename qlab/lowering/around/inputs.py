"""Inputs that are rounded at run time, as one operator that computes what
qlab.algebra.online.QuantizeInput does, or QuantizeClipped where a share of each range is used.

    qlab::round_input(x [n, k], scales, zeros, outer, spec, share) -> x on the grid of `spec`, in
                                                                      x's dtype

`spec` is the text that `exact.text_of` gives.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qlab.algebra.online import QuantizeClipped, QuantizeInput
from qlab.algebra.spec import InputSpec
from qlab.lowering.weights.exact import spec_of, text_of

Rounding = QuantizeInput | QuantizeClipped


@torch.library.custom_op("qlab::round_input", mutates_args=())
def round_input(
    x: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    outer: Tensor | None,
    spec: str,
    share: float = 1.0,
) -> Tensor:
    """QuantizeInput(spec, scales, zeros, outer)(x), or QuantizeClipped(spec, share)(x)."""
    return operation_of(scales, zeros, outer, spec, share)(x) if len(x) else x.clone()


def operation_of(
    scales: Tensor | None, zeros: Tensor | None, outer: Tensor | None, spec: str, share: float
) -> Rounding:
    if share < 1:
        return QuantizeClipped(spec_of(spec), share)
    return QuantizeInput(spec_of(spec), scales, zeros, outer)


@round_input.register_fake
def _(
    x: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    outer: Tensor | None,
    spec: str,
    share: float = 1.0,
) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.spec, ctx.share = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient that QuantizeInput itself has."""
    x, scales, zeros, outer = ctx.saved_tensors
    if not len(x):
        return g, *[None] * 5
    with torch.enable_grad():
        entering = x.detach().requires_grad_()
        rounded = operation_of(scales, zeros, outer, ctx.spec, ctx.share)(entering)
    (by_x,) = torch.autograd.grad(rounded, entering, g)
    return by_x, *[None] * 5


round_input.register_autograd(_gradients, setup_context=_save)


class RoundedInput(nn.Module):
    """x [n, k] -> x rounded to the nearest numbers of a grid. Scales that were fixed beforehand are
    buffers.

    spec: the grid, and what a scale covers. text: the same as the operator takes it. share: of each
    range. persistent: whether the scales are part of the model's state.
    """

    scales: Tensor | None
    zeros: Tensor | None
    outer: Tensor | None

    def __init__(self, rounding: Rounding, device: torch.device, persistent: bool = True):
        super().__init__()
        self.spec, self.text = rounding.spec, text_of(rounding.spec)
        self.share = getattr(rounding, "share", 1.0)
        for name in ("scales", "zeros", "outer"):
            part = getattr(rounding, name, None)
            scale = None if part is None else part.to(device)
            self.register_buffer(name, scale, persistent=persistent)

    @property
    def operation(self) -> Rounding:
        """What it does, as a value."""
        return operation_of(self.scales, self.zeros, self.outer, self.text, self.share)

    def forward(self, x: Tensor) -> Tensor:
        return round_input(x, self.scales, self.zeros, self.outer, self.text, self.share)

    def extra_repr(self) -> str:
        static = self.scales is not None or self.outer is not None
        label = str(InputSpec(self.spec, static))
        return label if self.share == 1 else f"{label}, {self.share:g} of each range"
