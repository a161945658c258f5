"""Which scales and zero points: a set of candidate grids per tile, and the objective that picks one
of them.

Legend: W_ok weight [o, k] in fp32; x_agn its tiles [a, g, n] (`Tile.split`); s_ag, z_ag scales and
zeros;
h_k what an error of each input channel weighs, the diagonal of the mean second moment; e_ag the
objective of every tile.
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
CHUNK = 1 << 18  # numbers searched at once: few enough to stay in cache over all candidates


@dataclass(frozen=True)
class Grid:
    """candidates(lo_ag, hi_ag, spec) yields (scales, zeros); every tile takes the one with the
    least sum_j h_j (x_j - q_j)^2, where h is h_k when `weighted` and 1 otherwise. lo <= 0 <= hi are
    the tile's range.

    refit: each candidate is also tried with the scale that suits its codes best,
    s = sum_j h_j x_j c_j / sum_j h_j c_j^2 with c = codes - zeros, and so is the best of them all
    once more.
    """

    name: str
    candidates: Candidates
    weighted: bool = False
    refit: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"second_moment"} if self.weighted else ())


def fit(
    grid: Grid, W_ok: Tensor, spec: Spec, h_k: Tensor | None = None, outer: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The best candidate of every tile: scales [a, g] in their stored dtype, zeros int8 [a, g] or
    None if symmetric.

    outer: what the scales are relative to, where the spec has such a scale (see
    qtensor.shared_outer).
    """
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
    made = list(grid.candidates(lo, hi, spec))
    scales, zeros = (
        stored(torch.stack([s for s, _ in made]), spec, outer),
        _stacked([z for _, z in made]),
    )
    first = scales[0], None if zeros is None else zeros[0]
    if len(made) == 1 and not grid.refit:
        return first
    best = _best(grid, x_agn, scales, zeros, spec, h_agn, outer)
    if grid.refit:
        best = _best(
            grid,
            x_agn,
            best[0][None],
            None if best[1] is None else best[1][None],
            spec,
            h_agn,
            outer,
        )
    # the sums in there cancel; never hand out anything worse than the first candidate by the plain
    # formula
    error = lambda s, z: objective(x_agn, steps(s, outer, torch.float32), z, spec, h_agn)
    worse = error(*first) < error(*best)
    zeros_ag = (
        None if first[1] is None or best[1] is None else torch.where(worse, first[1], best[1])
    )
    return torch.where(worse, first[0], best[0]), zeros_ag


