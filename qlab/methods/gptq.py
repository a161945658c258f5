"""GPTQ: round column by column, and make up for each error in the columns not rounded yet (Frantar
et al. 2022).

Legend: W_ok weight, H_kk mean second moment of the input; [a, g] scales, a tiles down and g tiles
across; c codes, s scales and z zeros [o] of one column, in the order in which columns are solved.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from qlab.algebra.cell import Cell, Weight, on_support
from qlab.algebra.operations import Operations
from qlab.algebra.qtensor import QTensor, dense, steps
from qlab.algebra.spec import Spec
from qlab.algebra.stats import Moment, own_mean_kk
from qlab.algebra.transform import Transform, each_cell
from qlab.errors import QlabError
from qlab.methods.grid import Grid, encode, fit, least_rows, weighted
from qlab.methods.obs import AT_ONCE, Factor, check_damp, damped_, factor_of, obs_sweep, parts
from qlab.methods.quantease import descend_in_order, refit_scales
from qlab.methods.square import Fresh, permuted_

WORKSPACE = 1  # matrices [k, k] at once: a copy of H, in whose memory it is factorized
Order = Callable[[Tensor], Tensor]  # H_kk -> the order [k] in which columns are solved


def act_order(H_kk: Tensor) -> Tensor:
    """Columns with the largest second moment first (act-order, desc_act)."""
    return H_kk.diagonal().argsort(descending=True, stable=True)


def paper_order(H_kk: Tensor) -> Tensor:
    """Left to right, as in the paper."""
    return torch.arange(len(H_kk), device=H_kk.device)


def gptq_codes(
    W_ok: Tensor,
    H: Fresh,
    scales: Tensor,
    zeros: Tensor | None,
    spec: Spec,
    order: Tensor,
    damp: float,
    block: int,
    support: Tensor | None = None,
) -> tuple[Tensor, float, int]:
    """Codes [o, k] on a fixed grid, the damping that was used, and the number of dead columns.

    H: gives H_kk, a copy at every call. order: the columns [k] as they are solved. The rest is as
    of `codes_on`.
    """
    factor = factor_of(lambda: permuted_(H(), order), damp)
    codes_ok = codes_on((scales, zeros, spec), W_ok, factor, order, block, support)
    return codes_ok, factor.damp, int(factor.dead.sum())


def codes_on(
    grid: tuple[Tensor, Tensor | None, Spec],
    W_ok: Tensor,
    factor: Factor,
    order: Tensor,
    block: int,
    support: Tensor | None = None,
) -> Tensor:
    """Codes [o, k] on a fixed grid, by the factor of H in solving order.

    grid: scales as `qtensor.steps` gives them, zeros, and what they are of. order: the columns [k]
    as they are solved; codes come back in their own places, so that no g_idx is needed. support:
    bool [o, k]; where it is False the weight becomes 0, and later columns make up for that as for
    any other error.
    """
    scales, zeros, spec = grid
    codes_ok = torch.empty(W_ok.shape, dtype=spec.code_dtype, device=W_ok.device)
    for rows, tiles in parts(W_ok.shape, spec.tile):
        part = scales[tiles], None if zeros is None else zeros[tiles], spec
        free = None if support is None else support[rows]
        codes_ok[rows] = _codes_of_rows(part, W_ok[rows], factor, order, block, free)
    return codes_ok


def _codes_of_rows(
    grid: tuple[Tensor, Tensor | None, Spec],
    W_ok: Tensor,
    factor: Factor,
    order: Tensor,
    block: int,
    support: Tensor | None,
) -> Tensor:
    """`codes_on` of some rows."""
    scales, zeros, spec = grid
    rows, cols = spec.tile.sizes(W_ok.shape)

    def per_column(x_ag: Tensor) -> Tensor:
        """[a, g] -> [k, o], in solving order."""
        x_go = x_ag.T.to(W_ok.dtype).repeat_interleave(rows, 1)[:, : len(W_ok)]
        return x_go.index_select(0, order // cols)

    codes_ko = W_ok.new_empty(W_ok.shape[1], W_ok.shape[0])
    c = codes_ko.unbind()
    s = per_column(scales).unbind()
    z = None if zeros is None else per_column(zeros).unbind()
    free = None if support is None else support.T.to(W_ok.dtype).index_select(0, order).unbind()

    def project(w_o: Tensor, j: int, out_o: Tensor) -> None:
        torch.div(w_o, s[j], out=c[j])
        if z is None:
            torch.mul(spec.nearest_(c[j]), s[j], out=out_o)
        else:
            torch.sub(spec.nearest_(c[j].add_(z[j])), z[j], out=out_o).mul_(s[j])
        if free is not None:
            out_o.mul_(free[j])

    obs_sweep(
        W_ok.index_select(1, order).masked_fill_(factor.dead.to(W_ok.device), 0),
        factor.R_kk,
        project,
        block,
    )
    codes_ko = codes_ko.to(spec.code_dtype)
    return codes_ko[order.argsort()].T.contiguous()


def gptq(
    spec: Spec,
    grid: Grid = weighted,
    order: Order = act_order,
    damp: float = 0.01,
    block: int = 32,
    sweeps: int = 1,
) -> Transform:
    """GPTQ: min tr((W - W') H (W - W')^T) over codes, on scales that are fixed beforehand.

    Args:
        spec: the number grid to round to, or its name such as "int4-g64".
        grid: how scales and zero points are chosen (see GRIDS).
        order: H_kk -> the order [k] in which columns are solved: act_order, largest second moment
            first, or paper_order, left to right.
        damp: fraction of mean(diag H) that is added to the diagonal of H, from 0 to 1. It is raised
            where H needs it, and the report holds it.
        block: columns that are solved before their errors reach the columns behind. It changes
            speed, and codes only by rounding of sums.
        sweeps: how often scales are refitted to the codes and codes improved one by one afterwards
            (qlab.methods.quantease). The paper's method has none.

    Returns:
        A transform of one stage. It needs calibration data.

    Raises:
        QlabError: damp is not from 0 to 1, block is below 1, or sweeps below 0.

    Source:
        Frantar et al. 2022, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
        Transformers.

    Example:
        >>> import qlab
        >>> (stage,) = qlab.gptq("int4-g64", sweeps=0)
        >>> stage.name, stage.detail
        ('gptq', 'grid weighted, act_order, damp 0.01, 0 sweeps')
    """
    check_damp(damp)
    if block < 1 or sweeps < 0:
        raise QlabError(
            f"block is {block} and sweeps {sweeps}; give a block of at least 1 column and no "
            "fewer than 0 sweeps"
        )

    def fn(weight: Weight) -> Cell:
        cell, outer = weight.cell, weight.stats["outer"]
        W_ok, support, settled = cell.target, cell.support, cell.feasible.spec
        assert settled is not None  # the stage has a spec

        def second_moment() -> Tensor:
            return own_mean_kk(weight.stats["second_moment"])

        H_kk, start_ok = second_moment(), dense(cell.leaf, torch.float32)
        columns, h_k = order(H_kk), H_kk.diagonal().clone()
        del H_kk  # a copy at a time
        scales, zeros = fit(grid, start_ok, settled, h_k, outer)
        s_ag = steps(scales, outer, W_ok.dtype)
        codes, used, dead = gptq_codes(
            W_ok, second_moment, s_ag, zeros, settled, columns, damp, block, support
        )
        q = QTensor(codes, scales, zeros, settled, outer)
        q = q if support is None else on_support(q, support)
        # A scale that several rows share is no least-squares problem of one row, and a scale of 8
        # bits cannot hold its solution.
        refits = settled.tile.rows == 1 and scales.itemsize > 1
        for _ in range(sweeps):
            if refits:
                q = refit_scales(W_ok, damped_(second_moment(), used), q)
            in_order = permuted_(damped_(second_moment(), used), columns)
            q = descend_in_order(W_ok, in_order, q, columns, block, support)
            del in_order
        if support is not None:
            nearest = encode(grid, start_ok, settled, h_k, outer)
            q = _no_worse(q, nearest, W_ok, weight.stats["second_moment"])
        return cell.put(q, grid=grid.name, damp=used, dead=dead)

    detail = (
        f"grid {grid.name}, {getattr(order, '__name__', order)}, damp {damp:g}, {sweeps} sweeps"
    )
    stages = each_cell("gptq", fn, {"second_moment"}, spec, detail)
    # Cholesky; the sweep over a triangle and the loss; of each further sweep, scales and codes
    counted = Operations(square=1 / 3, rows=5 + 5 * sweeps)
    held = partial(replace, workspace=WORKSPACE, at_once=AT_ONCE, operations=counted)
    return tuple(held(stage) for stage in stages)


def _no_worse(q: QTensor, nearest: QTensor, W_ok: Tensor, moment: Moment) -> QTensor:
    """q, with the codes that are nearest on the support in rows where their output error is less.
    Without a mask OBS is ahead of those; behind a mask both start from what is far from W."""
    errors = [moment.output_errors(dense(leaf, torch.float32) - W_ok) for leaf in (q, nearest)]
    return least_rows(q, errors[0], nearest, errors[1])[0]
