"""A spec as an operator's text and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowering_cases import calm

from qlab.algebra.spec import NAMED, Float, Int, Tile, parse_spec
from qlab.lowering.weights.exact import spec_of, text_of

WIDE = [None, torch.float32, torch.float16, torch.bfloat16]
tiles = st.sampled_from([Tile(None, None), Tile(1, None), Tile(1, 16), Tile(1, 100), Tile(3, 48)])
integers = st.builds(
    Int,
    st.integers(1, 8),
    tiles,
    st.booleans(),
    st.sampled_from(WIDE),
    st.sampled_from([torch.int8, torch.float16, torch.float32]),
)
floats = st.builds(
    lambda form, *rest: Float(*form, *rest),
    st.sampled_from([(4, 3), (2, 3), (2, 1)]),
    tiles,
    st.sampled_from([*WIDE, torch.float8_e8m0fnu, torch.float8_e4m3fn]),
    st.booleans(),
)


@calm
@given(st.one_of(integers, floats, st.sampled_from(list(NAMED.values()))))
def test_nothing_is_lost(spec):
    assert spec_of(text_of(spec)) == spec


@pytest.mark.parametrize("name", ["int4-g64", "int8-channel-asym", "fp8-b128x128", "nvfp4"])
def test_a_name_is_its_own_text(name):
    assert text_of(parse_spec(name)) == name


def test_what_a_name_leaves_out_follows_it():
    spec = Int(4, Tile(1, 32), scale_dtype=torch.float16, zero_dtype=torch.float32)
    assert text_of(spec) == "int4-g32 scale_dtype=float16 zero_dtype=float32"
