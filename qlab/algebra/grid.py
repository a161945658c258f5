"""Scales and zero points: a set of candidates per tile, and the objective that picks one of them.

Legend: W_ok weight [o, k] in fp32; x_agn its tiles [a, g] of n numbers (`Tile.split`); s_ag, z_ag
scales and zeros; h_k what an error in each input channel weighs, the diagonal of the mean second
moment; e_ag the objective of every tile; _cag with an axis of c candidates.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.algebra.qtensor import QTensor, dense, round_codes, shared_outer, steps
from qlab.algebra.spec import Float, Spec, with_scale_dtype
from qlab.errors import QlabError

Candidates = Callable[[Tensor, Tensor, Spec], Iterator[tuple[Tensor, Tensor | None]]]
# (x_agn, h_agn or None, spec, outer) -> scales as they are stored, and zeros
Search = Callable[[Tensor, Tensor | None, Spec, Tensor | None], tuple[Tensor, Tensor | None]]
CHUNK = 1 << 18  # numbers searched at once, few enough to stay in cache over all candidates


@dataclass(frozen=True)
class Grid:
    """Of its candidates every tile takes the one with the least sum_j h_j (x_j - q_j)^2.

    candidates(lo_ag, hi_ag, spec) yields (scales, zeros) for tiles whose range is lo <= 0 <= hi.
    weighted: h is h_k; otherwise it is 1. refit: each candidate is also tried with the scale that
    suits its codes best, s = sum_j h_j x_j c_j / sum_j h_j c_j^2 with c = codes - zeros, and the
    best of all is refitted once more. search: looks at the numbers of a tile themselves, and takes
    the place of all candidates but the first.
    """

    name: str
    candidates: Candidates
    weighted: bool = False
    refit: bool = False
    search: Search | None = None

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that the objective reads."""
        return frozenset({"second_moment"} if self.weighted else ())


