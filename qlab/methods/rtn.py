"""RTN: round to nearest on a grid."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qlab.algebra.nearest import round_weight
from qlab.algebra.operations import Operations
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Spec
from qlab.algebra.transform import Transform, costing, each_row, each_weight
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

    note, detail = {"grid": grid.name}, f"grid {grid.name}"

    def by_range(W_ok: Tensor, stats: Mapping[str, Any], spec: Spec) -> tuple[QTensor, dict]:
        return encode(grid, W_ok, spec, outer=stats.get("outer")), note

    def by_moment(W_ok: Tensor, stats: Mapping[str, Any], spec: Spec) -> tuple[QTensor, dict]:
        moment, outer = stats["second_moment"], stats.get("outer")
        q, _ = encode_rows(grid, W_ok, spec, moment.mean_square_k, moment.output_errors, outer)
        return q, note

    if not grid.weighted:
        fused = round_weight if grid is minmax else None
        return costing(each_row("rtn", by_range, spec, detail, note, fused), Operations(rows=0))
    # errors of both grids' rows by the second moment, and the loss
    return costing(each_weight("rtn", by_moment, spec, grid.needs, detail), Operations(rows=7))
