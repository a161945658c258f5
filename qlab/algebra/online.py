"""What happens at run time to a value: rounding it, multiplying it with a matrix."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.algebra.experts import per_row
from qlab.algebra.grid import encode, minmax
from qlab.algebra.qtensor import QTensor, dense, round_codes
from qlab.algebra.spec import InputSpec, Spec


@dataclass(frozen=True)
class QuantizeInput:
    """The online operation x -> dense(round(x)) on the grid `minmax`, x [..., k] seen as [tokens,
    k], computed in fp32.

    A last group of channels that is not full is filled up with zeros. Its gradient is the
    straight-through one: that of x -> x.

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
        scales, zeros, outer = (
            None if t is None else t.to(x.device) for t in (self.scales, self.zeros, self.outer)
        )
        if scales is None:
            q = encode(minmax, x_nk, self.spec, outer=outer)
        else:
            q = QTensor(
                round_codes(x_nk, scales, zeros, self.spec, outer), scales, zeros, self.spec, outer
            )
        return dense(q, torch.float32)[:, :k].reshape(x.shape).to(x.dtype)


@dataclass(frozen=True)
class Multiply:
    """The online operation x -> x * m, m [k], or of experts' rows m [e, 1, k]."""

    m_k: Tensor

    @property
    def per_expert(self) -> bool:
        return self.m_k.ndim == 3

    def __call__(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        m = self.m_k.to(x.dtype)
        return x * (m if ends is None else per_row(m[:, 0], ends, len(x)))


@dataclass(frozen=True)
class Rotate:
    """The online operation x -> x @ M, M [k, k]."""

    M_kk: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.M_kk.to(x.dtype)


@dataclass(frozen=True)
class MatMul:
    """The online operation x -> x @ M for every n neighbouring channels, M [n, n], computed in the
    dtype of M."""

    M_nn: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return rotate(x, self.M_nn.to(x.device))


def rotate(x: Tensor, M_nn: Tensor) -> Tensor:
    """See MatMul."""
    return (x.to(M_nn.dtype).unflatten(-1, (-1, len(M_nn))) @ M_nn).flatten(-2).to(x.dtype)
