"""The one objective of every solver of a weight: J = tr((W* - W') M (W* - W')^T).

A stage that rounds or refines makes a candidate. `accept` takes it row by row where J falls, with
scales as they are stored, so that no stage raises J. J before and after each stage is the
certificate of a weight, which its report holds.

Legend: target_ok is W*, what a weight aims at; M_kk the metric, the mean second moment of the input
or another positive semidefinite matrix; J_o the objective of every row; a the rows of scales.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.stats import quadratic


@dataclass(frozen=True)
class Quadratic:
    """J of a weight with the target W* [o, k] and the metric M [k, k], both fp32 or fp64."""

    target_ok: Tensor
    M_kk: Tensor

    def rows(self, leaf: QTensor | Tensor) -> Tensor:
        """J of every row [o]: (w* - w') M (w* - w')^T."""
        return quadratic(self.target_ok - dense(leaf, self.target_ok.dtype), self.M_kk)


@dataclass(frozen=True)
class Candidate:
    """A leaf, J of each of its rows [o], and J of the whole weight after every stage so far."""

    leaf: QTensor
    J_o: Tensor
    certificate: Mapping[str, float]


def start(problem: Quadratic, leaf: QTensor, stage: str) -> Candidate:
    """What the first stage made."""
    J_o = problem.rows(leaf)
    return Candidate(leaf, J_o, {stage: float(J_o.sum())})


def accept(problem: Quadratic, before: Candidate, leaf: QTensor, stage: str) -> Candidate:
    """The leaf's codes, scales and zeros in those rows where J is less than before. Rows that share
    scales are taken together."""
    J_o = problem.rows(leaf)
    rows, count_a = leaf.spec.tile.sizes(leaf.shape)[0], len(leaf.scales)
    gain_o = F.pad(before.J_o - J_o, (0, count_a * rows - len(J_o)))
    better_a = gain_o.view(count_a, rows).sum(1) > 0
    better_o = better_a.repeat_interleave(rows)[: len(J_o)]
    old = before.leaf
    zeros = None
    if leaf.zeros is not None and old.zeros is not None:
        zeros = rows_where(better_a, leaf.zeros, old.zeros)
    accepted = replace(
        old,
        codes=rows_where(better_o, leaf.codes, old.codes),
        scales=rows_where(better_a, leaf.scales, old.scales),
        zeros=zeros,
    )
    J_o = torch.where(better_o, J_o, before.J_o)
    return Candidate(accepted, J_o, {**before.certificate, stage: float(J_o.sum())})


def joined(parts: Sequence[Candidate]) -> Candidate:
    """Neighbouring groups of rows, each solved by itself, as one weight: its J is their sum."""
    first, leaves = parts[0], [part.leaf for part in parts]
    zeros = [leaf.zeros for leaf in leaves if leaf.zeros is not None]
    leaf = replace(
        first.leaf,
        codes=_stacked([leaf.codes for leaf in leaves]),
        scales=_stacked([leaf.scales for leaf in leaves]),
        zeros=_stacked(zeros) if zeros else None,
    )
    stages = {stage: sum(p.certificate[stage] for p in parts) for stage in first.certificate}
    return Candidate(leaf, torch.cat([part.J_o for part in parts]), stages)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    # torch.cat takes no 8-bit floats
    bits = [t.view(torch.uint8) if t.itemsize == 1 else t for t in parts]
    return torch.cat(bits).view(parts[0].dtype)


def rows_where(first_a: Tensor, x_an: Tensor, y_an: Tensor) -> Tensor:
    """Rows of x where `first`, else of y."""
    # torch.where takes no 8-bit floats
    x, y = (t.view(torch.uint8) if t.itemsize == 1 else t for t in (x_an, y_an))
    return torch.where(first_a[:, None], x, y).view(x_an.dtype)
