"""Coordinate descent on codes and scales: each code, then each scale, is set to its optimum given all the others.

Neither step ever raises tr((W - W') H (W - W')^T), up to the rounding of scales to their stored dtype.
Source: Behdad et al. 2023 (QuantEase), for the codes; the scales are a least-squares problem of one unknown per group.

Legend: W_ok weight, H_kk damped mean second moment, c_ok codes - zeros, s_ag scales, D_ok = W - W'.
"""

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from qlab.qtensor import QTensor, dense, steps

RIDGE = 1e-3  # pull of a scale towards its old value, as a fraction of its own curvature


def descend_codes(W_ok: Tensor, H_kk: Tensor, q: QTensor, order: Tensor, block: int = 32) -> QTensor:
    """One sweep: w'_j <- project(w'_j + (D H)_j / H_jj) for every column j in `order`, on the grid of q.

    The gradient D H is brought up to date once per block of columns and inside it column by column.
    """
    spec, (rows, cols) = q.spec, q.spec.tile.sizes(q.shape)
    codes_ko, D_ko = q.codes.T.to(W_ok.dtype).contiguous(), (W_ok - dense(q, W_ok.dtype)).T.contiguous()
    s_ga, o = steps(q.scales, q.outer, W_ok.dtype).T, len(W_ok)
    for columns in order.split(block):
        H_bb = H_kk[columns][:, columns]
        G_bo = H_kk[columns] @ D_ko  # H is symmetric: row j of H D^T is column j of D H
        s_bo, old_bo = s_ga[columns // cols].repeat_interleave(rows, 1)[:, :o], codes_ko[columns]
        new_bo, Hs_bo = torch.empty_like(old_bo), H_bb.diagonal()[:, None] * s_bo
        for i, (g, s, hs, old, new) in enumerate(zip(*(t.unbind() for t in (G_bo, s_bo, Hs_bo, old_bo, new_bo)))):
            # W' + G / H_jj in units of codes: the present code, plus the step that the gradient asks for
            spec.nearest_(torch.addcdiv(old, g, hs, out=new))
            G_bo[i + 1 :].addr_(H_bb[i + 1 :, i], (new - old).mul_(s), alpha=-1)
        codes_ko[columns] = new_bo
        D_ko[columns] -= (new_bo - old_bo) * s_bo
    return replace(q, codes=codes_ko.T.contiguous().to(spec.code_dtype))


def refit_scales(W_ok: Tensor, H_kk: Tensor, q: QTensor) -> QTensor:
    """The scales that minimise tr(D H D^T) for fixed codes: per row, A s = b with A_gh = c_g^T H_gh c_h, b_g = c_g^T (H w)_g.

    For tiles of one row (channel, group). RIDGE keeps groups with hardly any curvature at their old scale.
    """
    o, groups = q.scales.shape
    c_ogn = q.spec.tile.split(q.codes).to(W_ok.dtype)
    if q.zeros is not None:
        c_ogn = c_ogn - q.zeros.to(W_ok.dtype)[..., None]
    H_gnhm = rearrange(H_kk, "(g n) (h m) -> g n h m", g=groups, h=groups)
    A_ogh = W_ok.new_empty(o, groups, groups)
    for g in range(groups):  # A is symmetric
        cH_ohm = rearrange(c_ogn[:, g] @ H_gnhm[g, :, g:].flatten(1), "o (h m) -> o h m", h=groups - g)
        A_ogh[:, g, g:] = A_ogh[:, g:, g] = torch.linalg.vecdot(cH_ohm, c_ogn[:, g:])
    b_og = torch.linalg.vecdot(rearrange(W_ok @ H_kk, "o (g n) -> o g n", g=groups), c_ogn)
    ridge = RIDGE * A_ogh.diagonal(dim1=1, dim2=2)
    ridge = torch.where(ridge > 0, ridge, 1)
    solved = torch.linalg.solve(A_ogh + torch.diag_embed(ridge), b_og + ridge * q.scales.to(W_ok.dtype)).to(q.scales.dtype)
    usable = solved.isfinite() & (solved != 0)
    return QTensor(q.codes, torch.where(usable, solved, q.scales), q.zeros, q.spec)
