"""Coordinate descent on codes and scales: each code, then each scale, takes its optimum given all
the others.

Neither step raises tr((W - W') H (W - W')^T), up to the rounding of scales to their stored dtype.
Source: Behdad et al. 2023 (QuantEase), for the codes; the scales of a row are a least-squares
problem with one unknown per group.

Legend: W_ok weight, H_kk damped mean second moment, c_ok codes - zeros, s_ag scales, D_ok = W - W'.
"""

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from qlab.algebra.qtensor import QTensor, dense, steps
from qlab.methods.obs import Substitution, parts, spans

RIDGE = 1e-3  # pull of a scale towards its old value, as a fraction of its own curvature


def descend_codes(
    W_ok: Tensor,
    H_kk: Tensor,
    q: QTensor,
    order: Tensor,
    block: int = 32,
    support: Tensor | None = None,
) -> QTensor:
    """One sweep: w'_j <- project(w'_j + (D H)_j / H_jj) for every column j in `order`, on the grid
    of q.

    The gradient D H follows the codes: column by column inside a block of columns, once per block
    inside a span of them, and once per span beyond it. support: bool [o, k], False where the codes
    of q stay as they are.
    """
    in_order_kk = H_kk.index_select(0, order).index_select(1, order)
    return descend_in_order(W_ok, in_order_kk, q, order, block, support)


def descend_in_order(
    W_ok: Tensor,
    H_kk: Tensor,
    q: QTensor,
    order: Tensor,
    block: int = 32,
    support: Tensor | None = None,
) -> QTensor:
    """The same with an H whose rows and columns are in that order already."""
    codes_ok = torch.empty_like(q.codes)
    for rows, tiles in parts(q.shape, q.spec.tile):
        fixed = None if support is None else ~support[rows]
        codes_ok[rows] = _descended(W_ok[rows], H_kk, q.rows(rows, tiles), order, block, fixed)
    return replace(q, codes=codes_ok)


def _descended(
    W_ok: Tensor, H_kk: Tensor, q: QTensor, order: Tensor, block: int, fixed: Tensor | None
) -> Tensor:
    """The codes of some rows. fixed: bool [o, k], True where they stay."""
    spec, (rows, cols) = q.spec, q.spec.tile.sizes(q.shape)
    codes_ko = q.codes.T.index_select(0, order).to(W_ok.dtype)
    D_ko = (W_ok - dense(q, W_ok.dtype)).T.index_select(0, order)
    s_ko = (
        steps(q.scales, q.outer, W_ok.dtype)
        .T.repeat_interleave(rows, 1)[:, : len(W_ok)]
        .index_select(0, order // cols)
    )
    codes, s = codes_ko.unbind(), s_ko.unbind()
    hs = (H_kk.diagonal()[:, None] * s_ko).unbind()
    stays = None if fixed is None else fixed.T.index_select(0, order).unbind()
    inner, before_o = Substitution(min(block, len(order)), D_ko), torch.empty_like(D_ko[0])
    for span, starts in spans(len(order), block):
        outside_so = _product_outside(H_kk, D_ko, span)
        for start in starts:
            at = slice(start, min(start + block, span.stop))
            # H is symmetric: row j of H D^T is column j of D H
            G_bo = H_kk[at, span] @ D_ko[span]
            if outside_so is not None:
                G_bo += outside_so[start - span.start : at.stop - span.start]
            for i, g_o, moved_o in inner.solve(G_bo, -H_kk[at, at]):
                j, code_o = start + i, codes[start + i]
                before_o.copy_(code_o)
                # w'_j + g / H_jj in units of codes
                spec.nearest_(code_o.addcdiv_(g_o, hs[j]))
                if stays is not None:
                    code_o.copy_(torch.where(stays[j], before_o, code_o))
                torch.sub(code_o, before_o, out=moved_o).mul_(s[j])
            D_ko[at] -= inner.e_bo[: len(G_bo)]
    return codes_ko[order.argsort()].T.contiguous().to(spec.code_dtype)


def _product_outside(H_kk: Tensor, D_ko: Tensor, span: slice) -> Tensor | None:
    """What rows outside a span add to the gradient in it, [s, o], while codes in the span change;
    None where it has all rows."""
    first, stop = span.start, span.stop
    if stop - first == len(D_ko):
        return None
    return (H_kk[span, :first] @ D_ko[:first]).addmm_(H_kk[span, stop:], D_ko[stop:])


def refit_scales(W_ok: Tensor, H_kk: Tensor, q: QTensor) -> QTensor:
    """The scales that minimize tr(D H D^T) for fixed codes, of tiles of one row: A s = b in every
    row, with A_gh = c_g^T H_gh c_h and b_g = c_g^T (H w)_g.

    RIDGE keeps groups with hardly any curvature at their old scale.
    """
    scales = [
        _refitted(W_ok[rows], H_kk, q.rows(rows, tiles))
        for rows, tiles in parts(q.shape, q.spec.tile)
    ]
    return QTensor(q.codes, torch.cat(scales), q.zeros, q.spec)


def _refitted(W_ok: Tensor, H_kk: Tensor, q: QTensor) -> Tensor:
    """The scales of some rows."""
    o, groups = q.scales.shape
    c_ogn = q.spec.tile.split(q.codes).to(W_ok.dtype)
    if q.zeros is not None:
        c_ogn = c_ogn - q.zeros.to(W_ok.dtype)[..., None]
    H_gnhm = rearrange(H_kk, "(g n) (h m) -> g n h m", g=groups, h=groups)
    A_ogh = W_ok.new_empty(o, groups, groups)
    for g in range(groups):  # A is symmetric
        cH_ohm = rearrange(
            c_ogn[:, g] @ H_gnhm[g, :, g:].flatten(1), "o (h m) -> o h m", h=groups - g
        )
        A_ogh[:, g, g:] = A_ogh[:, g:, g] = torch.linalg.vecdot(cH_ohm, c_ogn[:, g:])
    b_og = torch.linalg.vecdot(rearrange(W_ok @ H_kk, "o (g n) -> o g n", g=groups), c_ogn)
    ridge = RIDGE * A_ogh.diagonal(dim1=1, dim2=2)
    ridge = torch.where(ridge > 0, ridge, 1)
    solved = torch.linalg.solve(
        A_ogh + torch.diag_embed(ridge), b_og + ridge * q.scales.to(W_ok.dtype)
    ).to(q.scales.dtype)
    usable = solved.isfinite() & (solved != 0)
    return torch.where(usable, solved, q.scales)
