"""Optimal brain surgeon: solve the columns of W one after the other and spread each error over
those to come.

Legend: W_ok weight, H_kk mean second moment of the input, both in solving order; H + damp = R D R^T
with R unit upper triangular and D diagonal. R_ij is what an error in column i asks of column j once
all later columns have their optimum. Sources: Frantar and Alistarh 2022 (OBC), Frantar et al. 2022
(GPTQ); Chee et al. 2023 (QuIP) shows that GPTQ is this factorization, which needs no inverse.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.errors import QlabError

DAMP_LIMIT = 1.0
Project = Callable[
    [Tensor, int, Tensor], None
]  # (column [o], its place, out [o]): writes what the column becomes


@dataclass(frozen=True)
class Factor:
    """R_kk with H = R D R^T after damping; damp is the fraction of mean(diag H) that was added;
    dead [k] bool."""

    R_kk: Tensor
    damp: float
    dead: Tensor


def damped(H_kk: Tensor, damp: float) -> Tensor:
    """H + damp * mean(diag H) * I over the columns that are not dead (H_jj = 0); those have that
    mean, or 1 where all are dead.

    So nothing depends on the units of the activations, dead columns or not.
    """
    diagonal = H_kk.diagonal().contiguous()
    mean = diagonal.mean() * (len(diagonal) / (diagonal != 0).sum().clamp_min(1))
    mean = torch.where(mean > 0, mean, 1)
    H = H_kk.clone()
    H.diagonal().copy_(torch.where(diagonal == 0, mean, diagonal) + damp * mean)
    return H


def factorize(H_kk: Tensor, damp: float) -> Factor:
    """The unit upper factor of the damped H; see cholesky."""
    L_kk, used = cholesky(
        H_kk.flip(0, 1), damp
    )  # of the matrix read backwards, it eliminates the last column first
    C_kk = L_kk.flip(0, 1)
    del L_kk  # there are enough matrices of this size
    return Factor(C_kk.div_(C_kk.diagonal().clone()), used, H_kk.diagonal() == 0)


def check_damp(damp: float) -> None:
    """Refuse what is no damping."""
    if not 0 <= damp <= DAMP_LIMIT:
        raise QlabError(f"damp is {damp}; give a fraction of mean(diag H) from 0 to {DAMP_LIMIT:g}")


def cholesky(H_kk: Tensor, damp: float) -> tuple[Tensor, float]:
    """L with L L^T = the damped H, and the damping.

    It grows tenfold up to 1 where the factorization fails, and what was used is returned. Above
    that: an error.
    """
    if not torch.isfinite(H_kk).all():
        raise QlabError(
            "the second moment is beyond float32; the activations are too large, check the model"
        )
    used = damp
    while True:
        L_kk, failed = torch.linalg.cholesky_ex(damped(H_kk, used))
        if not failed and torch.isfinite(L_kk).all():
            return L_kk, used
        if not used < DAMP_LIMIT:
            raise QlabError(
                f"the second moment is not positive definite even with damping {used:g} (limit "
                f"{DAMP_LIMIT:g}); calibrate with more or other text"
            )
        used = min(max(used, 1e-3) * 10, DAMP_LIMIT)


def obs_sweep(W_ok: Tensor, R_kk: Tensor, project: Project, block: int = 32) -> Tensor:
    """The columns as `project` leaves them, left to right: w'_j = project(w_j + sum_(i < j) (w_i -
    w'_i) R_ij).

    Errors of a block of columns are applied at once within the block and in one product beyond it.
    """
    W_ko = W_ok.T.contiguous()  # a column is a contiguous row here
    out_ko, E_ko = torch.empty_like(W_ko), torch.empty_like(W_ko)
    k, inner = len(W_ko), Substitution(min(block, len(W_ko)), W_ko)
    for start in range(0, k, block):
        stop = min(start + block, k)
        A_bo = W_ko[start:stop].addmm(R_kk[:start, start:stop].T, E_ko[:start])
        w, out = W_ko[start:stop].unbind(), out_ko[start:stop].unbind()
        for i, a_o, e_o in inner.solve(A_bo, R_kk[start:stop, start:stop].T):
            project(a_o, start + i, out[i])
            torch.sub(w[i], out[i], out=e_o)
        E_ko[start:stop] = inner.e_bo[: stop - start]
    return out_ko.T


class Substitution:
    """Forward substitution within a block of columns: a_i + sum_(j < i) T_ij e_j, where e_j depends
    on a_j.

    The views of its workspace are made once for all blocks of a matrix: making them takes longer
    than the products.
    """

    def __init__(self, block: int, like_ko: Tensor):
        self.a_bo, self.e_bo = (
            like_ko.new_empty(block, like_ko.shape[1]),
            like_ko.new_empty(block, like_ko.shape[1]),
        )
        self.T_bb = like_ko.new_empty(block, block)
        earlier = [(self.e_bo[:i].T, self.T_bb[i, :i]) for i in range(block)]
        self._columns = list(zip(range(block), self.a_bo.unbind(), self.e_bo.unbind(), earlier))

    def solve(self, A_bo: Tensor, T_bb: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(i, a_i with all earlier errors in it, e_i to be written), column by column. T_bb: what
        lies below its diagonal counts."""
        b = len(A_bo)
        self.a_bo[:b], self.T_bb[:b, :b] = A_bo, T_bb
        for i, a_o, e_o, (E_oi, T_i) in self._columns[:b]:
            if i:
                a_o.addmv_(E_oi, T_i)
            yield i, a_o, e_o
