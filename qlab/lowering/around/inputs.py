"""Inputs that are rounded at run time, as one operator that computes what
qlab.algebra.online.QuantizeInput does.

    qlab::round_input(x [n, k], scales, zeros, outer, spec) -> x on the grid of `spec`, in x's dtype

`spec` is the text that `exact.text_of` gives.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import parse_spec
from qlab.errors import QlabError
from qlab.lowering.weights.exact import has_columns, spec_of, text_of


@torch.library.custom_op("qlab::round_input", mutates_args=())
def round_input(
    x: Tensor, scales: Tensor | None, zeros: Tensor | None, outer: Tensor | None, spec: str
) -> Tensor:
    """QuantizeInput(spec, scales, zeros, outer)(x)."""
    return QuantizeInput(spec_of(spec), scales, zeros, outer)(x) if len(x) else x.clone()


@round_input.register_fake
def _(
    x: Tensor, scales: Tensor | None, zeros: Tensor | None, outer: Tensor | None, spec: str
) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.spec = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient that QuantizeInput itself has."""
    x, scales, zeros, outer = ctx.saved_tensors
    if not len(x):
        return g, *[None] * 4
    with torch.enable_grad():
        entering = x.detach().requires_grad_()
        rounded = QuantizeInput(spec_of(ctx.spec), scales, zeros, outer)(entering)
    (by_x,) = torch.autograd.grad(rounded, entering, g)
    return by_x, *[None] * 4


round_input.register_autograd(_gradients, setup_context=_save)


class RoundedInput(nn.Module):
    """x [n, k] -> x rounded to the nearest numbers of a grid. Scales that were fixed beforehand are
    buffers.

    spec: the grid, and what a scale covers. text: the same as the operator takes it. persistent:
    whether the scales are part of the model's state.
    """

    scales: Tensor | None
    zeros: Tensor | None
    outer: Tensor | None

    def __init__(
        self, path: str, rounding: QuantizeInput, device: torch.device, persistent: bool = True
    ):
        super().__init__()
        self.spec, self.text = rounding.spec, text_of(rounding.spec)
        self.label = str(rounding.input_spec)
        if not has_columns(self.spec) and parse_spec(str(self.spec)) != self.spec:
            raise QlabError(
                f"{path} rounds its inputs to {rounding.spec!r}, which has no name; evaluate the "
                "directory with qlab"
            )
        for name, part in (
            ("scales", rounding.scales),
            ("zeros", rounding.zeros),
            ("outer", rounding.outer),
        ):
            scale = None if part is None else part.to(device)
            self.register_buffer(name, scale, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return round_input(x, self.scales, self.zeros, self.outer, self.text)

    def extra_repr(self) -> str:
        return self.label
