"""Rounding to nearest on a CPU in one pass, by a compiled kernel (`qlab_kernels.nearest`): the same
scales, zero points, codes and errors as `grid.minmax` and `measured.errors_of`, bit for bit."""

import torch
from torch import Tensor

from qlab.algebra.compiled import expect, kernels
from qlab.algebra.measured import Errors, errors_of_sums, rows_at_once
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Spec


def round_weight(W_ok: Tensor, spec: Spec) -> tuple[QTensor, Errors] | None:
    """A weight [o, k] in the dtype of its file as the codes of `grid.minmax`, and their errors.

    None for what the kernel does not round: floats, tiles of several rows, zero points between
    codes, a group that does not divide k, weights elsewhere than on a CPU; and what holds NaN or
    Inf, or overflows, of which torch's way says more.
    """
    if not isinstance(spec, Int) or spec.tile.rows != 1 or spec.zero_dtype != torch.int8:
        return None
    if W_ok.ndim != 2 or not W_ok.numel() or W_ok.shape[1] % spec.tile.sizes(W_ok.shape)[1]:
        return None
    nearest = kernels()
    if nearest is None:
        expect(W_ok.numel())  # as many are rounded by torch
        return None
    if not nearest.takes(W_ok) or spec.scale_dtype not in nearest.DTYPES:
        return None
    rounded = nearest.round_weight(
        W_ok,
        bits=spec.bits,
        group=spec.tile.sizes(W_ok.shape)[1],
        symmetric=spec.symmetric,
        scale_dtype=spec.scale_dtype,
        rows=rows_at_once(W_ok),
    )
    if rounded is None:
        return None
    leaf = QTensor(rounded.codes, rounded.scales, rounded.zeros, spec)
    return leaf, errors_of_sums(rounded.sums)
