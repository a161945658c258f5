"""SparseGPT: prune column by column, and make up for each zero in the columns to come (Frantar and
Alistarh 2023).

Which weights go is decided a few columns at a time, on weights that already make up for the zeros
before them: those with the least w_ij^2 D_j, where D_j is the curvature of column j once all later
columns take their optimum.

Legend: W_ok weight, H_kk mean second moment of the input, H = R D R^T as in `qlab.methods.obs`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qlab.algebra.cell import Cell, Weight
from qlab.algebra.operations import Operations
from qlab.algebra.transform import Transform, each_cell
from qlab.methods.obs import check_damp, cholesky, obs_sweep
from qlab.methods.pattern import Pattern, checked, parse_pattern

BLOCK = 128  # columns whose zeros of a share are chosen together, as in the paper
WORKSPACE = 6  # matrices [k, k] at once: H, its damped copy, its factor and that reversed


def pruned(
    W_ok: Tensor, H_kk: Tensor, pattern: Pattern, damp: float, support: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """The pruned weight [o, k], its support, and the damping that was used.

    support: bool [o, k], False where the weight is 0 already.
    """
    k = W_ok.shape[1]
    pattern.check(k)
    L_kk, used = cholesky(H_kk.flip(0, 1), damp)
    C_kk = L_kk.flip(0, 1)  # an upper factor of H
    D_k, R_kk = C_kk.diagonal().square(), C_kk / C_kk.diagonal()
    dead = (H_kk.diagonal() == 0).to(W_ok.device)
    free = torch.ones_like(W_ok, dtype=torch.bool) if support is None else support
    kept = free & ~dead
    W = W_ok.masked_fill(dead, 0)

    def choose(A_bo: Tensor, start: int) -> None:
        at = slice(start, start + len(A_bo))
        # What each column is once all before it made up for errors, and those of this block are
        # still free: a - w holds the errors of earlier blocks alone.
        moved_ob = torch.linalg.solve_triangular(
            R_kk[at, at], A_bo.T - W[:, at], upper=True, left=False, unitriangular=True
        )
        V_ob = W[:, at] + moved_ob
        # Zeros of an earlier mask go first.
        s_ob = (V_ob.square() * D_k[at]).masked_fill(~kept[:, at], -1.0)
        kept[:, at] &= pattern.kept_overall(s_ob)

    def project(w_o: Tensor, j: int, out_o: Tensor) -> None:
        torch.mul(w_o, kept[:, j], out=out_o)

    W_pruned = obs_sweep(W, R_kk, project, pattern.of or min(BLOCK, k), choose)
    return W_pruned.contiguous(), kept, used


def sparsegpt(pattern: str | float | Pattern, damp: float = 0.01) -> Transform:
    """SparseGPT: choose zeros and move what is kept, against tr((W - W') H (W - W')^T).

    What later steps aim at is still the weight before pruning, so a gptq behind it solves zeros and
    codes against that.

    Args:
        pattern: "2:4", of which 2 of every 4 neighbouring input channels are kept, "4:8", or a
            share of zeros such as 0.5, which is one of every 128 columns.
        damp: fraction of mean(diag H) that is added to the diagonal of H, from 0 to 1. It is raised
            where H needs it, and the report holds it as `prune_damp`.

    Returns:
        A transform of one stage, which rounds nothing. It needs calibration data.

    Raises:
        QlabError: the pattern is none, damp is not from 0 to 1, or (when it runs) M does not divide
            the input channels.

    Source:
        Frantar and Alistarh 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in
        One-Shot.

    Example:
        >>> import qlab
        >>> recipe = qlab.chain(qlab.sparsegpt("2:4"), qlab.gptq("int4-g64"))
        >>> [stage.name for stage in recipe]
        ['sparsegpt', 'gptq']
    """
    kind = parse_pattern(pattern)
    check_damp(damp)

    def fn(weight: Weight) -> Cell:
        cell, H_kk = weight.cell, weight.stats["second_moment"].mean_kk
        W_ok, kept, used = pruned(cell.target, H_kk, kind, damp, cell.support)
        return cell.narrow(support=kept).put(W_ok, prune_damp=used)

    stages = each_cell("sparsegpt", fn, {"second_moment"}, detail=f"pattern {kind}, damp {damp:g}")
    counted = Operations(square=1 / 3, rows=5)  # Cholesky, the sweep and the loss
    return checked(
        tuple(replace(stage, workspace=WORKSPACE, operations=counted) for stage in stages), kind
    )
