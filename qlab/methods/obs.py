"""Optimal brain surgeon: solve the columns of W one after the other and spread each error over those to come.

Legend: W_ok weight, H_kk mean second moment of the input, both in solving order; H + damp = R D R^T with R unit upper
triangular and D diagonal. R_ij is what an error in column i asks of column j once all later columns have their optimum.
Sources: Frantar and Alistarh 2022 (OBC), Frantar et al. 2022 (GPTQ); Chee et al. 2023 (QuIP) shows that GPTQ is this
factorization, which needs no inverse.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.errors import QlabError

DAMP_LIMIT = 1.0
Project = Callable[[Tensor, int, Tensor], None]  # (column [o], its place, out [o]): writes what the column becomes


@dataclass(frozen=True)
class Factor:
    """R_kk with H = R D R^T after damping; damp is the fraction of mean(diag H) that was added; dead [k] bool."""

    R_kk: Tensor
    damp: float
    dead: Tensor


def damped(H_kk: Tensor, damp: float) -> Tensor:
    """H + damp * mean(diag H) * I, where dead columns (H_jj = 0) have H_jj = 1 first."""
    diagonal = H_kk.diagonal()
    diagonal = torch.where(diagonal == 0, 1, diagonal)
    H = H_kk.clone()
    H.diagonal().copy_(diagonal + damp * diagonal.mean())
    return H


def factorize(H_kk: Tensor, damp: float) -> Factor:
    """The unit upper factor of the damped H.

    Damping grows tenfold up to 1 where the factorization fails, and what was used is returned. Above that: an error.
    """
    used = damp
    while True:
        # Cholesky of the matrix read backwards eliminates the last column first
        L_kk, failed = torch.linalg.cholesky_ex(damped(H_kk, used).flip(0, 1))
        if not failed and torch.isfinite(L_kk).all():
            C_kk = L_kk.flip(0, 1)
            return Factor(C_kk / C_kk.diagonal(), used, H_kk.diagonal() == 0)
        if used >= DAMP_LIMIT:
            raise QlabError(f"the second moment is not positive definite even with damping {used:g} (limit {DAMP_LIMIT:g}); "
                            "calibrate with more or other text")
        used = min(max(used, 1e-3) * 10, DAMP_LIMIT)


def obs_sweep(W_ok: Tensor, R_kk: Tensor, project: Project, block: int = 32) -> Tensor:
    """The columns as `project` leaves them, left to right: w'_j = project(w_j + sum_(i < j) (w_i - w'_i) R_ij).

    Errors of a block of columns are applied at once within the block and in one product beyond it.
    """
    W_ko = W_ok.T.contiguous()  # a column is a contiguous row here
    out_ko, E_ko = torch.empty_like(W_ko), torch.empty_like(W_ko)
    k = len(W_ko)
    for start in range(0, k, block):
        stop = min(start + block, k)
        A_bo = W_ko[start:stop].addmm(R_kk[:start, start:stop].T, E_ko[:start])
        R_bb, w, out, e = R_kk[start:stop, start:stop], W_ko[start:stop], out_ko[start:stop], E_ko[start:stop]
        for i, (w_o, out_o, e_o) in enumerate(zip(w.unbind(), out.unbind(), e.unbind())):
            project(A_bo[i], start + i, out_o)
            torch.sub(w_o, out_o, out=e_o)
            A_bo[i + 1 :].addr_(R_bb[i, i + 1 :], e_o)
    return out_ko.T
