"""Products of int8 codes with int8 codes in plain torch, on any device: what the kernels are
checked against, bit for bit in fp32."""

import torch
from torch import Tensor


def product(
    p: Tensor,
    row_scales: Tensor,
    row_zeros: Tensor | None,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    sums: Tensor | None,
) -> Tensor:
    """y [m, n] in fp32 of codes p [m, k] and a weight [c, n, g]: exact sums, each group's scaled
    and added in order, then the rows' scales."""
    y = p.new_zeros(len(p), words.shape[1], dtype=torch.float32)
    for c, part in enumerate(p.split(words.shape[-1], 1)):
        # Sums of 2^15 products of 15 bits are exact in float64.
        exact = part.double() @ words[c].double().T
        if zeros is not None:
            exact -= part.double().sum(1, keepdim=True) * zeros[c].double()
        if sums is not None:
            assert row_zeros is not None
            exact -= row_zeros.double() * sums[c].double()
        y += exact.to(torch.int32).float() * scales[c]
    return y * row_scales
