"""Codes as another format holds them: the same numbers, or a refusal."""

from dataclasses import replace

import pytest
import torch
from formats import rounded_scales
from hypothesis import given
from hypothesis import strategies as st

from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import Int, Tile
from qlab.codecs import CODECS
from qlab.directories.express import express, in_order
from qlab.driver.admissible import Admission
from qlab.errors import QlabError
from qlab.files.certificate import fingerprint


def into(codec):
    """What decides which codes the format of this name can hold."""
    return Admission(codec=codec, dtype=torch.float32)


def test_wide_scales_that_are_exact_in_the_narrow_dtype_are_carried(four_bits):
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (4, 64), dtype=torch.int8)
    leaf = QTensor(codes, torch.randn(4, 2), None, Int(4, Tile(1, 32)))
    exact, target = rounded_scales(leaf, torch.float16), Int(4, Tile(1, 32), symmetric=False)
    new = express(exact, target, into(four_bits))
    assert new.scales.dtype == torch.float16 and fingerprint(new) == fingerprint(exact)
    with pytest.raises(QlabError, match="float32 scales would be rounded to float16"):
        express(leaf, target, into(four_bits))


def test_zero_points_are_dropped_only_where_all_are_zero():
    codes, scales = torch.randint(-8, 8, (4, 64), dtype=torch.int8), torch.ones(4, 2)
    target = Int(4, Tile(1, 32))
    asym = lambda zeros: QTensor(codes, scales, zeros, replace(target, symmetric=False))
    assert (
        express(asym(torch.zeros(4, 2, dtype=torch.int8)), target, into("compressed-tensors")).zeros
        is None
    )
    with pytest.raises(QlabError, match="zero points that are not 0 would be lost"):
        express(asym(torch.eye(4, 2).to(torch.int8)), target, into("compressed-tensors"))


@given(
    codec=st.sampled_from(sorted(CODECS)),
    bits=st.integers(2, 8),
    cols=st.sampled_from([32, 64, None]),
    symmetric=st.booleans(),
    stored=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    exact=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    asymmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_leaf_is_the_same_in_every_format_or_refused(
    codec, bits, cols, symmetric, stored, exact, asymmetric, seed
):
    generator, spec = torch.Generator().manual_seed(seed), Int(bits, Tile(1, cols), symmetric)
    grid = spec.tile.scales_shape((64, 128))
    draw = lambda *shape: torch.randint(
        spec.qmin, spec.qmax + 1, shape, generator=generator, dtype=torch.int8
    )
    scales = torch.rand(grid, generator=generator).add(0.1).to(exact).to(stored)
    leaf = QTensor(draw(64, 128), scales, None if symmetric else draw(*grid), spec)
    try:
        new = express(leaf, replace(spec, symmetric=not asymmetric), into(codec))
        tensors = CODECS[codec].encode("m", new)
    except QlabError as error:
        assert "\n" not in str(error)
        assert codec != "compressed-tensors" or (not symmetric and not asymmetric)
    else:
        assert fingerprint(CODECS[codec].decode("m", tensors, new.spec)) == fingerprint(leaf)


@given(seed=st.integers(0, 99), groups=st.integers(1, 4), shuffled=st.booleans())
def test_an_order_of_channels_that_keeps_groups_together_is_undone(seed, groups, shuffled):
    generator = torch.Generator().manual_seed(seed)
    cols, o = 8, 3
    k = cols * groups
    blocks = torch.randperm(groups, generator=generator)
    perm = torch.cat([b * cols + torch.randperm(cols, generator=generator) for b in blocks])
    if shuffled:
        perm = perm[torch.randperm(k, generator=generator)]
    codes = torch.randint(-8, 8, (o, k), generator=generator, dtype=torch.int8)
    leaf = QTensor(
        codes,
        torch.rand(o, groups, generator=generator) + 1,
        None,
        Int(4, Tile(1, cols)),
        perm=perm,
    )
    natural = in_order(leaf)
    assert torch.equal(dense(natural), dense(leaf))
    assert natural.perm is None or (shuffled and groups > 1)
