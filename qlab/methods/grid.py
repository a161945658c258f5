"""The grids that methods choose from, and what they do with one (qlab.algebra.grid)."""

from qlab.algebra.grid import (
    CHUNK,
    GRIDS,
    Grid,
    encode,
    encode_rows,
    fit,
    minmax,
    mse,
    signed,
    stored,
    weighted,
    weighted_mse,
)

__all__ = [
    "CHUNK",
    "GRIDS",
    "Grid",
    "encode",
    "encode_rows",
    "fit",
    "minmax",
    "mse",
    "signed",
    "stored",
    "weighted",
    "weighted_mse",
]
