"""imatrix: a shrunken range for every group, chosen by errors that the importance of input channels
weighs, E[x^2] as llama.cpp's imatrix holds it (Kawrakow 2024).

    min over p of sum_j h_j |w_j - w'_j(p)|^3,   p = 1, 0.95, ..., 0.1,   h_j = E[x_j^2] / mean

The objective and the ranges are llm-compressor's (`imatrix_mse`), which looks no further where five
shares in a row are no better; here all of them are looked at.

Legend: x_agn the tiles of a weight, h_agn the importance, s_ag, z_ag scales and zeros.
"""

import torch
from torch import Tensor

from qlab.algebra.grid import Grid, minmax, stored
from qlab.algebra.qtensor import steps
from qlab.algebra.spec import Spec

SHARES = [1 - i / 20 for i in range(19)]  # of the range
NORM = 3.0


def cubic(
    x_agn: Tensor, s_ag: Tensor, z_ag: Tensor | None, spec: Spec, h_agn: Tensor | None
) -> Tensor:
    """sum_j h_j |x_j - s (codes_j - z)|^3 of every tile [a, g]."""
    s = s_ag.float()[..., None]
    z = 0.0 if z_ag is None else z_ag.float()[..., None]
    codes = spec.nearest_(x_agn / s + z)
    d_agn = ((codes - z) * s - x_agn).abs() ** NORM
    return (d_agn if h_agn is None else d_agn * h_agn).sum(-1)


def search(
    x_agn: Tensor, h_agn: Tensor | None, spec: Spec, outer: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The scales, as they are stored, and zeros of the best share of every tile's range."""
    lo, hi = x_agn.amin(-1).clamp_max(0), x_agn.amax(-1).clamp_min(0)
    best: tuple[Tensor, Tensor | None] | None = None
    least = torch.full_like(lo, torch.inf)
    for share in SHARES:
        for wide, z_ag in minmax.candidates(lo * share, hi * share, spec):
            s_ag = stored(wide, spec, outer)
            e_ag = cubic(x_agn, steps(s_ag, outer, torch.float32), z_ag, spec, h_agn)
            better = e_ag < least
            best = (s_ag, z_ag) if best is None else _where(better, (s_ag, z_ag), best)
            least = torch.where(better, e_ag, least)
    assert best is not None  # the whole range is a candidate
    return best


def _where(
    better: Tensor, one: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    bits = one[0].view(torch.uint8), other[0].view(torch.uint8)
    if one[0].itemsize == 1:  # torch.where takes no 8-bit floats
        s_ag = torch.where(better, *bits).view(one[0].dtype)
    else:
        s_ag = torch.where(better, one[0], other[0])
    if one[1] is None or other[1] is None:
        return s_ag, None
    return s_ag, torch.where(better, one[1], other[1])


imatrix = Grid("imatrix", minmax.candidates, weighted=True, search=search)
