"""Scales that suit fixed codes best: least squares with one unknown per scale, solved exactly.

min_s tr((W* - W') M (W* - W')^T) for fixed codes is A s = b in every row of scales, with
A_gh = sum over the tile's rows of c_g M_gh c_h^T and b_g = sum of c_g (M w*)_g. The solution is
rounded to the stored dtype one scale after the other, each at its optimum given the others, which
matters where that dtype has 8 bits.

Legend: target_ok is W*; M_kk the metric; c codes - zeros; [a, g] scales, a tiles down and g tiles
across. Codes that a mask holds at zero have c = 0 and stay zero under any scale.
Source: for the codes frozen, the second stage of arXiv 2602.02126, here solved in closed form.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from qlab.algebra.grid import stored
from qlab.algebra.qtensor import QTensor, steps

RIDGE = 1e-6  # pull of a scale towards its old value, as a fraction of its own curvature
CHUNK = 1 << 24  # numbers of A at once
SWEEPS = 2


def refit(target_ok: Tensor, M_kk: Tensor, q: QTensor) -> QTensor:
    """q with the scales that suit its codes best, as they are stored."""
    groups = q.scales.shape[1]
    rows = max(1, CHUNK // groups**2)
    M_kk = padded(M_kk, q)
    parts = zip(centred(q).split(rows), tiles(target_ok, q).split(rows), q.scales.split(rows))
    scales = [_refit_rows(c, t, s, M_kk, q) for c, t, s in parts]
    # torch concatenates no e8m0
    bits = torch.cat([s.view(torch.uint8) if s.itemsize == 1 else s for s in scales])
    return replace(q, scales=bits.view(q.scales.dtype))


def _refit_rows(
    c_argn: Tensor, target_argn: Tensor, scales_ag: Tensor, M_kk: Tensor, q: QTensor
) -> Tensor:
    """The best scales of some rows of scales, as they are stored."""
    A_agh, b_ag = normal_equations(c_argn, target_argn, M_kk)
    old_ag = steps(scales_ag, q.outer, A_agh.dtype)
    solved_ag = least_squares(A_agh, b_ag, old_ag)
    return rounded_in_turn(A_agh, b_ag, solved_ag, scales_ag, q)


def tiles(x_ok: Tensor, q: QTensor) -> Tensor:
    """[o, k] -> [a, r, g, n]: r rows and n columns under each scale, with zeros beyond the edge."""
    rows = q.spec.tile.sizes(q.shape)[0]
    return rearrange(q.spec.tile.split(x_ok), "a g (r n) -> a r g n", r=rows)


def centred(q: QTensor) -> Tensor:
    """codes - zeros, [a, r, g, n] in fp32."""
    c_agn = q.spec.tile.split(q.codes.float())
    if q.zeros is not None:
        c_agn = c_agn - q.zeros.float()[..., None]
    return tiles(q.spec.tile.join(c_agn, q.shape), q)


def padded(M_kk: Tensor, q: QTensor) -> Tensor:
    """M with zeros up to the edge of the last tile."""
    beyond = q.scales.shape[1] * q.spec.tile.sizes(q.shape)[1] - len(M_kk)
    return F.pad(M_kk, (0, beyond, 0, beyond)) if beyond else M_kk


def normal_equations(c_argn: Tensor, target_argn: Tensor, M_kk: Tensor) -> tuple[Tensor, Tensor]:
    """A [a, g, h] and b [a, g], of which A s = b is the optimum."""
    a, r, groups, n = c_argn.shape
    c_argn = c_argn.to(M_kk.dtype)
    A_agh = M_kk.new_empty(a, groups, groups)
    M_gnk = rearrange(M_kk, "(g n) k -> g n k", g=groups)
    for g in range(groups):
        ahead = slice(g * n, None)  # A is symmetric
        cM_arhm = (c_argn[:, :, g] @ M_gnk[g, :, ahead]).view(a, r, groups - g, n)
        row_ah = torch.linalg.vecdot(cM_arhm, c_argn[:, :, g:]).sum(1)
        A_agh[:, g, g:] = row_ah
        A_agh[:, g:, g] = row_ah
    Mt_argn = (target_argn.flatten(2) @ M_kk).view_as(c_argn)
    return A_agh, torch.linalg.vecdot(Mt_argn, c_argn).sum(1)


def least_squares(A_agh: Tensor, b_ag: Tensor, old_ag: Tensor) -> Tensor:
    """s with A s = b, pulled a little towards the old scales, so that tiles of zeros keep theirs.
    Rows without a finite solution keep all of them."""
    curvature_ag = A_agh.diagonal(dim1=1, dim2=2)
    ridge_ag = (RIDGE * curvature_ag).clamp_min(torch.finfo(A_agh.dtype).tiny)
    ridge_ag = torch.where(curvature_ag > 0, ridge_ag, 1)
    regular = (A_agh + torch.diag_embed(ridge_ag)).double()
    L_agh, failed_a = torch.linalg.cholesky_ex(regular)
    right = (b_ag + ridge_ag * old_ag).double()[..., None]
    solved_ag = torch.cholesky_solve(right, L_agh)[..., 0].to(A_agh.dtype)
    usable_a = (failed_a == 0) & solved_ag.isfinite().all(1)
    return torch.where(usable_a[:, None], solved_ag, old_ag)


def rounded_in_turn(
    A_agh: Tensor, b_ag: Tensor, solved_ag: Tensor, scales_ag: Tensor, q: QTensor
) -> Tensor:
    """The scales as they are stored, each rounded at its optimum given all others."""
    s_ag, result = solved_ag.clone(), scales_ag.clone()
    for _ in range(SWEEPS):
        for g in range(s_ag.shape[1]):
            curvature_a = A_agh[:, g, g]
            rest_a = torch.linalg.vecdot(A_agh[:, g], s_ag) - curvature_a * s_ag[:, g]
            best_a1 = ((b_ag[:, g] - rest_a) / curvature_a)[:, None]
            usable_a1 = best_a1.isfinite() & (best_a1 != 0)
            best_a1 = torch.where(usable_a1, best_a1, s_ag[:, g : g + 1])
            as_stored = stored(best_a1, q.spec, q.outer)
            result[:, g : g + 1] = as_stored
            s_ag[:, g : g + 1] = steps(as_stored, q.outer, s_ag.dtype)
    return result
