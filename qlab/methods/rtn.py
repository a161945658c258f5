"""RTN: round to nearest on a grid."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qlab.algebra.operations import Operations
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Spec
from qlab.algebra.transform import Transform, costing, each_weight
from qlab.methods.grid import Grid, encode, encode_rows, minmax


def rtn(spec: Spec, grid: Grid = minmax) -> Transform:
    """Round to nearest: codes = round(W / s + z).

    Args:
        spec: the number grid to round to, or its name such as "int4-g64".
        grid: how scales s and zero points z are chosen (see GRIDS). The default, minmax, gives the
            scales, zero points and codes of compressed-tensors' quantizer. A weighted grid needs
            calibration data; with it the output error of no row is above that of minmax.

    Returns:
        A transform of one stage.

    Example:
        >>> import qlab
        >>> (stage,) = qlab.rtn("int4-g64")
        >>> stage.name, str(stage.spec), stage.detail, sorted(stage.needs)
        ('rtn', 'int4-g64', 'grid minmax', [])
    """

    def fn(W_ok: Tensor, stats: Mapping[str, Any], spec: Spec) -> tuple[QTensor, Mapping[str, Any]]:
        outer = stats.get("outer")
        note = {"grid": grid.name}
        if not grid.weighted:
            return encode(grid, W_ok, spec, outer=outer), note
        moment = stats["second_moment"]
        q, _ = encode_rows(grid, W_ok, spec, moment.mean_square_k, moment.output_errors, outer)
        return q, note

    stages = each_weight("rtn", fn, spec, grid.needs, f"grid {grid.name}")
    # errors of both grids' rows by the second moment, and the loss
    return costing(stages, Operations(rows=7 if grid.weighted else 0))
