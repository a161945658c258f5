"""What is read back of a file is compared number for number, in whatever dtype a reader has it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folders import refused
from safetensors.torch import save_file

from qlab.algebra.spec import parse_spec, with_scale_dtype
from qlab.codecs import CODECS
from qlab.files.readback import refuse_misread
from qlab.methods.grid import encode, minmax

CODEC = CODECS["compressed-tensors"]
SPEC = with_scale_dtype(parse_spec("int4-g32-asym"), torch.bfloat16)
LEAF = encode(minmax, torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), SPEC)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    save_file(CODEC.encode("proj", LEAF), path)
    return path


def test_the_leaf_that_was_written_reads_back_in_any_dtype_of_its_parts(file):
    wide = replace(LEAF, scales=LEAF.scales.double(), zeros=LEAF.zeros.to(torch.int32))
    for leaf in (LEAF, wide):
        refuse_misread(file, {"proj.weight": leaf}, CODEC)


@given(st.sampled_from(["codes", "scales", "zeros"]), st.integers(0, 15), st.booleans())
def test_one_other_number_is_found_in_any_dtype(file, part, at, wide):
    numbers = getattr(LEAF, part)
    other = numbers.double() if wide and part != "codes" else numbers.clone()
    flat = other.view(-1)
    flat[at % len(flat)] = flat[at % len(flat)] + 1
    leaf = replace(LEAF, **{part: other})
    refused(lambda: refuse_misread(file, {"proj.weight": leaf}, CODEC), "proj.weight", part)
