"""A rank's part of a weight whose groups have channels of an order of their own."""

from dataclasses import replace

import pytest
import torch

from qlab.algebra.grid import encode, minmax
from qlab.algebra.spec import parse_spec
from qlab.lowering.share import FULL, of_channels

K = 128


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


@pytest.mark.parametrize("spans", [[(0, 48)], [(48, K)], [(16, 32), (80, 96)], [(0, K)]])
@pytest.mark.parametrize("spec", ["int4-g16", "int4-g32-asym", "int4-g64-asym", "int8-b8x64"])
def test_columns_of_reordered_channels_are_those_of_the_whole(spec, spans):
    perm = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    leaf = replace(encode(minmax, drawn(24, K), parse_spec(spec)), perm=perm)
    part, order = of_channels(leaf, perm, spans)
    groups = K // leaf.spec.tile.cols
    mine = torch.cat([torch.arange(*span) for span in spans])
    found = torch.zeros(24, len(mine), dtype=torch.float32)
    found.index_add_(1, order, part.dense(torch.float32))
    assert torch.equal(found, leaf.dense(torch.float32)[:, mine])
    assert part.perm is None and part.shape[1] <= len(mine) + groups * min(
        FULL, leaf.spec.tile.cols
    )
