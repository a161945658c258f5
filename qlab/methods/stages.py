"""A weight solved in stages that can be exchanged: grid, round, refine, all over one objective.

J = tr((W* - W') M (W* - W')^T) with M = H + damp mean(diag H) I. A grid gives scales and zero
points, a rounding codes on them, a refinement a leaf from a leaf. Rounding to nearest is the first
leaf; each that follows is taken row by row where J falls (`qlab.methods.quadratic`), so that no
stage raises J. The report holds J after every stage.

    weight = nearest on the grid >= round(...) >= refine(...) >= refine(...) ...

Any function of these forms can take the place of one below.
Legend: problem.target_ok is W*, problem.M_kk the damped metric; s_ag, z_ag scales and zeros; D_k
the diagonal of D in M = R D R^T (`qlab.methods.obs`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.cell import Cell, Weight, on_support
from qlab.algebra.operations import Operations
from qlab.algebra.qtensor import QTensor, dense, round_codes, steps
from qlab.algebra.spec import Spec
from qlab.algebra.stats import Need
from qlab.algebra.transform import Transform, each_cell
from qlab.errors import QlabError
from qlab.methods.gptq import WORKSPACE, act_order, codes_on
from qlab.methods.grid import Grid, fit, scale_sweep, weighted
from qlab.methods.obs import Factor, check_damp, damped, factorize
from qlab.methods.quadratic import Candidate, Quadratic, accept, joined, start
from qlab.methods.quantease import descend_codes
from qlab.methods.refit import refit

BLOCK = 32  # columns that are solved before their errors reach those behind


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One weight to be solved.

    target_ok: W* in fp32. H_kk: the mean second moment of the input. damp: the fraction of its mean
    diagonal that is added, at least. spec: the grid of numbers. outer: the global scale of an nvfp4
    spec. support: bool [o, k], False where a mask holds the weight at 0. masked_ok: the weight
    under that mask as the steps before left it, of which the grid is made.
    """

    target_ok: Tensor
    H_kk: Tensor
    damp: float
    spec: Spec
    outer: Tensor | None = None
    support: Tensor | None = None
    masked_ok: Tensor | None = None

    @property
    def now_ok(self) -> Tensor:
        """The weight as it is: W*, or what a mask left of it."""
        return self.target_ok if self.masked_ok is None else self.masked_ok

    @cached_property
    def order(self) -> Tensor:
        """The order [k] in which columns are solved: the largest second moment first."""
        return act_order(self.H_kk)

    @cached_property
    def factor(self) -> Factor:
        """R and D of the damped metric, in solving order."""
        return factorize(self.H_kk[self.order][:, self.order], self.damp)

    @cached_property
    def M_kk(self) -> Tensor:
        """The metric with the damping that its factorization took."""
        return damped(self.H_kk, self.factor.damp)

    @property
    def quadratic(self) -> Quadratic:
        return Quadratic(self.target_ok, self.M_kk)

    def leaf(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> QTensor:
        """These codes, with 0 off the support."""
        q = QTensor(codes, scales, zeros, self.spec, self.outer)
        return q if self.support is None else on_support(q, self.support)


@dataclass(frozen=True)
class Metric:
    """What a solver measures errors by. needs: statistics of the input. of: the statistics by name
    -> H [k, k], or [g, k, k] with one for each of g groups of rows (`row_groups`)."""

    name: str
    needs: frozenset[Need]
    of: Callable[[Mapping[str, Any]], Tensor]


Scales = tuple[Tensor, Tensor | None]
GridStage = Callable[[Problem], Scales]
RoundStage = Callable[[Problem, Tensor, Tensor | None], QTensor]
RefineStage = Callable[[Problem, QTensor], QTensor]


# ------------------------------------------------------------------ metric
def _with_received(stats: Mapping[str, Any]) -> Tensor:
    H_kk, received = stats["second_moment"].mean_kk, stats["received"]
    return H_kk + received.mean_kk if received.tokens else H_kk


every_token = Metric(
    "every_token", frozenset({"second_moment"}), lambda s: s["second_moment"].mean_kk
)
# A token counts once, and again by the attention that it receives (`qlab.algebra.received`), where
# it becomes keys and values.
attended = Metric("attended", frozenset({"second_moment", "received"}), _with_received)


# ------------------------------------------------------------------ grid
def compensated(problem: Problem, grid: Grid | None = None) -> Scales:
    """The grid whose errors cost least once later columns have made up for them.

    Under OBS an error e in column j costs D_j e^2, not M_jj e^2: the rest is made up for. So D is
    what the search of scales weighs errors with. grid: None takes every scale that may be best for
    formats with scales of 8 bits, and the weighted grid for others.
    """
    D_k = torch.empty_like(problem.factor.D_k)
    D_k[problem.order] = problem.factor.D_k
    if grid is None:
        has_narrow_scales = problem.spec.scale_dtype and problem.spec.scale_dtype.itemsize == 1
        grid = scale_sweep if has_narrow_scales else weighted
    return fit(grid, problem.now_ok, problem.spec, D_k, problem.outer)


def diagonal(problem: Problem, grid: Grid = weighted) -> Scales:
    """A grid of GRIDS whose errors are weighed by the diagonal of the second moment, as in gptq."""
    return fit(grid, problem.now_ok, problem.spec, problem.H_kk.diagonal(), problem.outer)


# ------------------------------------------------------------------ round
def nearest(problem: Problem, scales: Tensor, zeros: Tensor | None) -> QTensor:
    """RTN."""
    codes = round_codes(problem.now_ok, scales, zeros, problem.spec, problem.outer)
    return problem.leaf(codes, scales, zeros)


def obs(problem: Problem, scales: Tensor, zeros: Tensor | None) -> QTensor:
    """GPTQ: column after column, each error made up for by those behind."""
    s_ag = steps(scales, problem.outer, problem.target_ok.dtype)
    grid = s_ag, zeros, problem.spec
    codes = codes_on(grid, problem.target_ok, problem.factor, problem.order, BLOCK, problem.support)
    return problem.leaf(codes, scales, zeros)


# ------------------------------------------------------------------ refine
def scales_refitted(problem: Problem, q: QTensor) -> QTensor:
    """The exact least-squares scales of the codes of q (`qlab.methods.refit`)."""
    return refit(problem.target_ok, problem.M_kk, q)


def codes_descended(problem: Problem, q: QTensor) -> QTensor:
    """One sweep of coordinate descent over the codes of q (`qlab.methods.quantease`)."""
    return descend_codes(problem.target_ok, problem.M_kk, q, problem.order, BLOCK, problem.support)


ALTERNATED: Sequence[RefineStage] = (scales_refitted, codes_descended) * 2


# ------------------------------------------------------------------ all of them
def solve(
    problem: Problem, grid: GridStage, round_: RoundStage, refine: Sequence[RefineStage]
) -> Candidate:
    """The leaf that the stages make, and its certificate: J after every stage."""
    scales, zeros = grid(problem)
    quadratic = problem.quadratic
    now = start(quadratic, nearest(problem, scales, zeros), "nearest")
    if round_ is not nearest:
        now = accept(quadratic, now, round_(problem, scales, zeros), round_.__name__)
    for i, stage in enumerate(refine, 1):
        now = accept(quadratic, now, stage(problem, now.leaf), f"{stage.__name__}_{i}")
    return now


def row_groups(shape: torch.Size, spec: Spec, groups: int) -> list[slice]:
    """The rows of a weight [o, k] in so many groups of neighbours, as even as can be. Rows that
    share scales stay together, so that there may be fewer groups."""
    rows, _ = spec.tile.sizes(shape)
    count = -(-shape[0] // rows)
    parts = min(groups, count)
    ends = [count * i // parts * rows for i in range(parts + 1)]
    return [slice(ends[i], min(ends[i + 1], shape[0])) for i in range(parts)]


def in_groups(problem: Problem, H_gkk: Tensor) -> Iterator[Problem]:
    """The problems of groups of rows, each of which has a second moment of its own: the mean of
    several, where rows that share scales make one group of them."""
    rows_of = lambda t, rows: None if t is None else t[rows]
    groups = row_groups(problem.target_ok.shape, problem.spec, len(H_gkk))
    for rows, moments in zip(groups, H_gkk.tensor_split(len(groups))):
        yield replace(
            problem,
            target_ok=problem.target_ok[rows],
            H_kk=moments.mean(0),
            support=rows_of(problem.support, rows),
            masked_ok=rows_of(problem.masked_ok, rows),
        )


def solver(
    spec: Spec,
    grid: GridStage = compensated,
    round: RoundStage = obs,
    refine: Sequence[RefineStage] = ALTERNATED,
    damp: float = 0.01,
    metric: Metric = every_token,
) -> Transform:
    """A weight-only solver of three stages over J = tr((W* - W') M (W* - W')^T).

    Scales come from `grid`, codes from `round`, and every function of `refine` improves both, as
    far as J falls. RTN, GPTQ and what lies beyond them are choices of these functions, which
    `qlab.methods.stages` holds.

    Args:
        spec: the number grid to round to, or its name such as "int4-g64".
        grid: problem -> (scales, zeros).
        round: (problem, scales, zeros) -> leaf.
        refine: functions (problem, leaf) -> leaf, in the order in which they run.
        damp: fraction of mean(diag H) that is added to the diagonal of H, from 0 to 1.
        metric: statistics -> H, what errors are measured by.

    Returns:
        A transform of one stage. It needs calibration data. Its report holds J after every stage as
        `J_nearest`, `J_obs` and so on: none is above the one before.

    Raises:
        QlabError: damp is not from 0 to 1, or metric is no Metric.

    Source:
        The stages name theirs. The grid's weights D are the cost of an error under the
        factorization of Chee et al. 2023 (QuIP).

    Example:
        >>> import qlab
        >>> from qlab.methods import stages
        >>> (stage,) = qlab.solver("int3-g64", refine=[stages.scales_refitted])
        >>> stage.detail
        'grid compensated, round obs, refine scales_refitted, damp 0.01'
    """
    check_damp(damp)
    if not isinstance(metric, Metric):
        raise QlabError(
            f"metric is {metric!r}; give a Metric, such as qlab.methods.stages.attended"
        )

    def fn(weight: Weight) -> Cell:
        cell = weight.cell
        assert cell.feasible.spec is not None  # the stage has a spec
        H = metric.of(weight.stats)
        problem = Problem(
            target_ok=cell.target,
            H_kk=H,
            damp=damp,
            spec=cell.feasible.spec,
            outer=weight.stats["outer"],
            support=cell.support,
            masked_ok=None if cell.support is None else dense(cell.leaf, torch.float32),
        )
        solved_parts, damps = list[Candidate](), list[float]()
        for each in [problem] if H.ndim == 2 else in_groups(problem, H):
            solved_parts.append(solve(each, grid, round, refine))
            damps.append(each.factor.damp)
        solved = joined(solved_parts)
        certificate = {f"J_{stage}": J for stage, J in solved.certificate.items()}
        return cell.put(solved.leaf, damp=max(damps), **certificate)

    names = ", ".join(stage.__name__ for stage in refine) or "nothing"
    detail = f"grid {grid.__name__}, round {round.__name__}, refine {names}, damp {damp:g}"
    detail += "" if metric is every_token else f", metric {metric.name}"
    stages = each_cell("solver", fn, metric.needs, spec, detail)
    counted = Operations(square=1 / 2, rows=8 + 4.7 * len(refine))
    return tuple(replace(stage, workspace=WORKSPACE, operations=counted) for stage in stages)
