"""Leaves: what a program holds in the place of a weight.

A leaf is a plain tensor in the layout of its program, or any pytree of the form `Structured`, which
is [..., o, k] in every layout: codes (`qtensor.QTensor`), a product of two thin matrices, a sum of
leaves, or one of your own, registered by `torch.utils._pytree.register_pytree_node`.

Legend: W_ok a weight of o output and k input channels, r the rank of a product.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.errors import QlabError


@runtime_checkable
class Structured(Protocol):
    """A weight [..., o, k] that is more than one tensor of numbers.

    shape: that of the weight. dense(dtype): the weight in floating point, differentiable in the
    floating-point tensors that it is made of; without a dtype in one of the leaf's own choice.
    bits(): all bits that it takes, of the whole weight.
    """

    @property
    def shape(self) -> torch.Size: ...

    def dense(self, dtype: torch.dtype | None = None) -> Tensor: ...

    def bits(self) -> float: ...


class Fetched:
    """A `Structured` weight that lies elsewhere, and is fetched whenever it is made dense. A
    program multiplies with it and lets it go, and on the way back fetches it once more."""


class FetchedStack(Fetched, ABC):
    """Such a weight that may be [e, o, k], of experts."""

    @abstractmethod
    def of_expert(self, expert: int) -> Any:
        """One expert of it, as such a weight [o, k]."""


def of_expert(leaf: Any, expert: int) -> Any:
    """One expert of a leaf [e, o, k]."""
    if isinstance(leaf, FetchedStack):
        return leaf.of_expert(expert)
    return pytree.tree_map_only(Tensor, lambda t: t[expert], leaf)


def is_leaf(value: Any) -> bool:
    """Whether a program can hold this in the place of a weight."""
    if isinstance(value, Tensor):
        return True
    # A type that pytrees do not know would be copied, moved and stacked without its tensors.
    return isinstance(value, Structured) and type(value) in pytree.SUPPORTED_NODES


def dense(leaf: Tensor | Structured, dtype: torch.dtype | None = None) -> Tensor:
    """The weight in floating point: the tensor itself, or what the leaf says.

    Args:
        leaf: a tensor, a QTensor, or any other leaf.
        dtype: of the arithmetic and the result. The default is that of a tensor, and of the scales
            of a QTensor (fp32 for scales of 8 bits).

    Returns:
        The weight, differentiable in the floating-point parts of the leaf.

    Example:
        >>> import qlab, torch
        >>> thin = qlab.LowRank(torch.ones(2, 1), torch.tensor([[1.0, 2.0, 3.0]]))
        >>> qlab.dense(thin)
        tensor([[1., 2., 3.],
                [1., 2., 3.]])
    """
    if isinstance(leaf, Tensor):
        return leaf if dtype is None else leaf.to(dtype)
    return leaf.dense(dtype)


def bits(leaf: Tensor | Structured) -> float:
    """All bits that a leaf takes."""
    return 8.0 * leaf.nbytes if isinstance(leaf, Tensor) else leaf.bits()


@dataclass(frozen=True)
class LowRank:
    """W[..., o, k] = B A, of rank r.

    Args:
        B_or: [..., o, r].
        A_rk: [..., r, k].

    Raises:
        QlabError: the ranks of the two differ.

    Example:
        >>> import qlab, torch
        >>> thin = qlab.LowRank(torch.ones(64, 2), torch.ones(2, 32))
        >>> tuple(thin.shape), thin.bits()
        ((64, 32), 6144.0)
    """

    B_or: Tensor
    A_rk: Tensor

    def __post_init__(self) -> None:
        parts = (self.B_or, self.A_rk)
        if not all(isinstance(part, Tensor) for part in parts):
            return  # a pytree map may put anything in their place
        batch = self.B_or.shape[:-2] == self.A_rk.shape[:-2]
        if not batch or self.B_or.shape[-1] != self.A_rk.shape[-2]:
            raise QlabError(
                f"B {tuple(self.B_or.shape)} and A {tuple(self.A_rk.shape)} of a low rank have no "
                "product; give B [o, r] and A [r, k] of one rank r"
            )

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.B_or.shape[:-1], self.A_rk.shape[-1]])

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """B A, multiplied in the dtype."""
        dtype = dtype or torch.promote_types(self.B_or.dtype, self.A_rk.dtype)
        return self.B_or.to(dtype) @ self.A_rk.to(dtype)

    def bits(self) -> float:
        """Those of both factors."""
        return bits(self.B_or) + bits(self.A_rk)


@dataclass(frozen=True)
class Sum:
    """W[..., o, k] = the sum of its parts, such as codes and a low rank beside them.

    The first part is the weight proper: the grid and the support of a cell bind it alone.

    Args:
        parts: leaves of one shape [..., o, k], tensors among them.

    Raises:
        QlabError: there is no part, or their shapes differ.

    Example:
        >>> import qlab, torch
        >>> beside = qlab.LowRank(torch.ones(2, 1), torch.ones(1, 2))
        >>> qlab.Sum((torch.eye(2), beside)).dense()
        tensor([[2., 1.],
                [1., 2.]])
    """

    parts: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise QlabError("a sum of leaves has no part; give at least one")
        if not all(map(is_leaf, self.parts)):
            return  # a pytree map may put anything in their place
        shapes = {tuple(part.shape) for part in self.parts}
        if len(shapes) > 1:
            raise QlabError(
                f"the parts of a sum are {' and '.join(map(str, sorted(shapes)))}; give leaves of "
                "one shape [o, k]"
            )

    @property
    def shape(self) -> torch.Size:
        return self.parts[0].shape

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The sum, added up in the dtype."""
        first, *others = (dense(part, dtype) for part in self.parts)
        for other in others:
            first = first + other
        return first

    def bits(self) -> float:
        """Those of all parts."""
        return sum(map(bits, self.parts))


def proper(leaf: Any) -> Any:
    """The part of a leaf that its cell binds to a grid and a support: of a sum the first."""
    return proper(leaf.parts[0]) if isinstance(leaf, Sum) else leaf


pytree.register_pytree_node(
    LowRank, lambda leaf: ([leaf.B_or, leaf.A_rk], None), lambda parts, _: LowRank(*parts)
)
pytree.register_pytree_node(
    Sum, lambda leaf: (list(leaf.parts), None), lambda parts, _: Sum(tuple(parts))
)
