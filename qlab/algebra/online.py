"""Operations at run time on the input x of a linear layer, or on another value: rounding it,
scaling and shifting it, multiplying it with a matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.algebra.experts import per_row
from qlab.algebra.grid import Grid, encode, minmax
from qlab.algebra.qtensor import QTensor, dense, round_codes
from qlab.algebra.spec import InputSpec, Spec


@dataclass(frozen=True)
class QuantizeInput:
    """x -> dense(round(x)) on the grid `minmax`, computed in fp32 over x as [tokens, k].

    A last group of channels that is not full is filled up with zeros. The gradient is that of
    x -> x (straight-through).

    spec: its tiles lie over [tokens, k]. scales, zeros [1, 1] or outer [1]: fixed beforehand; where
    they are None they are computed from each x.
    """

    spec: Spec
    scales: Tensor | None = None
    zeros: Tensor | None = None
    outer: Tensor | None = None

    @property
    def grid(self) -> Grid:
        """How scales that are computed come from a range."""
        return minmax

    @property
    def input_spec(self) -> InputSpec:
        """The operation without its tensors."""
        static = self.scales is not None or self.outer is not None
        return InputSpec(self.spec, static)

    def __call__(self, x: Tensor) -> Tensor:
        return _straight_through(self._rounded, x)

    def _rounded(self, x: Tensor) -> Tensor:
        scales, zeros, outer = (
            None if t is None else t.to(x.device) for t in (self.scales, self.zeros, self.outer)
        )
        if scales is None:
            return _as_rows(lambda x_nk: encode(minmax, x_nk, self.spec, outer=outer), x, self.spec)

        def fixed(x_nk: Tensor) -> QTensor:
            codes = round_codes(x_nk, scales, zeros, self.spec, outer)
            return QTensor(codes, scales, zeros, self.spec, outer)

        return _as_rows(fixed, x, self.spec)


@dataclass(frozen=True)
class QuantizeClipped:
    """x -> dense(round(x)) as `QuantizeInput` computes it from each x, with both ends of every
    range times `share`, and numbers beyond them clamped to these.

    spec: its tiles lie over [tokens, k]. scales, zeros: none is fixed beforehand.
    """

    scales: ClassVar[None] = None
    zeros: ClassVar[None] = None

    spec: Spec
    share: float

    @property
    def grid(self) -> Grid:
        """How scales come from a range."""
        return clipped(self.share)

    def __call__(self, x: Tensor) -> Tensor:
        return _straight_through(self._rounded, x)

    def _rounded(self, x: Tensor) -> Tensor:
        return _as_rows(lambda x_nk: encode(self.grid, x_nk, self.spec), x, self.spec)


def clipped(share: float) -> Grid:
    """The grid `minmax` with both ends of every range times this share."""
    return Grid(
        f"{share:g} of minmax",
        lambda lo, hi, spec: minmax.candidates(lo * share, hi * share, spec),
    )


def _straight_through(rounded: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """rounded(x), with the gradient of x."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded(x)
    with torch.no_grad():
        y = rounded(x)
    return y + (x - x.detach())  # adds 0, with the gradient of x


def _as_rows(encoded: Callable[[Tensor], QTensor], x: Tensor, spec: Spec) -> Tensor:
    """What the codes of x [..., k] stand for, encoded as [tokens, k] in fp32. A last group of
    channels that is not full is filled up with zeros."""
    k = x.shape[-1]
    x_nk = F.pad(x.flatten(0, -2).float(), (0, -k % (spec.tile.cols or k)))
    return dense(encoded(x_nk), torch.float32)[:, :k].reshape(x.shape).to(x.dtype)


@dataclass(frozen=True)
class Subtract:
    """x -> x - c, with c [k], computed in the dtype of c."""

    c_k: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        c_k = self.c_k.to(x.device)
        return (x.to(c_k.dtype) - c_k).to(x.dtype)


@dataclass(frozen=True)
class Multiply:
    """x -> x * m, with m [k], or [e, 1, k] for rows x that belong to experts."""

    m_k: Tensor

    @property
    def per_expert(self) -> bool:
        return self.m_k.ndim == 3

    def __call__(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        m = self.m_k.to(x.dtype)
        return x * (m if ends is None else per_row(m[:, 0], ends, len(x)))


@dataclass(frozen=True)
class Rotate:
    """x -> x @ M, with M [k, k], in the dtype of x."""

    M_kk: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.M_kk.to(x.dtype)


@dataclass(frozen=True)
class MatMul:
    """x -> x @ M for every n neighbouring channels, with M [n, n], or [b, n, n] for b blocks of
    channels with a matrix each, in the dtype of M."""

    M_nn: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return rotate(x, self.M_nn.to(x.device))


def matrix_of(op: object) -> Tensor | None:
    """The matrix with which an operation multiplies channels, if that is what it does."""
    if isinstance(op, MatMul):
        return op.M_nn
    return op.M_kk if isinstance(op, Rotate) else None


def rotate(x: Tensor, M_nn: Tensor) -> Tensor:
    """x @ M for every n neighbouring channels (MatMul)."""
    blocks = x.to(M_nn.dtype).unflatten(-1, (-1, M_nn.shape[-1]))
    if M_nn.ndim == 2:
        return (blocks @ M_nn).flatten(-2).to(x.dtype)
    return (blocks[..., None, :] @ M_nn).flatten(-3).to(x.dtype)
