"""Specs as plain data: what is written is read back, with nothing lost."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.algebra.spec import FLOATS, NAMED, Float, Int, Tile, parse_spec, spec_from_json, spec_json
from qlab.errors import QlabError

sizes = st.none() | st.integers(1, 999_999_999)
tiles = st.builds(Tile, sizes, sizes) | st.builds(Tile, st.just(1), st.sampled_from([16, 32, 64]))
scale_dtypes = st.none() | st.sampled_from(
    [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e8m0fnu]
)
zero_dtypes = st.sampled_from([torch.int8, torch.float16, torch.bfloat16, torch.float32])
ints = st.builds(Int, st.integers(1, 8), tiles, st.booleans(), scale_dtypes, zero_dtypes)
floats = st.builds(
    lambda kind, tile, scale_dtype, outer: Float(*kind, tile, scale_dtype, outer),
    st.sampled_from([*FLOATS.values()]),
    tiles,
    scale_dtypes,
    st.booleans(),
)
specs = ints | floats | st.sampled_from([*NAMED.values()])


@given(specs)
def test_a_spec_comes_back_from_json(spec):
    assert spec_from_json(json.loads(json.dumps(spec_json(spec)))) == spec


@given(specs)
def test_data_of_a_spec_names_it_and_leaves_out_what_the_name_says(spec):
    data = spec_json(spec)
    if "tile" not in data:
        assert data["spec"] == str(spec)
    assert (data.keys() == {"spec"}) == (parse_spec(data["spec"]) == spec)


@pytest.mark.parametrize("text", ["int4-g64", "int8-channel-asym", "fp8-b128x128", "nvfp4"])
def test_a_name_alone_is_the_spec_that_it_names(text):
    assert spec_json(parse_spec(text)) == {"spec": text}
    assert spec_from_json({"spec": text}) == parse_spec(text)


@pytest.mark.parametrize("key", ["scale", "zero"])
def test_a_dtype_that_torch_has_not_is_refused(key):
    with pytest.raises(QlabError, match="'float9' is no dtype of torch; write one such as float32"):
        spec_from_json({"spec": "int4-g64", key: "float9"})


def test_a_width_that_no_group_divides_leaves_the_whole_channel():
    with pytest.raises(QlabError, match=r"\(8, 100\); the only legal one here is 'channel'"):
        parse_spec("int4-g16").tile.check(torch.Size((8, 100)))
    with pytest.raises(QlabError, match=r"\(8, 48\); legal groups here are 16 or 'channel'"):
        parse_spec("int4-g32").tile.check(torch.Size((8, 48)))
