"""Steps on one matrix [k, k] in its own memory: a second moment of 28,672 channels has 3.3 GB, and
a copy of it as many.

Legend: H_kk a contiguous matrix that belongs to the caller.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Gives a matrix [k, k] that nobody else has at every call, with the same numbers.
Fresh = Callable[[], Tensor]
STRIP = 1 << 22  # numbers that are moved at once


def permuted_(H_kk: Tensor, order: Tensor) -> Tensor:
    """H[order][:, order]."""
    rows = max(1, STRIP // len(H_kk))
    for strip in H_kk.split(rows):
        strip.copy_(strip.index_select(1, order))
    for strip in H_kk.split(rows, 1):
        strip.copy_(strip.index_select(0, order))
    return H_kk


def backwards_(H_kk: Tensor) -> Tensor:
    """H read backwards, from its last row and column to its first."""
    flat, count = H_kk.view(-1), H_kk.numel()
    for start in range(0, count // 2, STRIP):
        stop = min(start + STRIP, count // 2)
        front, back = flat[start:stop], flat[count - stop : count - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
    return H_kk


def lower_mirrored_(H_kk: Tensor) -> Tensor:
    """H with its lower triangle in the place of the upper one, too."""
    k = len(H_kk)
    size = max(1, min(k, STRIP // k))
    for i in range(0, k, size):
        tile, beyond = H_kk[i : i + size, i : i + size], i + size
        tile.copy_(tile.tril() + tile.tril(-1).T)
        H_kk[i:beyond, beyond:] = H_kk[beyond:, i:beyond].T
    return H_kk


def is_finite(x: Tensor) -> bool:
    """Whether all numbers are finite. Their sum is the cheaper question."""
    return bool(x.sum().isfinite() or torch.isfinite(x).all())
