"""RTN: round to nearest on a grid."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Spec
from qlab.algebra.transform import Transform, each_weight
from qlab.methods.grid import Grid, encode, encode_rows, minmax


def rtn(spec: Spec, grid: Grid = minmax) -> Transform:
    """codes = round(W / s + z) for every selected weight; no data unless the grid weighs its
    errors.

    The default grid gives the scales, zero points and codes of compressed-tensors' quantizer,
    computed in fp32. With a grid that weighs errors no row's output error on the calibration data
    is above that of the default grid.
    """

    def fn(W_ok: Tensor, stats: Mapping[str, Any], spec: Spec) -> tuple[QTensor, Mapping[str, Any]]:
        outer, note = stats.get("outer"), {"grid": grid.name}
        if not grid.weighted:
            return encode(grid, W_ok, spec, outer=outer), note
        moment = stats["second_moment"]
        q, _ = encode_rows(grid, W_ok, spec, moment.mean_square_k, moment.output_errors, outer)
        return q, note

    return each_weight("rtn", fn, spec, grid.needs, f"grid {grid.name}")
