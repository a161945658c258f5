"""NeUQI: scale and integer zero point of a tile searched together (Lin et al. 2025).

min over s and z of sum_j h_j (x_j - s (c_j - z))^2, c = round(x / s + z) clamped to the codes. With
an integer z the rounding r = round(x / s) does not depend on z, which only moves the window
[qmin - z, qmax - z] that r is clamped to. So three sums over the numbers of each r, of h, h u and
h u^2 with u = x / s, give the objective of every z at once, and the best z of a scale is exact.
Scales are searched coarse to fine. The paper's zero points lie between codes; these can be stored
by every format. Where a spec has no zero points, scales of both signs are searched.

Legend: x_agn, h_agn numbers and weights of tiles [a, g] of n numbers; s_ag, z_ag; e_ag the
objective; b buckets, one per r; w windows, one per z.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.algebra.grid import Grid, minmax, objective, stored
from qlab.algebra.qtensor import steps
from qlab.algebra.spec import Int, Spec

# Fractions of the plain range, and then of the best scale so far.
COARSE = (1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
FINE = (0.96, 0.98, 1.02, 1.04)
Fit = tuple[Tensor, Tensor, Tensor | None]  # e_ag, s_ag, z_ag


@dataclass(frozen=True)
class Problem:
    """The tiles whose scales are searched; outer as in `qlab.algebra.grid.fit`."""

    x_agn: Tensor
    h_agn: Tensor
    spec: Spec
    outer: Tensor | None

    def fit(self, s_ag: Tensor) -> Fit:
        """The objective of these scales as they are stored, each with its best zero point."""
        s_ag = stored(s_ag, self.spec, self.outer)
        wide_ag = steps(s_ag, self.outer, torch.float32)
        z_ag = None
        if isinstance(self.spec, Int) and not self.spec.symmetric:
            z_ag = best_zeros(self.x_agn / wide_ag[..., None], self.h_agn, self.spec)
        return objective(self.x_agn, wide_ag, z_ag, self.spec, self.h_agn), s_ag, z_ag


def best_zeros(u_agn: Tensor, h_agn: Tensor, spec: Int) -> Tensor:
    """The integer zero point of every tile with the least sum_j h_j (u_j - (c_j - z))^2."""
    reach = spec.qmax - spec.qmin
    r_agn = u_agn.round().clamp_(-reach - 1, reach + 1)
    at_agn = (r_agn + (reach + 1)).long()
    sums = u_agn.new_zeros(3, *u_agn.shape[:-1], 2 * reach + 3)
    moments = (h_agn, h_agn * u_agn, h_agn * u_agn.square())
    for total_agb, moment_agn in zip(sums, moments):
        total_agb.scatter_add_(-1, at_agn, moment_agn)
    r_b = torch.arange(-reach - 1, reach + 2, device=u_agn.device, dtype=u_agn.dtype)
    inside_agb = _cost(sums, r_b).cumsum(-1)
    tops_w = torch.arange(reach + 1, device=u_agn.device)  # qmax - z
    t, low = tops_w.to(u_agn.dtype), tops_w.to(u_agn.dtype) - reach
    top_at, low_at = tops_w + reach + 1, tops_w + 1
    until = sums.cumsum(-1)
    above = until[..., -1:] - until[..., top_at]
    below = until[..., low_at - 1]
    inside_agw = inside_agb[..., top_at] - inside_agb[..., low_at - 1]
    cost_agw = inside_agw + _cost(above, t) + _cost(below, low)
    return (spec.qmax - cost_agw.argmin(-1)).to(spec.zero_dtype)


def _cost(sums: Tensor, value: Tensor) -> Tensor:
    """sum h (u - value)^2 from the sums of h, h u and h u^2."""
    return sums[2] - 2 * value * sums[1] + value.square() * sums[0]


def better(a: Fit, b: Fit) -> Fit:
    """In every tile the fit with the lesser objective; a where both are equal."""
    (e, s, z), (e_b, s_b, z_b) = a, b
    where = e_b < e
    if s.itemsize == 1:  # torch.where takes no 8-bit floats
        bits = torch.where(where, s_b.view(torch.uint8), s.view(torch.uint8))
        s_ag = bits.view(s.dtype)
    else:
        s_ag = torch.where(where, s_b, s)
    z_ag = None if z is None or z_b is None else torch.where(where, z_b, z)
    return torch.where(where, e_b, e), s_ag, z_ag


def search(
    x_agn: Tensor, h_agn: Tensor | None, spec: Spec, outer: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scales as they are stored, and zeros: the best of a coarse search, then of a fine one around
    it, then of the scale that suits the codes best."""
    h_agn = torch.ones_like(x_agn) if h_agn is None else h_agn.expand_as(x_agn)
    problem = Problem(x_agn, h_agn, spec, outer)
    widest_ag = plain_range(x_agn, spec)
    signs = (1.0, -1.0) if isinstance(spec, Int) and spec.symmetric else (1.0,)
    best = problem.fit(widest_ag)
    for sign in signs:
        for ratio in COARSE:
            best = better(best, problem.fit(widest_ag * (sign * ratio)))
    for _ in range(2):
        middle_ag = steps(best[1], outer, torch.float32)
        for ratio in FINE:
            best = better(best, problem.fit(middle_ag * ratio))
        best = better(best, problem.fit(refitted(problem, best)))
    return best[1], best[2]


def plain_range(x_agn: Tensor, spec: Spec) -> Tensor:
    """The scale whose codes reach over all numbers of a tile."""
    low, high = x_agn.amin(-1).clamp_max(0), x_agn.amax(-1).clamp_min(0)
    if isinstance(spec, Int) and not spec.symmetric:
        return (high - low) / (spec.qmax - spec.qmin)
    largest = -spec.qmin if isinstance(spec, Int) else spec.max
    return torch.maximum(-low, high) / largest


def refitted(problem: Problem, fit: Fit) -> Tensor:
    """s = sum h x c / sum h c^2, for the codes c - z of a fit."""
    _, s_ag, z_ag = fit
    s_ag = steps(s_ag, problem.outer, torch.float32)
    c_agn = problem.x_agn / s_ag[..., None]
    if z_ag is None:
        problem.spec.nearest_(c_agn)
    else:
        z = z_ag.float()[..., None]
        problem.spec.nearest_(c_agn.add_(z)).sub_(z)
    hc_agn = problem.h_agn * c_agn
    s = torch.linalg.vecdot(hc_agn, problem.x_agn) / torch.linalg.vecdot(hc_agn, c_agn)
    return torch.where(s.isfinite(), s, s_ag)


neuqi = Grid("neuqi", minmax.candidates, weighted=True, search=search)
