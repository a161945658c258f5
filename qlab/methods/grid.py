"""Which scales and zero points: a set of candidate grids per tile, and the objective that picks one of them.

Legend: W_ok weight [o, k] in fp32; x_agn its tiles [a, g, n] (`Tile.split`); s_ag, z_ag scales and zeros;
H_kk the mean second moment of the input; e_ag the objective of every tile.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.qtensor import QTensor, round_codes
from qlab.spec import Spec, with_scale_dtype

Candidates = Callable[[Tensor, Tensor, Spec], Iterator[tuple[Tensor, Tensor | None]]]
CHUNK = 1 << 16  # numbers searched at once: small enough to stay in cache over all candidates


@dataclass(frozen=True)
class Grid:
    """candidates(lo_ag, hi_ag, spec) yields (scales, zeros); every tile takes the one with the least
    sum_j h_j (x_j - q_j)^2, where h is diag(H) when `weighted` and 1 otherwise. lo <= 0 <= hi are the tile's range.
    """

    name: str
    candidates: Candidates
    weighted: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"second_moment"} if self.weighted else ())


def fit(grid: Grid, W_ok: Tensor, spec: Spec, H_kk: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The best candidate of every tile: scales [a, g] in their stored dtype, zeros int8 [a, g] or None if symmetric."""
    spec = with_scale_dtype(spec, torch.float32)
    if grid.weighted and H_kk is None:
        raise QlabError(f"the grid {grid.name!r} weighs errors by the second moment, which was not observed")
    x_agn = spec.tile.split(W_ok)
    h_agn = None
    if grid.weighted and H_kk is not None:
        h_agn = spec.tile.split(H_kk.diagonal().expand(spec.tile.sizes(W_ok.shape)[0], -1))
    rows = max(1, CHUNK // x_agn[0].numel())
    parts = [_fit_rows(grid, x, spec, h_agn) for x in x_agn.split(rows)]
    scales = torch.cat([s for s, _ in parts])
    return scales, None if spec.symmetric else torch.cat([z for _, z in parts if z is not None])


def _fit_rows(grid: Grid, x_agn: Tensor, spec: Spec, h_agn: Tensor | None) -> tuple[Tensor, Tensor | None]:
    lo, hi = x_agn.amin(-1).clamp_max(0), x_agn.amax(-1).clamp_min(0)
    every = [_stored(s, z, spec) for s, z in grid.candidates(lo, hi, spec)]
    if len(every) == 1:
        return every[0]
    best_e, best_s, best_z = None, *every[0]
    for s, z in every:
        e_ag = _objective(x_agn, s, z, spec, h_agn)
        if best_e is None:
            best_e = e_ag
            continue
        better = e_ag < best_e
        best_e, best_s = torch.where(better, e_ag, best_e), torch.where(better, s, best_s)
        best_z = torch.where(better, z, best_z) if z is not None and best_z is not None else None
    return best_s, best_z


def _objective(x_agn: Tensor, s_ag: Tensor, z_ag: Tensor | None, spec: Spec, h_agn: Tensor | None) -> Tensor:
    s = s_ag.float()[..., None]
    d = x_agn / s
    if z_ag is None:
        d.round_().clamp_(spec.qmin, spec.qmax)
    else:
        z = z_ag.float()[..., None]
        d.add_(z).round_().clamp_(spec.qmin, spec.qmax).sub_(z)
    d.mul_(s).sub_(x_agn)
    return torch.linalg.vecdot(d, d if h_agn is None else d * h_agn)


def _stored(s_ag: Tensor, z_ag: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """Scales as the file will hold them: rounded to their dtype, zeros replaced by its epsilon (compressed-tensors)."""
    assert spec.scale_dtype is not None  # `fit` settles it
    s = s_ag.to(spec.scale_dtype)
    return torch.where(s == 0, torch.finfo(s.dtype).eps, s), z_ag


def encode(grid: Grid, W_ok: Tensor, spec: Spec, H_kk: Tensor | None = None) -> QTensor:
    """round(W / s + z) on the fitted grid."""
    scales, zeros = fit(grid, W_ok, spec, H_kk)
    return QTensor(round_codes(W_ok, scales, zeros, spec), scales, zeros, spec)


# ------------------------------------------------------------------ candidates
SHRINK = tuple(float(p) for p in torch.linspace(1.05, 0.5, 23))


def _ranged(lo: Tensor, hi: Tensor, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """The grid of compressed-tensors: s = absmax / ((qmax - qmin) / 2), or s = (hi - lo) / (qmax - qmin) with
    z = qmin - lo / s rounded half to even."""
    span = spec.qmax - spec.qmin
    if spec.symmetric:
        return torch.maximum(-lo, hi) / (span / 2), None
    s = (hi - lo) / span
    assert spec.scale_dtype is not None
    stored = s.to(spec.scale_dtype).float()
    z = (spec.qmin - lo / stored).nan_to_num_(0).clamp_(spec.qmin, spec.qmax).round_()
    return s, z.to(torch.int8)


def _whole(lo: Tensor, hi: Tensor, spec: Spec) -> Iterator[tuple[Tensor, Tensor | None]]:
    yield _ranged(lo, hi, spec)


def _shrunken(lo: Tensor, hi: Tensor, spec: Spec) -> Iterator[tuple[Tensor, Tensor | None]]:
    yield _ranged(lo, hi, spec)
    for p in SHRINK:
        yield _ranged(lo * p, hi * p, spec)
        if not spec.symmetric and p < 1:  # outliers mostly sit at one end
            yield _ranged(lo * p, hi, spec)
            yield _ranged(lo, hi * p, spec)


def _signed_range(lo: Tensor, hi: Tensor, spec: Spec) -> Iterator[tuple[Tensor, Tensor | None]]:
    """AutoRound's symmetric convention: s = +-absmax / |qmin|, so that the larger extreme has the code qmin."""
    if not spec.symmetric:
        yield _ranged(lo, hi, spec)
        return
    absmax = torch.maximum(-lo, hi)
    yield torch.where(hi > -lo, -absmax, absmax) / -spec.qmin, None


def _union(lo: Tensor, hi: Tensor, spec: Spec) -> Iterator[tuple[Tensor, Tensor | None]]:
    yield from _shrunken(lo, hi, spec)
    if spec.symmetric:
        for p in (1.0, *SHRINK):
            for s, z in _signed_range(lo, hi, spec):
                yield s * p, z


minmax = Grid("minmax", _whole)
mse = Grid("mse", _shrunken)
weighted_mse = Grid("weighted_mse", _shrunken, weighted=True)
signed = Grid("signed", _signed_range)
weighted = Grid("weighted", _union, weighted=True)
GRIDS = {g.name: g for g in (minmax, mse, weighted_mse, signed, weighted)}