def _best(
    grid: Grid,
    x_agn: Tensor,
    scales_cag: Tensor,
    zeros_cag: Tensor | None,
    spec: Spec,
    h_agn: Tensor | None,
    outer: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Of the candidates [c, a, g], and of each refitted if the grid does, the one with the least
    objective per tile.

    sum h (x - s c)^2 = sum h x^2 - 2 s B + s^2 A with A = sum h c^2, B = sum h x c: the codes are
    needed once for both scales, and what does not depend on the candidate is left out.
    """
    hx, codes, product = (
        x_agn if h_agn is None else x_agn * h_agn,
        torch.empty_like(x_agn),
        torch.empty_like(x_agn),
    )
    A, B = (
        scales_cag.new_empty(scales_cag.shape, dtype=torch.float32),
        scales_cag.new_empty(scales_cag.shape, dtype=torch.float32),
    )
    for i, s in enumerate(scales_cag):
        c = _centred(
            x_agn,
            steps(s, outer, torch.float32),
            None if zeros_cag is None else zeros_cag[i],
            spec,
            out=codes,
        )
        torch.sum(torch.mul(c, hx, out=product), -1, out=B[i])
        torch.sum(
            torch.mul(c, c if h_agn is None else h_agn, out=product).mul_(
                1 if h_agn is None else c
            ),
            -1,
            out=A[i],
        )
    tried = torch.stack(
        [scales_cag, stored(B / A, spec, outer)] if grid.refit else [scales_cag], 1
    )  # [c, 1 or 2, a, g]
    wide = steps(tried, outer, torch.float32)
    e = (wide * A[:, None]).sub_(B[:, None], alpha=2).mul_(wide)
    e.masked_fill_(
        ~(A > 0)[:, None] | e.isnan(), torch.inf
    )  # a tile of zeros keeps the first candidate
    which = e.flatten(0, 1).min(0, keepdim=True).indices  # argmin takes six times as long
    return _chosen(tried.flatten(0, 1), which), None if zeros_cag is None else _chosen(
        zeros_cag, which // tried.shape[1]
    )


def _chosen(x_cag: Tensor, which: Tensor) -> Tensor:
    """x[which[0, a, g], a, g]."""
    bits = (
        x_cag.view(torch.uint8) if x_cag.itemsize == 1 else x_cag
    )  # torch gathers no 8-bit floats
    return bits.gather(0, which)[0].view(x_cag.dtype)


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    return torch.stack([p for p in parts if p is not None]) if parts[0] is not None else None


def _centred(
    x_agn: Tensor, s_ag: Tensor, z_ag: Tensor | None, spec: Spec, out: Tensor | None = None
) -> Tensor:
    """codes - zeros, as floats."""
    c = torch.div(x_agn, s_ag.float()[..., None], out=out)
    if z_ag is None:
        return spec.nearest_(c)
    z = z_ag.float()[..., None]
    return spec.nearest_(c.add_(z)).sub_(z)


def objective(
    x_agn: Tensor, s_ag: Tensor, z_ag: Tensor | None, spec: Spec, h_agn: Tensor | None = None
) -> Tensor:
    """sum_j h_j (x_j - s (codes_j - z))^2 of every tile [a, g]; h = 1 where it is None. s: see
    qtensor.steps."""
    d = _centred(x_agn, s_ag, z_ag, spec).mul_(s_ag.float()[..., None]).sub_(x_agn)
    return torch.linalg.vecdot(d, d if h_agn is None else d * h_agn)


def stored(s_ag: Tensor, spec: Spec, outer: Tensor | None) -> Tensor:
    """Scales as the file will hold them: times outer, rounded to their dtype, zeros replaced by its
    epsilon (compressed-tensors)."""
    assert spec.scale_dtype is not None  # `fit` settles it
    limits = torch.finfo(spec.scale_dtype)
    wide = s_ag if outer is None else outer[..., None] * s_ag
    if (
        spec.scale_dtype.itemsize == 1
    ):  # what 8 bits cannot hold saturates; wider dtypes hold every scale of a weight
        wide = wide.float().clamp(-limits.max if limits.min < 0 else limits.tiny, limits.max)
    s = wide.to(spec.scale_dtype)
    unusable = (s.float() == 0) | s.isnan()  # torch takes the smallest e8m0 for a zero
    return torch.where(unusable, s.new_full((), limits.eps), s)


def encode(
    grid: Grid, W_ok: Tensor, spec: Spec, h_k: Tensor | None = None, outer: Tensor | None = None
) -> QTensor:
    """round(W / s + z) on the fitted grid. outer: shared with other weights (see
    qtensor.shared_outer), or W's own."""
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
    """encode, but on `minmax` in those rows (with all that share their scales) whose output error
    is less there, and every row's output error [o]. errors(D_ok) -> [o]: the output error of a
    weight error, d H d^T.

    A weighted grid sees the diagonal of H alone. Where inputs have a direction in common, such as a
    mean that is not 0, errors add up along it, those of a shrunken range more than others.
    """
    q = encode(grid, W_ok, spec, h_k, outer)
    e_o = errors(dense(q, torch.float32).sub_(W_ok))
    if not grid.weighted:
        return q, e_o
    plain = encode(minmax, W_ok, spec, outer=q.outer)
    plain_o = errors(dense(plain, torch.float32).sub_(W_ok))
    rows = spec.tile.sizes(W_ok.shape)[0]
    tile_o = torch.arange(len(W_ok), device=e_o.device) // rows
    gain_a = F.pad(e_o - plain_o, (0, len(q.scales) * rows - len(W_ok))).view(-1, rows).sum(1)
    better_o = (gain_a > 0)[tile_o]
    zeros = (
        None if q.zeros is None or plain.zeros is None else _rows(gain_a > 0, plain.zeros, q.zeros)
    )
    codes, scales = _rows(better_o, plain.codes, q.codes), _rows(gain_a > 0, plain.scales, q.scales)
    return QTensor(codes, scales, zeros, q.spec, q.outer), torch.where(better_o, plain_o, e_o)


def _rows(first_a: Tensor, x_an: Tensor, y_an: Tensor) -> Tensor:
    """Rows of x where `first`, else of y."""
    x, y = (
        t.view(torch.uint8) if t.itemsize == 1 else t for t in (x_an, y_an)
    )  # torch chooses among no 8-bit floats
    return torch.where(first_a[:, None], x, y).view(x_an.dtype)


# ------------------------------------------------------------------ candidates
def _ranged(lo: Tensor, hi: Tensor, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """The grid of compressed-tensors: s = absmax / reach, or s = (hi - lo) / (qmax - qmin) with z =
    qmin - lo / s rounded half to even."""
    if isinstance(spec, Float) and spec.scale_dtype == torch.float8_e8m0fnu:
        return _power_of_two(torch.maximum(-lo, hi), spec), None
    if isinstance(spec, Float) or spec.symmetric:
        return torch.maximum(-lo, hi) / spec.reach, None
    s = (hi - lo) / (spec.qmax - spec.qmin)
    assert spec.scale_dtype is not None
    stored = s.to(spec.scale_dtype).float()
    z = (spec.qmin - lo / stored).nan_to_num_(0).clamp_(spec.qmin, spec.qmax).round_()
    return s, z.to(spec.zero_dtype)


def _power_of_two(absmax: Tensor, spec: Float) -> Tensor:
    """OCP MX: the exponent of absmax, rounded up where the mantissa is close to 2, less that of the
    largest code.

    "Close" is half a step of the code's mantissa: 1.75 for fp4, 1.9375 for fp6. fp8 ends at 1.75 *
    2^8 and has the former too. What lies above the largest code then saturates. Source:
    compressed-tensors 0.20.
    """
    rounded_to = 3 if spec.bits == 6 else 1  # bits of mantissa
    exponents = (
        absmax.float().view(torch.int32) + (1 << (22 - rounded_to))
    ) >> 23  # biased by 127, as e8m0 is
    largest = math.frexp(spec.max)[1] - 1
    return (exponents - largest).clamp_(0, 254).to(torch.uint8).view(torch.float8_e8m0fnu)


def _whole(lo: Tensor, hi: Tensor, spec: Spec) -> Iterator[tuple[Tensor, Tensor | None]]:
    yield _ranged(lo, hi, spec)


def _shrunken(ratios: Sequence[float]) -> Candidates:
    """The whole range and the same shrunken to each ratio: both ends, and one end where there is a
    zero point."""

    def candidates(lo: Tensor, hi: Tensor, spec: Spec) -> Iterator[tuple[Tensor, Tensor | None]]:
        yield _ranged(lo, hi, spec)
        for p in ratios:
            yield _ranged(lo * p, hi * p, spec)
            if not spec.symmetric:  # outliers mostly sit at one end
                yield _ranged(lo * p, hi, spec)
                yield _ranged(lo, hi * p, spec)

    return candidates


def _signed_range(ratios: Sequence[float]) -> Candidates:
    """AutoRound's symmetric convention: s = +-absmax / |qmin|, so that the larger extreme has the
    code qmin."""

    def candidates(lo: Tensor, hi: Tensor, spec: Spec) -> Iterator[tuple[Tensor, Tensor | None]]:
        if isinstance(spec, Float):  # as many codes on either side of zero
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
GRIDS = {g.name: g for g in (minmax, mse, weighted_mse, signed, weighted)}
