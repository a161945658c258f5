"""Optimal brain surgeon: solve the columns of W one after the other and spread each error over those to come.

Legend: W_ok weight, H_kk mean second moment of the input, U_kk upper Cholesky factor of H^-1, in solving order.
Sources: Frantar and Alistarh 2022 (OBC), Frantar et al. 2022 (GPTQ), Frantar and Alistarh 2023 (SparseGPT).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.errors import QlabError

DAMP_LIMIT = 1.0
Project = Callable[[Tensor, int, Tensor], Tensor]  # (column [o], its place, out [o]) -> out, what the column becomes


@dataclass(frozen=True)
class Factor:
    """U_kk with H^-1 = U^T U after damping; damp is the fraction of mean(diag H) that was added; dead [k] bool."""

    U_kk: Tensor
    damp: float
    dead: Tensor


def inverse_factor(H_kk: Tensor, damp: float) -> Factor:
    """Upper Cholesky factor of (H + damp * mean(diag H) * I)^-1; dead columns (H_jj = 0) get H_jj = 1 first.

    Damping grows tenfold up to 1 where the factorization fails, and what was used is returned. Above that: an error.
    """
    H, diagonal = H_kk.clone(), H_kk.diagonal()
    dead = diagonal == 0
    H.diagonal().add_(dead.to(H.dtype))
    mean, used = H.diagonal().mean(), damp
    while True:
        L, failed = torch.linalg.cholesky_ex(H + (used * mean) * torch.eye(len(H), dtype=H.dtype, device=H.device))
        if not failed:
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not failed and torch.isfinite(U).all():
                return Factor(U, used, dead)
        if used >= DAMP_LIMIT:
            raise QlabError(f"the second moment is not positive definite even with damping {used:g} (limit {DAMP_LIMIT:g}); "
                            "calibrate with more or other text")
        used = min(max(used, 1e-3) * 10, DAMP_LIMIT)


def obs_sweep(W_ok: Tensor, U_kk: Tensor, project: Project, block: int = 32) -> Tensor:
    """The columns as `project` leaves them, left to right: w_j <- project(w_j), W_i <- W_i - (w_j - p_j) U_ji / U_jj
    for every later column i. Errors are applied at once within a block and in one product beyond it.
    """
    W_ko = W_ok.T.clone(memory_format=torch.contiguous_format)  # a column is a contiguous row here
    out_ko = torch.empty_like(W_ko)
    k = len(W_ko)
    for start in range(0, k, block):
        stop = min(start + block, k)
        E_ko = torch.empty_like(W_ko[start:stop])
        for j in range(start, stop):
            torch.sub(W_ko[j], project(W_ko[j], j, out_ko[j]), out=E_ko[j - start])
            E_ko[j - start].div_(U_kk[j, j])
            W_ko[j + 1 : stop].addr_(U_kk[j, j + 1 : stop], E_ko[j - start], alpha=-1)
        W_ko[stop:].addmm_(U_kk[start:stop, stop:].T, E_ko, alpha=-1)
    return out_ko.T
