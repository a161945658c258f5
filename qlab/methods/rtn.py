"""RTN: round to nearest on a grid."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qlab.methods.grid import Grid, encode, minmax
from qlab.qtensor import QTensor
from qlab.spec import Spec
from qlab.transform import Transform, each_weight


def rtn(spec: Spec, grid: Grid = minmax) -> Transform:
    """codes = round(W / s + z) for every selected weight; no data unless the grid weighs its errors.

    The default grid gives the scales, zero points and codes of compressed-tensors' quantizer, computed in fp32.
    """

    def fn(W_ok: Tensor, stats: Mapping[str, Any], spec: Spec) -> tuple[QTensor, Mapping[str, Any]]:
        moment = stats.get("second_moment")
        h_k = None if moment is None else moment.mean_square_k
        return encode(grid, W_ok, spec, h_k, stats.get("outer")), {"grid": grid.name}

    return each_weight("rtn", fn, spec, grid.needs, f"grid {grid.name}")
