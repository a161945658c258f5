"""HQQ: zero points that make the rounding error sparse, found without data (Badri and Shaji 2023).

min sum |W - s (Q - z)|^p with p < 1 and Q = round(W / s + z), split into two problems that are
solved in turn:
E <- shrink(W - s (Q - z)), the part of the error that is given up, and z <- mean(Q - (W - E) / s).
Where zero points are codes or there are none, they cannot move by less than a step, and the scale
moves instead:
s <- <W - E, Q - z> / <Q - z, Q - z>.

Legend: x_agn the weight's tiles [a, g] of n numbers, u_agn the same in units of the scale; q_agn
codes - zeros; s_ag, z_ag scales and zeros; e_ag the objective.
"""

import torch
from torch import Tensor

from qlab.algebra.cell import Cell, Weight
from qlab.algebra.operations import Operations
from qlab.algebra.qtensor import QTensor, dense, round_codes, steps
from qlab.algebra.spec import Spec
from qlab.algebra.transform import Transform, costing, each_cell
from qlab.methods.grid import CHUNK, fit, minmax, stored

P, BETA, KAPPA, STEPS = 0.7, 10.0, 1.01, 20  # the paper's


def sparse_error(x_agn: Tensor, s_ag: Tensor, z_ag: Tensor | None, spec: Spec) -> Tensor:
    """sum_j |x_j - s (codes_j - z)|^p of every tile [a, g]. s: what `qtensor.steps` gives."""
    s = s_ag[..., None]
    error_agn = x_agn - _rounded(x_agn / s, z_ag, spec) * s
    return error_agn.abs().pow(P).sum(-1)


def _rounded(u_agn: Tensor, z_ag: Tensor | None, spec: Spec) -> Tensor:
    """codes - zeros."""
    if z_ag is None:
        return spec.nearest_(u_agn.clone())
    z = z_ag.float()[..., None]
    return spec.nearest_(u_agn + z) - z


def half_quadratic(
    x_agn: Tensor,
    s_ag: Tensor,
    z_ag: Tensor | None,
    spec: Spec,
    outer: Tensor | None,
    whole: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros, as they will be stored. Of every tile those with the least sparse_error
    among what it starts from and STEPS steps. whole: zero points stay codes, so that 0 is one of
    the numbers of the grid."""
    wide = lambda s: steps(s, outer, torch.float32)
    best_s, best_z, best_e = s_ag, z_ag, sparse_error(x_agn, wide(s_ag), z_ag, spec)
    moves_zeros = z_ag is not None and z_ag.is_floating_point()
    for step in range(STEPS):
        beta = BETA * KAPPA**step
        s_wide = wide(s_ag)
        u_agn = x_agn / s_wide[..., None]
        q_agn = _rounded(u_agn, z_ag, spec)
        d_agn = (u_agn - q_agn) * s_wide[..., None]  # the paper shrinks errors of the weight itself
        E_agn = d_agn.sign() * (d_agn.abs() - d_agn.abs().pow(P - 1) / beta).relu()
        if z_ag is None or not moves_zeros:
            s_exact = torch.linalg.vecdot(x_agn - E_agn, q_agn) / torch.linalg.vecdot(q_agn, q_agn)
            s_ag = stored(s_exact, spec, outer)
        else:
            z = z_ag.float()[..., None]
            z_ag = (q_agn + z - u_agn + E_agn / s_wide[..., None]).mean(-1).to(z_ag.dtype)
            z_ag = z_ag.round() if whole else z_ag
        e_ag = sparse_error(x_agn, wide(s_ag), z_ag, spec)
        better = e_ag < best_e
        best_e = torch.where(better, e_ag, best_e)
        best_s = torch.where(better, s_ag, best_s)
        best_z = None if z_ag is None or best_z is None else torch.where(better, z_ag, best_z)
    return best_s, best_z


def hqq(spec: Spec) -> Transform:
    """HQQ: RTN's scales and zero points, moved to make sum |W - W'|^0.7 small. It needs no data.

    The paper's zero points lie between codes, which takes a spec with zero points of a
    floating-point dtype. With any other spec the scales move. By that sum no tile is worse than
    RTN's.
    """

    def fn(weight: Weight) -> Cell:
        cell, outer = weight.cell, weight.stats["outer"]
        W_ok, settled = dense(cell.leaf, torch.float32), cell.feasible.spec
        assert settled is not None  # the stage has a spec
        scales, zeros = fit(minmax, W_ok, settled, outer=outer)
        x_agn, masked = settled.tile.split(W_ok), cell.support is not None
        rows = max(1, CHUNK // x_agn[0].numel())
        z_chunks = [None] * len(scales) if zeros is None else zeros.split(rows)
        chunks = zip(x_agn.split(rows), scales.split(rows), z_chunks)
        solved = [half_quadratic(x, s, z, settled, outer, masked) for x, s, z in chunks]
        scales = torch.cat([s for s, _ in solved])
        zeros = None if zeros is None else torch.cat([z for _, z in solved if z is not None])
        codes = round_codes(W_ok, scales, zeros, settled, outer)
        return cell.put(QTensor(codes, scales, zeros, settled, outer), norm=P)

    stages = each_cell("hqq", fn, spec=spec, detail=f"norm {P}, {STEPS} steps")
    return costing(stages, Operations())  # elements alone
