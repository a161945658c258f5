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
from qlab.files.digests import BLOCK
from qlab.files.directory import read_header
from qlab.files.readback import PAGE, _mark_in_file, mark, refuse_misread
from qlab.files.tensors import write
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


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, 3 * PAGE + 5, BLOCK + PAGE + 1])
def test_a_tensor_has_one_mark_in_memory_and_in_a_file(size, tmp_path):
    """Whatever its size, and wherever its bytes begin."""
    drawn = torch.Generator().manual_seed(size)
    tensor = torch.randint(0, 256, (size + 3,), generator=drawn, dtype=torch.uint8)[3:]
    write(tmp_path / "model.safetensors", [("t", tensor)])
    stored = read_header(tmp_path / "model.safetensors")["t"]
    assert _mark_in_file("t", stored) == mark(tensor)
    for at in {0, size // 2, size - 1} if size else ():
        other = tensor.clone()
        other[at] += 1
        assert mark(other) != mark(tensor)
