"""Block scales of NVFP4 and MXFP4 that are chosen, not computed from the largest number alone.

Codes of e2m1 lie apart by 2 at the upper end (4 and 6) and by 0.5 at the lower one, so that a
larger scale, which leaves the upper end unused, often costs less.

Legend: lo_ag, hi_ag the range of a tile; a ratio is that of a scale to the plain one, absmax / 6.
Sources: four_six is Cook et al. 2025 (Four Over Six, arXiv 2512.02010), the sweep ScaleSweep
(arXiv 2606.07618). The sweep is bounded: where absmax < 3.5 s every number rounds to at most 3, and
half the scale has all these values and more, so that no ratio above 6 / 3.5 is of use. The plain
scale of MXFP4 is the largest power of two within that bound, so that only smaller ones are left.
Below LOWEST the largest numbers of a tile are cut to under half.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qlab.algebra.grid import Candidates, Grid, minmax
from qlab.algebra.spec import Float, Spec

LOWEST = 0.5
# An e4m3 scale is at least 6.25 % from the next.
STEP = 1.06


def _scaled(finer: Sequence[float], powers_of_two: Sequence[float]) -> Candidates:
    """The plain scale and its products with ratios, which are others where scales are powers of
    two. Integers have the plain scale alone."""

    def candidates(lo: Tensor, hi: Tensor, spec: Spec) -> Iterator[tuple[Tensor, Tensor | None]]:
        ((plain, zeros),) = minmax.candidates(lo, hi, spec)
        yield plain.float(), zeros
        if isinstance(spec, Float):
            mx = spec.scale_dtype == torch.float8_e8m0fnu
            for ratio in powers_of_two if mx else finer:
                yield plain.float() * ratio, None

    return candidates


def bounded(largest: float) -> tuple[float, ...]:
    """Ratios from LOWEST to `largest`, no further apart than STEP."""
    ratios = [LOWEST]
    while ratios[-1] * STEP < largest:
        ratios.append(ratios[-1] * STEP)
    return (*ratios, largest)


four_six = Grid("four_six", _scaled((6 / 4,), ()))
scale_sweep = Grid("scale_sweep", _scaled(bounded(6 / 3.5), (0.5,)), weighted=True)
