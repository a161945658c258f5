"""What qlab.json says of a site comes back as the values that the site has."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folders import refused

from qlab.algebra.spec import NAMED, Float, InputSpec, Int, Tile, parse_spec, with_scale_dtype
from qlab.driver.quantize import quantize
from qlab.files.checkpoint import open_checkpoint
from qlab.files.record import input_spec_of, recorded, spec_entries, spec_of
from qlab.methods.rtn import rtn

sizes = st.none() | st.integers(1, 256)
tiles = st.builds(Tile, sizes, sizes)
scale_dtypes = st.none() | st.sampled_from(
    [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e8m0fnu]
)
zero_dtypes = st.sampled_from([torch.int8, torch.float16, torch.float32])
specs = (
    st.builds(Int, st.integers(1, 8), tiles, st.booleans(), scale_dtypes, zero_dtypes)
    | st.builds(Float, st.just(4), st.just(3), tiles, scale_dtypes, st.booleans())
    | st.sampled_from([*NAMED.values()])
)


HALF = torch.bfloat16  # of the model


def settled(spec):
    """A spec in a model, whose dtype its scales have where it names none."""
    return spec and with_scale_dtype(spec, HALF)


@given(st.none() | specs, st.none() | st.builds(InputSpec, specs, st.booleans()))
def test_specs_of_a_site_come_back_from_its_row(spec, inputs):
    entries = spec_entries(spec, inputs, dtype=HALF)
    row = json.loads(json.dumps({"loss": 1.0, **entries, "shape": [4, 8]}))
    assert settled(spec_of(row)) == settled(spec)
    again = input_spec_of(row)
    assert (again is None) == (inputs is None)
    if inputs is not None:
        assert (settled(again.spec), again.static) == (settled(inputs.spec), inputs.static)


def test_a_row_of_named_specs_holds_their_names_alone():
    spec, inputs = settled(parse_spec("int8-channel")), InputSpec(parse_spec("int8-channel"))
    assert spec_entries(spec, inputs, dtype=HALF) == {
        "spec": "int8-channel",
        "inputs": "int8-channel",
    }
    assert spec_entries(None, dtype=HALF) == {"spec": None}


def test_scales_in_a_dtype_of_their_own_are_recorded(saved, tmp_path):
    spec = Int(4, Tile(1, 16), scale_dtype=torch.float16)
    result = quantize(open_checkpoint(saved("llama")), rtn(spec), None, tmp_path / "out")
    rows = result.sites.values()
    assert {row["spec"] for row in rows} == {"int4-g16"} and {spec_of(row) for row in rows} == {
        spec
    }


@pytest.mark.parametrize(
    "around",
    [7, {"m": 7}, {"m": {"input": 7}}, {"m": {"input": [7]}}, {"m": {"input": [{"tensor": 1}]}}],
)
def test_rows_of_what_happens_at_run_time_are_what_qlab_writes(around, tmp_path):
    (tmp_path / "qlab.json").write_text(json.dumps({"around": around}))
    refused(lambda: recorded(tmp_path), "qlab.json, around is not what qlab writes there")


def test_a_whole_number_beyond_all_floats_is_no_error_of_a_weight(tmp_path):
    rows = {"m": {"sha256": "", "weight_error": 10**400}}
    (tmp_path / "qlab.json").write_text(json.dumps({"certificates": rows}))
    refused(lambda: recorded(tmp_path), "qlab.json, certificates, 'm' is not what qlab writes")
