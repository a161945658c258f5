"""A rank's part of a weight of reordered channels, and scales of inputs of which every rank has
some channels: the ranks compute what one process does."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils._pytree import tree_map

from qlab.algebra.grid import encode, minmax
from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import parse_input_spec, parse_spec
from qlab.lowering.around.together import round_together
from qlab.lowering.share import FULL, of_channels, of_tiles
from qlab.lowering.weights.modules import QExperts, QLinear

K = 128
INPUTS = [  # weights, inputs
    ("int8-channel", "int8-token"),
    ("int8-channel", "int8-token-asym"),
    ("int8-channel", "int8-tensor"),
    ("int4-g32-asym", "int8-token"),
    ("fp8-channel", "fp8-token"),
    ("nvfp4", "nvfp4"),
]


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


def product(leaf, inputs, x, group=None):
    """y of a linear, or of two experts of the same weight; group: of the ranks that share it."""
    rounding = QuantizeInput(parse_input_spec(inputs).spec)
    how = torch.float32, torch.device("cpu"), False
    if leaf.codes.ndim == 3:
        module, more = QExperts("w", leaf, *how, inputs=rounding), (None, torch.tensor([4, 6]))
    else:
        module, more = QLinear("w", leaf, None, *how, inputs=rounding), ()
    if group is not None:
        round_together(module, group)
    return module(x, *more)


def differences(rank):
    """How far the sum of two ranks is from one process, of its size: where they agree on scales,
    and where each has its own."""
    x = drawn(6, K, seed=2) * torch.where(torch.arange(K) < 64, 5.0, 1.0)
    mine, found = slice(64 * rank, 64 * rank + 64), []
    for weights, inputs in INPUTS:
        lone = encode(minmax, drawn(32, K), parse_spec(weights))
        both = tree_map(lambda t: None if t is None else torch.stack([t, t]), lone)
        for leaf in (lone, both):
            part, expected = (
                of_tiles(leaf, "k", [(mine.start, mine.stop)]),
                product(leaf, inputs, x),
            )
            sums = [product(part, inputs, x[:, mine], group) for group in (dist.group.WORLD, None)]
            for y in sums:
                dist.all_reduce(y)
            found.append([float((y - expected).norm() / expected.norm()) for y in sums])
    return found


def test_ranks_round_a_token_by_the_range_of_all_its_channels(tmp_path):
    first, second = run_ranks(tmp_path, 2, differences)
    assert first == second
    for together, alone in first:
        assert together < 1e-6 < 1e-4 < alone