def fit(
    grid: Grid, W_ok: Tensor, spec: Spec, h_k: Tensor | None = None, outer: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The best candidate of every tile: scales [a, g] in their stored dtype, and zeros [a, g], or
    None for a symmetric spec. outer: what scales are relative to, where the spec has such a scale
    (`qtensor.shared_outer`)."""
    spec = with_scale_dtype(spec, torch.float32)
    if grid.weighted and h_k is None:
        raise QlabError(
            f"the grid {grid.name!r} weighs errors by the second moment, which was not observed"
        )
    spec.tile.check(W_ok.shape)
    x_agn = spec.tile.split(W_ok)
    h_agn = None
    if grid.weighted and h_k is not None:
        h_agn = spec.tile.split(h_k.expand(spec.tile.sizes(W_ok.shape)[0], -1))
    rows = max(1, CHUNK // x_agn[0].numel())
    parts = [_fit_rows(grid, x, spec, h_agn, outer) for x in x_agn.split(rows)]
    scales = torch.cat([s for s, _ in parts])
    return scales, None if spec.symmetric else torch.cat([z for _, z in parts if z is not None])


def _fit_rows(
    grid: Grid, x_agn: Tensor, spec: Spec, h_agn: Tensor | None, outer: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    lo, hi = x_agn.amin(-1).clamp_max(0), x_agn.amax(-1).clamp_min(0)
    candidates = list(grid.candidates(lo, hi, spec))
    scales = stored(torch.stack([s for s, _ in candidates]), spec, outer)
    zeros = _stacked([z for _, z in candidates])
    first = scales[0], None if zeros is None else zeros[0]
    if grid.search:
        best = grid.search(x_agn, h_agn, spec, outer)
    elif len(candidates) == 1 and not grid.refit:
        return first
    else:
        best = _best(grid, x_agn, scales, zeros, spec, h_agn, outer)
    if grid.refit:
        best_scales, best_zeros = best[0][None], None if best[1] is None else best[1][None]
        best = _best(grid, x_agn, best_scales, best_zeros, spec, h_agn, outer)
    # The sums in _best cancel. By the plain formula nothing may be worse than the first candidate.
    error = lambda s, z: objective(x_agn, steps(s, outer, torch.float32), z, spec, h_agn)
    worse = error(*first) < error(*best)
    scales_ag = torch.where(worse, first[0], best[0])
    if first[1] is None or best[1] is None:
        return scales_ag, None
    return scales_ag, torch.where(worse, first[1], best[1])


def _best(
    grid: Grid,
    x_agn: Tensor,
    scales_cag: Tensor,
    zeros_cag: Tensor | None,
    spec: Spec,
    h_agn: Tensor | None,
    outer: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Of the candidates, and of each refitted if the grid refits, the one with the least objective
    in every tile.

    sum h (x - s c)^2 = sum h x^2 - 2 s B + s^2 A with A = sum h c^2 and B = sum h x c. So the codes
    c are computed once for both scales. The first term is the same for all candidates.
    """
    A, B = _sums(x_agn, scales_cag, zeros_cag, spec, h_agn, outer)
    scales = [scales_cag, stored(B / A, spec, outer)] if grid.refit else [scales_cag]
    tried = torch.stack(scales, 1)  # [c, 1 or 2, a, g]
    wide = steps(tried, outer, torch.float32)
    e = (wide * A[:, None]).sub_(B[:, None], alpha=2).mul_(wide)
    e.masked_fill_(~(A > 0)[:, None] | e.isnan(), torch.inf)  # tiles of zeros: the first candidate
    which = e.flatten(0, 1).min(0, keepdim=True).indices  # argmin takes six times as long
    zeros = None if zeros_cag is None else _chosen(zeros_cag, which // tried.shape[1])
    return _chosen(tried.flatten(0, 1), which), zeros


def _sums(
    x_agn: Tensor,
    scales_cag: Tensor,
    zeros_cag: Tensor | None,
    spec: Spec,
    h_agn: Tensor | None,
    outer: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A = sum h c^2 and B = sum h x c of every candidate and tile [c, a, g], c = codes - zeros."""
    hx = x_agn if h_agn is None else x_agn * h_agn
    codes, product = torch.empty_like(x_agn), torch.empty_like(x_agn)
    A = scales_cag.new_empty(scales_cag.shape, dtype=torch.float32)
    B = torch.empty_like(A)
    for i, s in enumerate(scales_cag):
        z = None if zeros_cag is None else zeros_cag[i]
        c = _centred(x_agn, steps(s, outer, torch.float32), z, spec, out=codes)
        torch.sum(torch.mul(c, hx, out=product), -1, out=B[i])
        hc = torch.mul(c, c if h_agn is None else h_agn, out=product)
        torch.sum(hc if h_agn is None else hc.mul_(c), -1, out=A[i])
    return A, B


def _chosen(x_cag: Tensor, which: Tensor) -> Tensor:
    """x[which[0, a, g], a, g]."""
    bits = x_cag.view(torch.uint8) if x_cag.itemsize == 1 else x_cag  # torch gathers no fp8
    return bits.gather(0, which)[0].view(x_cag.dtype)


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    return torch.stack([p for p in parts if p is not None]) if parts[0] is not None else None


def _centred(
    x_agn: Tensor, s_ag: Tensor, z_ag: Tensor | None, spec: Spec, out: Tensor | None = None
) -> Tensor:
    """codes - zeros, in floating point."""
    c = torch.div(x_agn, s_ag.float()[..., None], out=out)
    if z_ag is None:
        return spec.nearest_(c)
    z = z_ag.float()[..., None]
    return spec.nearest_(c.add_(z)).sub_(z)


def objective(
    x_agn: Tensor, s_ag: Tensor, z_ag: Tensor | None, spec: Spec, h_agn: Tensor | None = None
) -> Tensor:
    """sum_j h_j (x_j - s (codes_j - z))^2 of every tile [a, g], where h is 1 if it is None. s: what
    `qtensor.steps` gives."""
    d = _centred(x_agn, s_ag, z_ag, spec).mul_(s_ag.float()[..., None]).sub_(x_agn)
    return torch.linalg.vecdot(d, d if h_agn is None else d * h_agn)


def stored(s_ag: Tensor, spec: Spec, outer: Tensor | None) -> Tensor:
    """Scales as the file will hold them: times outer, and rounded to their dtype. Zeros become the
    dtype's epsilon, as in compressed-tensors."""
    assert spec.scale_dtype is not None  # `fit` fills it in
    limits = torch.finfo(spec.scale_dtype)
    wide = s_ag if outer is None else outer[..., None] * s_ag
    if spec.scale_dtype.itemsize == 1:
        # 8 bits saturate. Wider dtypes hold every scale of a weight.
        least = -limits.max if limits.min < 0 else limits.tiny
        wide = wide.float().clamp(least, limits.max)
    s = wide.to(spec.scale_dtype)
    unusable = (s.float() == 0) | s.isnan()  # torch takes the smallest e8m0 for a zero
    return torch.where(unusable, s.new_full((), limits.eps), s)


def encode(
    grid: Grid, W_ok: Tensor, spec: Spec, h_k: Tensor | None = None, outer: Tensor | None = None
) -> QTensor:
    """round(W / s + z) with the fitted scales and zeros. outer: the global scale that W shares with
    other weights (`qtensor.shared_outer`); None computes W's own."""
    outer = shared_outer([W_ok], spec) if outer is None else outer
    scales, zeros = fit(grid, W_ok, spec, h_k, outer)
    return QTensor(round_codes(W_ok, scales, zeros, spec, outer), scales, zeros, spec, outer)


def encode_rows(
    grid: Grid,
    W_ok: Tensor,
    spec: Spec,
    h_k: Tensor,
    errors: Callable[[Tensor], Tensor],
    outer: Tensor | None = None,
) -> tuple[QTensor, Tensor]:
    """`encode`, but with the scales of `minmax` in rows where their output error is less. Rows that
    share scales change together.

    errors(D_ok) -> [o]: the output errors d H d^T of a weight error D. Returns the leaf, and the
    output error of every row [o].

    A weighted grid sees the diagonal of H alone. Where inputs have a direction in common, such as a
    mean that is not 0, errors add up along it, those of a shrunken range more than others.
    """
    q = encode(grid, W_ok, spec, h_k, outer)
    e_o = errors(dense(q, torch.float32).sub_(W_ok))
    if not grid.weighted:
        return q, e_o
    plain = encode(minmax, W_ok, spec, outer=q.outer)
    plain_o = errors(dense(plain, torch.float32).sub_(W_ok))
    return least_rows(q, e_o, plain, plain_o)


def least_rows(q: QTensor, e_o: Tensor, other: QTensor, other_o: Tensor) -> tuple[QTensor, Tensor]:
    """Of two leaves of one grid the rows with the smaller error, and those errors [o]. Rows that
    share scales go together, by the sum of their errors; q keeps those that are equal."""
    rows = q.spec.tile.sizes(q.shape)[0]
    tile_o = torch.arange(len(q.codes), device=e_o.device) // rows
    gain_o = F.pad(e_o - other_o, (0, len(q.scales) * rows - len(q.codes)))
    better_a = gain_o.view(-1, rows).sum(1) > 0
    better_o = better_a[tile_o]
    codes = _rows(better_o, other.codes, q.codes)
    scales = _rows(better_a, other.scales, q.scales)
    zeros = None
    if q.zeros is not None and other.zeros is not None:
        zeros = _rows(better_a, other.zeros, q.zeros)
    return QTensor(codes, scales, zeros, q.spec, q.outer), torch.where(better_o, other_o, e_o)


def _rows(first_a: Tensor, x_an: Tensor, y_an: Tensor) -> Tensor:
    """Rows of x where `first`, else of y."""
    # torch.where takes no 8-bit floats
    x, y = (t.view(torch.uint8) if t.itemsize == 1 else t for t in (x_an, y_an))
    return torch.where(first_a[:, None], x, y).view(x_an.dtype)


# ------------------------------------------------------------------ candidates
def _ranged(lo: Tensor, hi: Tensor, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """The scales and zeros of compressed-tensors: s = absmax / reach, or s = (hi - lo) /
    (qmax - qmin) and z = qmin - lo / s, rounded half to even."""
    if isinstance(spec, Float) and spec.scale_dtype == torch.float8_e8m0fnu:
        return _power_of_two(torch.maximum(-lo, hi), spec), None
    if isinstance(spec, Float) or spec.symmetric:
        return torch.maximum(-lo, hi) / spec.reach, None
    s = (hi - lo) / (spec.qmax - spec.qmin)
    assert spec.scale_dtype is not None
    s_stored = s.to(spec.scale_dtype).float()
    z = (spec.qmin - lo / s_stored).nan_to_num_(0).clamp_(spec.qmin, spec.qmax).round_()
    return s, z.to(spec.zero_dtype)


def _power_of_two(absmax: Tensor, spec: Float) -> Tensor:
    """OCP MX: the exponent of absmax less that of the largest code. It is rounded up where the
    mantissa of absmax is within half a step of 2, in steps of the code's mantissa.

    So it is rounded up from 1.75 for fp4 and fp8 and from 1.9375 for fp6. Below that, what lies
    above the largest code saturates. Source: compressed-tensors 0.20.
    """
    rounded_to = 3 if spec.bits == 6 else 1  # bits of mantissa
    # a float's exponent, biased by 127 as e8m0 is
    exponents = (absmax.float().view(torch.int32) + (1 << (22 - rounded_to))) >> 23
    largest = math.frexp(spec.max)[1] - 1
    return (exponents - largest).clamp_(0, 254).to(torch.uint8).view(torch.float8_e8m0fnu)


def _whole(lo: Tensor, hi: Tensor, spec: Spec) -> Iterator[tuple[Tensor, Tensor | None]]:
    yield _ranged(lo, hi, spec)


def _shrunken(ratios: Sequence[float]) -> Candidates:
    """The whole range, and both ends shrunken to each ratio; where there is a zero point, also one
    end alone, since outliers mostly sit at one end."""

    def candidates(lo: Tensor, hi: Tensor, spec: Spec) -> Iterator[tuple[Tensor, Tensor | None]]:
        yield _ranged(lo, hi, spec)
        for p in ratios:
            yield _ranged(lo * p, hi * p, spec)
            if not spec.symmetric:
                yield _ranged(lo * p, hi, spec)
                yield _ranged(lo, hi * p, spec)

    return candidates


def _signed_range(ratios: Sequence[float]) -> Candidates:
    """AutoRound's symmetric convention: s = +-absmax / |qmin|, so that the extreme with the larger
    magnitude gets the code qmin."""

    def candidates(lo: Tensor, hi: Tensor, spec: Spec) -> Iterator[tuple[Tensor, Tensor | None]]:
        if isinstance(spec, Float):  # floats have as many codes above zero as below
            yield from _shrunken(ratios)(lo, hi, spec)
            return
        if not spec.symmetric:  # a range with a zero point uses every code already
            yield _ranged(lo, hi, spec)
            return
        absmax = torch.maximum(-lo, hi)
        for p in ratios:
            yield torch.where(hi > -lo, -absmax, absmax) * p / -spec.qmin, None

    return candidates


def _union(*sets: Candidates) -> Candidates:
    return lambda lo, hi, spec: (candidate for s in sets for candidate in s(lo, hi, spec))


SHRINK = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
COARSE = (0.9, 0.8, 0.7, 0.6, 0.5)  # refitting the scale makes up for the finer steps

minmax = Grid("minmax", _whole)
mse = Grid("mse", _shrunken(SHRINK))
weighted_mse = Grid("weighted_mse", _shrunken(SHRINK), weighted=True)
signed = Grid("signed", _signed_range((1.0,)))
weighted = Grid(
    "weighted", _union(_shrunken(COARSE), _signed_range((1.0, *COARSE))), weighted=True, refit=True
)
