"""Optimal brain surgeon: solve the columns of W one after the other, and spread each error over the
columns to come.

Legend: W_ok weight, H_kk mean second moment of the input, both in solving order; H + damp = R D R^T
with R unit upper triangular and D diagonal. R_ij is how far an error in column i moves column j
when all later columns take their optimum. Sources: Frantar and Alistarh 2022 (OBC), Frantar et al.
2022 (GPTQ); Chee et al. 2023 (QuIP) shows that GPTQ is this factorization, which needs no inverse.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.algebra.tile import Tile
from qlab.errors import QlabError
from qlab.methods.square import Fresh, backwards_, is_finite, lower_mirrored_

DAMP_LIMIT = 1.0
# (column [o], its place, out [o]) -> None: writes to `out` what the column becomes
Project = Callable[[Tensor, int, Tensor], None]
Begin = Callable[[Tensor, int], None]
SPAN = 2048  # columns, about, whose errors reach those behind them in one product
AT_ONCE = 1 << 24  # numbers of a weight whose rows are solved together; rows do not see each other


@dataclass(frozen=True)
class Factor:
    """R_kk with H = R D R^T after damping, the fraction `damp` of mean(diag H) that was added,
    which columns are dead (H_jj = 0) [k], and the diagonal of D [k]: what an error in each column
    costs when all later columns make up for it as far as they can."""

    R_kk: Tensor
    damp: float
    dead: Tensor
    D_k: Tensor


def damped(H_kk: Tensor, damp: float) -> Tensor:
    """H + damp * mean(diag H) * I, where the mean is over columns that are not dead (H_jj = 0). The
    diagonal of dead columns is first set to that mean, or to 1 if all are dead.

    So scaling the activations scales the result, also where columns are dead.
    """
    return damped_(H_kk.clone(), damp)


def damped_(H_kk: Tensor, damp: float) -> Tensor:
    """The same in the memory of H."""
    diagonal = H_kk.diagonal().contiguous()
    mean = diagonal.mean() * (len(diagonal) / (diagonal != 0).sum().clamp_min(1))
    mean = torch.where(mean > 0, mean, 1)
    H_kk.diagonal().copy_(torch.where(diagonal == 0, mean, diagonal) + damp * mean)
    return H_kk


def factorize(H_kk: Tensor, damp: float) -> Factor:
    """The unit upper factor of the damped H (see `cholesky`)."""
    return factor_of(lambda: _own(H_kk), damp)


def factor_of(H: Fresh, damp: float) -> Factor:
    """The same of what H() gives, in its memory."""
    # Cholesky's L of H read backwards is, read backwards, an upper factor of H.
    L_kk, used, diagonal_k = cholesky_of(lambda: backwards_(H()), damp)
    C_kk = backwards_(L_kk.mT).mT  # columns of L are contiguous
    root_k = C_kk.diagonal().clone()
    return Factor(C_kk.div_(root_k), used, diagonal_k.flip(0) == 0, root_k.square())


def check_damp(damp: float) -> None:
    """Refuse a damping that is not from 0 to DAMP_LIMIT."""
    if not 0 <= damp <= DAMP_LIMIT:
        raise QlabError(f"damp is {damp}; give a fraction of mean(diag H) from 0 to {DAMP_LIMIT:g}")


def cholesky(H_kk: Tensor, damp: float) -> tuple[Tensor, float]:
    """L with L L^T = H after damping, and the damping that was used. While the factorization fails
    the damping grows tenfold; beyond DAMP_LIMIT it is an error."""
    L_kk, used, _ = cholesky_of(lambda: _own(H_kk), damp)
    return L_kk, used


def cholesky_of(H: Fresh, damp: float) -> tuple[Tensor, float, Tensor]:
    """The same of what H() gives, in its memory, and the diagonal [k] before damping."""
    used = damp
    while True:
        H_kk = H()
        if not is_finite(H_kk):
            raise QlabError(
                "the second moment is beyond float32; the activations are too large, check the "
                "model"
            )
        diagonal_k = H_kk.diagonal().clone()
        L_kk, failed = _lower_factor(lower_mirrored_(damped_(H_kk, used)))
        if not failed and is_finite(L_kk):
            return L_kk, used, diagonal_k
        if not used < DAMP_LIMIT:
            raise QlabError(
                f"the second moment is not positive definite even with damping {used:g} (limit "
                f"{DAMP_LIMIT:g}); calibrate with more or other text"
            )
        del H_kk, L_kk  # before the next one is made
        used = min(max(used, 1e-3) * 10, DAMP_LIMIT)


def _lower_factor(H_kk: Tensor) -> tuple[Tensor, bool]:
    """L of a symmetric H in the memory of H, and whether there is none."""
    columns_kk = H_kk.mT  # as LAPACK holds matrices
    info = torch.empty((), dtype=torch.int32, device=H_kk.device)
    torch.linalg.cholesky_ex(columns_kk, out=(columns_kk, info))
    return columns_kk, bool(info)


def _own(H_kk: Tensor) -> Tensor:
    """A contiguous copy."""
    return H_kk.clone(memory_format=torch.contiguous_format)


def parts(shape: torch.Size, tile: Tile) -> Iterator[tuple[slice, slice]]:
    """The rows of a weight [o, k] that are solved together, and those of its scales [a, g]."""
    return tile.parts(shape, AT_ONCE)


def obs_sweep(
    W_ok: Tensor, R_kk: Tensor, project: Project, block: int = 32, begin: Begin | None = None
) -> Tensor:
    """w'_j = project(w_j + sum_(i < j) (w_i - w'_i) R_ij), left to right.

    begin(A_bo, start) sees every block of columns before its first is projected, with the errors of
    all earlier blocks in it.

    An error reaches the columns of its own block at once, those of its span in one product per
    block, and those behind it in one product per span, which is wide enough to run at full speed.
    """
    # a column is a contiguous row here
    W_ko = W_ok.T.clone(memory_format=torch.contiguous_format)
    del W_ok  # where it is nobody else's, it is not held beside its copy
    out_ko, E_ko = torch.empty_like(W_ko), W_ko  # a column is read no more when it has an error
    k, inner = len(W_ko), Substitution(min(block, len(W_ko)), W_ko)
    for span, starts in spans(k, block):
        first = span.start
        A_so = W_ko[span].addmm(R_kk[:first, span].T, E_ko[:first])
        for start in starts:
            stop = min(start + block, span.stop)
            A_bo = A_so[start - first : stop - first].addmm(
                R_kk[first:start, start:stop].T, E_ko[first:start]
            )
            if begin is not None:
                begin(A_bo, start)
            w, out = W_ko[start:stop].unbind(), out_ko[start:stop].unbind()
            for i, a_o, e_o in inner.solve(A_bo, R_kk[start:stop, start:stop].T):
                project(a_o, start + i, out[i])
                torch.sub(w[i], out[i], out=e_o)
            E_ko[start:stop] = inner.e_bo[: stop - start]
    return out_ko.T


def spans(k: int, block: int) -> Iterator[tuple[slice, range]]:
    """Spans of columns, in order, and where their blocks start: of all columns, where these are
    few."""
    size = -(-SPAN // block) * block
    for first in range(0, k, size):
        stop = min(first + size, k)
        yield slice(first, stop), range(first, stop, block)


class Substitution:
    """Forward substitution within a block of columns: a_i + sum_(j < i) T_ij e_j, where e_j depends
    on a_j.

    Views of the workspace are made once for all blocks of a matrix, since making them takes longer
    than the products.
    """

    def __init__(self, block: int, like_ko: Tensor):
        self.a_bo = like_ko.new_empty(block, like_ko.shape[1])
        self.e_bo = torch.empty_like(self.a_bo)
        self.T_bb = like_ko.new_empty(block, block)
        earlier = [(self.e_bo[:i].T, self.T_bb[i, :i]) for i in range(block)]
        self._columns = list(zip(range(block), self.a_bo.unbind(), self.e_bo.unbind(), earlier))

    def solve(self, A_bo: Tensor, T_bb: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(i, a_i with all earlier errors in it, e_i, which the caller writes) of every column.
        T_bb is read below its diagonal alone."""
        b = len(A_bo)
        self.a_bo[:b], self.T_bb[:b, :b] = A_bo, T_bb
        for i, a_o, e_o, (E_oi, T_i) in self._columns[:b]:
            if i:
                a_o.addmv_(E_oi, T_i)
            yield i, a_o, e_o
