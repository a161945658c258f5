"""Random quantized weights, whose products are timed."""

import torch
from torch import Tensor

from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import Int, Tile


def random_weight(
    n: int, k: int, group: int, zeros: bool, device: torch.device, seed: int = 0
) -> QTensor:
    """The int4 weight [n, k] that belongs to a seed; its entries are of the size that a trained
    layer's are.

    group: codes per scale. zeros: whether it has zero points, which are whole numbers in fp32.
    """
    g = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(-8, 8, (n, k), generator=g, dtype=torch.int8, device=device)
    uniform = torch.rand(n, k // group, generator=g, dtype=torch.float32, device=device)
    scales = uniform * 0.02 / k**0.5 + 0.01 / k**0.5
    offsets = None
    if zeros:
        offsets = torch.randint(-8, 8, scales.shape, generator=g, device=device).float()
    spec = Int(4, Tile(1, group), symmetric=not zeros, zero_dtype=torch.float32)
    return QTensor(codes, scales, offsets, spec)


def rounded_once(leaf: QTensor, dtype: torch.dtype) -> Tensor:
    """(codes - zeros) * scales [n, k], computed in fp32 and rounded to `dtype`."""
    return dense(leaf, torch.float32).to(dtype)
