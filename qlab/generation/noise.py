"""Gumbel noise of a request's seed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlab.algebra.random import generator

BLOCK = 512  # tokens; noise is drawn for vocabulary / BLOCK + BLOCK numbers


def noise(size: int, seeds: Sequence[int], names: Sequence[str]) -> Tensor:
    """Gumbel noise [b, size], of a seed and a name in each row, in fp32."""
    u_bn = torch.empty(len(seeds), size, dtype=torch.float32)
    for u_n, seed, name in zip(u_bn, seeds, names):
        u_n.uniform_(generator=generator(seed, name))
    # uniform numbers are 0 at times and never 1: the least one beside 0 stands for 0
    return u_bn.clamp_min_(2.0**-25).log_().neg_().log_().neg_()
