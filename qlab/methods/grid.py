"""The grids that methods choose from: how scales and zero points of a tile are found.

`GRIDS` holds them by name. Each tries candidates and takes
the one with the least sum_j h_j (x_j - q_j)^2 over a tile, where h weighs the input channels by
their second moment in a weighted grid, and is 1 otherwise.

    minmax: the whole range, as in compressed-tensors. The default of rtn.
    mse: the range and the same shrunken in steps of 5 % to half.
    weighted_mse: the same, weighted.
    signed: AutoRound's symmetric scale, whose sign gives the larger extreme the lowest code.
    weighted: ranges in steps of 10 %, also signed ones, each with the scale that suits its codes
        best; weighted. The default of gptq and awq.
    neuqi: scale and integer zero point searched together, the best zero point of a scale exactly;
        weighted (qlab.methods.neuqi).
    imatrix: the range and the same shrunken in steps of 5 % to a tenth, by cubes of errors that
        are weighted; weighted (qlab.methods.imatrix).
    four_six: of NVFP4, each block's largest number becomes 6 or 4 (qlab.methods.scale_sweep).
    scale_sweep: of NVFP4 and MXFP4, every scale of a block that may be best; weighted.

Example:
    >>> import qlab
    >>> list(qlab.GRIDS)
    ['minmax', 'mse', 'weighted_mse', 'signed', 'weighted', 'neuqi', 'imatrix', ...]
    >>> qlab.rtn("int4-g64", "mse")[0].detail
    'grid mse'
"""

from qlab.algebra.grid import (
    CHUNK,
    Grid,
    encode,
    encode_rows,
    fit,
    least_rows,
    minmax,
    mse,
    signed,
    stored,
    weighted,
    weighted_mse,
)
from qlab.methods.imatrix import imatrix
from qlab.methods.neuqi import neuqi
from qlab.methods.scale_sweep import four_six, scale_sweep

GRIDS = {
    grid.name: grid
    for grid in (minmax, mse, weighted_mse, signed, weighted, neuqi, imatrix, four_six, scale_sweep)
}

__all__ = [
    "CHUNK",
    "GRIDS",
    "Grid",
    "encode",
    "encode_rows",
    "fit",
    "four_six",
    "imatrix",
    "least_rows",
    "minmax",
    "mse",
    "neuqi",
    "scale_sweep",
    "signed",
    "stored",
    "weighted",
    "weighted_mse",
]
