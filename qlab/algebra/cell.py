"""A cell: one weight W_ok with what it aims at, what holds it now, and where it may lie.

Steps narrow a cell and put leaves into it. What a step puts lies where the cell allows, so that
zeros of a mask stay, and codes that a step before it made may be improved on their own grid.

Legend: W_ok a weight of o output and k input channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.leaf import Structured, dense, is_leaf, proper
from qlab.algebra.qtensor import QTensor, off_grid
from qlab.algebra.spec import Spec, same_grid
from qlab.errors import QlabError


class Misfit(QlabError):
    """A refusal of a cell, which names the weight and the step by itself."""


@dataclass(frozen=True)
class Feasible:
    """Where a weight may lie.

    Args:
        spec: the grid that its codes belong to; None while it is plain numbers.
        support: bool [o, k], False where it is 0; None where it may be anything everywhere.

    Example:
        >>> import qlab, torch
        >>> qlab.Feasible(support=torch.eye(2).bool()).spec is None
        True
    """

    spec: Spec | None = None
    support: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """One weight with its state. An immutable value, of which steps return new ones.

    Args:
        target: fp32 [o, k], what the weight is to be near to.
        leaf: what holds the weight now: a tensor [o, k], codes, or any other leaf.
        feasible: where a leaf may lie that is put into it.
        notes: what the step says of it in the report, numbers and texts by name.
        name: the weight's full name, for errors.
        step: the step's name, for errors.

    Example:
        >>> import qlab, torch
        >>> W_ok = torch.tensor([[1.0, -3.0, 0.5, 2.0]])
        >>> cell = qlab.Cell(target=W_ok, leaf=W_ok)
        >>> large = W_ok.abs() >= 2
        >>> cell.narrow(support=large).leaf
        tensor([[ 0., -3.,  0.,  2.]])
        >>> cell.narrow(support=large).put(W_ok)
        Traceback (most recent call last):
        qlab.algebra.cell.Misfit: the weight: the step moves 2 weights that a step before it set ...
    """

    target: Tensor
    leaf: Tensor | Structured
    feasible: Feasible = Feasible()
    notes: Mapping[str, Any] = field(default_factory=dict)
    name: str = "the weight"
    step: str = "the step"

    @property
    def support(self) -> Tensor | None:
        """bool [o, k], False where the weight is 0 and stays so; None where there are no such
        zeros."""
        return self.feasible.support

    def put(self, leaf: Tensor | Structured, **notes: Any) -> "Cell":
        """The cell with another leaf, and with notes for the report beside those that it has.

        Args:
            leaf: [o, k], on the grid and the support of the cell. Of a `Sum` the first part alone
                is bound to those.
            **notes: numbers and texts by name.

        Raises:
            QlabError: the leaf is none, is of another shape, holds NaN or Inf, is off the grid or
                off the support.
        """
        refuse_misfit(leaf, self)
        return replace(self, leaf=leaf, notes={**self.notes, **notes})

    def narrow(self, spec: Spec | None = None, support: Tensor | None = None) -> "Cell":
        """The cell with less room, and its leaf set to 0 where the support leaves it out.

        Args:
            spec: the grid for codes to come; one that the cell has already stays.
            support: bool [o, k], a part of the support that the cell has.

        Raises:
            QlabError: another grid than the cell has, or a wider support.
        """
        cell = self if spec is None else replace(self, feasible=self._on(spec))
        if support is None:
            return cell
        refuse_support(self, support)
        feasible = replace(cell.feasible, support=support)
        return replace(cell, feasible=feasible, leaf=on_support(cell.leaf, support))

    def aim(self, target: Tensor, **notes: Any) -> "Cell":
        """The cell with another target [o, k]. A leaf of plain numbers becomes the target, on the
        support; codes stay as they are.

        Raises:
            QlabError: the target is of another shape, or holds NaN or Inf.
        """
        if target.shape != self.target.shape or not torch.isfinite(target).all():
            raise Misfit(
                f"{self.name}: {self.step} aims at a weight {tuple(target.shape)} that is not "
                f"{tuple(self.target.shape)} or holds NaN or Inf; aim at finite numbers [o, k]"
            )
        leaf = self.leaf
        if isinstance(leaf, Tensor):
            leaf = target if self.support is None else on_support(target, self.support)
        return replace(self, target=target, leaf=leaf, notes={**self.notes, **notes})

    def _on(self, spec: Spec) -> Feasible:
        before = self.feasible.spec
        if before is not None and not same_grid(before, spec):
            raise Misfit(
                f"{self.name} lies on the grid {before}, and {self.step} asks for {spec}; a grid "
                "only narrows, so give each weight one"
            )
        return replace(self.feasible, spec=before or spec)


@dataclass(frozen=True)
class Weight:
    """What a step of one weight sees (`qlab.each_cell`).

    Args:
        name: the weight's full name.
        cell: the weight and its state.
        stats: what was observed of its input, by name, as copies; beside what the step needs there
            is "outer", the global scale [1] of an nvfp4 spec (None for other specs).
        expert: its place among the experts of a mixture, or None.

    Example:
        >>> import qlab, torch
        >>> W_ok = torch.ones(2, 4)
        >>> weight = qlab.Weight("proj", qlab.Cell(target=W_ok, leaf=W_ok), stats={})
        >>> weight.cell.put(0.5 * weight.cell.leaf, share=0.5).notes
        {'share': 0.5}
    """

    name: str
    cell: Cell
    stats: Mapping[str, Any]
    expert: int | None = None


def on_support(leaf: Any, support: Tensor) -> Any:
    """The leaf with 0 off the support [o, k]. Codes become their zero points there; a leaf of
    another form stays, for its own step to narrow."""
    if isinstance(leaf, Tensor):
        return leaf.masked_fill(~support, 0)
    if isinstance(leaf, QTensor) and leaf.perm is None:
        return replace(leaf, codes=zero_codes(leaf).where(~support, leaf.codes))
    return leaf


def zero_codes(q: QTensor) -> Tensor:
    """The codes [..., o, k] that are nearest to 0: the zero points, where the grid has some."""
    if q.zeros is None:
        return torch.zeros_like(q.codes)
    tiles = q.zeros[..., None].expand_as(q.spec.tile.split(q.codes))
    nearest = tiles.round() if tiles.is_floating_point() else tiles
    return q.spec.tile.join(nearest, q.shape).to(q.codes.dtype)


def moved(leaf: Any, support: Tensor) -> int:
    """How many weights off the support [..., o, k] are not 0 in the leaf."""
    return int(((dense(proper(leaf), torch.float32) != 0) & ~support).sum())


def moves(lost: int) -> str:
    """The refusal of a step that moves zeros of a mask, in words that follow its name."""
    return (
        f"moves {lost} weights that a step before it set to 0; round to nearest there (rtn keeps "
        "zeros), or let one step choose zeros and codes together"
    )


# ------------------------------------------------------------------ what may be put
def refuse_misfit(leaf: Any, cell: Cell) -> None:
    """Refuse a leaf that the cell cannot hold, by the names of the weight and the step."""
    label, shape = f"{cell.name}: {cell.step}", cell.target.shape
    if not is_leaf(leaf):
        raise Misfit(
            f"{label} put a {type(leaf).__name__}, which is no leaf; put a tensor, a QTensor or "
            "another leaf that is a pytree"
        )
    if leaf.shape != shape:
        raise Misfit(f"{label} made a weight {tuple(leaf.shape)} of one {tuple(shape)}")
    _refuse_nonfinite(leaf, f"{label} made")
    _refuse_unplanned(leaf, cell.feasible.spec, label)
    codes = proper(leaf)
    fault = off_grid(codes) if isinstance(codes, QTensor) else None
    if fault:
        raise Misfit(f"{cell.name}.weight: {fault}; round to the grid of its spec")
    if cell.support is not None:
        lost = moved(leaf, cell.support)
        if lost:
            raise Misfit(f"{label} {moves(lost)}")


def _refuse_unplanned(leaf: Any, spec: Spec | None, step: str) -> None:
    codes = proper(leaf)
    actual = codes.spec if isinstance(codes, QTensor) else None
    as_planned = same_grid(actual, spec) if actual and spec else actual is spec
    if not as_planned:
        result = f"{step} made {actual or 'plain numbers'}"
        if spec:
            raise Misfit(
                f"{result} and is to round to {spec}, the grid of its cell; give codes on that "
                "grid, a QTensor, or plain numbers where neither the step's spec nor "
                "narrow(spec=...) asks for a grid"
            )
        raise Misfit(
            f"{result} and is to round nothing, which is what was planned; "
            "return a QTensor of the spec, or a tensor where each_weight has none"
        )


def _refuse_nonfinite(leaf: Any, step: str) -> None:
    if isinstance(leaf, Tensor):
        if not torch.isfinite(leaf).all():
            raise Misfit(f"{step} a weight that holds NaN or Inf")
        return
    codes = proper(leaf)
    if isinstance(codes, QTensor) and not torch.isfinite(codes.scales.float()).all():
        raise Misfit(
            f"{step} scales that {codes.scales.dtype} does not hold (NaN or Inf); choose another "
            "scale dtype"
        )
    # Codes that are finite are finite numbers with finite scales, so only others are made dense.
    if codes is not leaf or not isinstance(codes, QTensor):
        _refuse_nonfinite(dense(leaf, torch.float32), step)


def refuse_support(cell: Cell, support: Tensor) -> None:
    """Refuse a support that is none, or wider than the cell's."""
    shape = cell.target.shape
    if support.dtype != torch.bool or support.shape != shape:
        raise Misfit(
            f"{cell.name}: {cell.step} narrows to a support of {support.dtype} "
            f"{tuple(support.shape)}; give a bool tensor {tuple(shape)}"
        )
    if cell.support is None:
        return
    wider = int((support & ~cell.support).sum())
    if wider:
        raise Misfit(
            f"{cell.name}: {cell.step} widens the support by {wider} weights, which a step before "
            "it set to 0; a support only narrows, so choose among those that are left"
        )
