"""Which weights a mask keeps: N of every M neighbours, or all but a share.

Legend: W_ok a weight of o output and k input channels, s_ok how much each weight matters.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlab.algebra.cell import Cell
from qlab.algebra.tile import is_size
from qlab.algebra.transform import Transform
from qlab.algebra.views import EachWeight
from qlab.errors import QlabError


@dataclass(frozen=True)
class Pattern:
    """keep of every `of` neighbours in a row, or, where `of` is None, all but the share `zeros`."""

    keep: int = 0
    of: int | None = None
    zeros: float = 0.0

    def __str__(self) -> str:
        return f"{self.zeros:g}" if self.of is None else f"{self.keep}:{self.of}"

    def check(self, k: int) -> None:
        """Refuse a row of k weights that is no whole number of groups."""
        if self.of is not None and k % self.of:
            raise QlabError(
                f"the {k} input channels are no multiple of {self.of}, so {self} has no groups "
                "there; keep() this weight, or choose another pattern"
            )

    def kept(self, s_ok: Tensor) -> Tensor:
        """bool [o, k]: the weights that matter most, among every group or in every row. Of equals
        the first are kept."""
        self.check(s_ok.shape[-1])
        groups = s_ok if self.of is None else s_ok.unflatten(-1, (-1, self.of))
        size = groups.shape[-1]
        keep = size - round(self.zeros * size) if self.of is None else self.keep
        order = groups.argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(groups, dtype=torch.bool)
        kept.scatter_(-1, order[..., :keep], True)
        return kept.view(s_ok.shape)

    def kept_overall(self, s_ok: Tensor) -> Tensor:
        """The same with a share of all weights in the place of one of every row."""
        if self.of is not None:
            return self.kept(s_ok)
        return self.kept(s_ok.reshape(1, -1)).view(s_ok.shape)


def narrowed(cell: Cell, kept_ok: Tensor) -> Cell:
    """The cell with zeros where its weights are not kept, beside those that it has."""
    return cell.narrow(support=kept_ok if cell.support is None else kept_ok & cell.support)


def checked(stages: Transform, pattern: Pattern) -> Transform:
    """The stages of a mask, which plans ask whether the pattern has groups in a weight."""
    return tuple(
        replace(stage, view=replace(stage.view, check=pattern.check))
        if isinstance(stage.view, EachWeight)
        else stage
        for stage in stages
    )


def parse_pattern(pattern: str | float | Pattern) -> Pattern:
    """A pattern from "2:4" (2 of every 4 neighbours are kept) or a share of zeros such as 0.5."""
    if isinstance(pattern, Pattern):
        return pattern
    parts = pattern.split(":") if isinstance(pattern, str) else []
    if len(parts) == 2 and all(part.strip().isdecimal() for part in parts):
        keep, of = (int(part) for part in parts)
        if 0 < keep < of:
            return Pattern(keep=keep, of=of)
    share = _share(pattern)
    if len(parts) == 2 or share is None or not 0 < share < 1:
        raise QlabError(
            f"the pattern {pattern!r:.40} keeps no part of the weights; give N:M such as '2:4', "
            "which keeps 2 of every 4 neighbours, or a share of zeros such as 0.5"
        )
    return Pattern(zeros=share)


def _share(pattern: object) -> float | None:
    """The number that a pattern is, or None."""
    if not isinstance(pattern, str | float) and not is_size(pattern):
        return None
    try:
        share = float(pattern)  # type: ignore[arg-type]
    except (ValueError, OverflowError):
        return None
    return share if math.isfinite(share) else None
