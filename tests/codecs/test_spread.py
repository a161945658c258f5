"""Scales and zero points in the shapes that writers give them: with axes of one or without."""

import pytest
import torch
from leaves import assert_same, random_qtensor

from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import Int, Tile, parse_input_spec, parse_spec, with_scale_dtype
from qlab.codecs import CODECS, reader
from qlab.codecs.checks import bare
from qlab.errors import QlabError

CT = CODECS["compressed-tensors"]
SPREAD = ("weight_scale", "weight_zero_point", "weight_global_scale", "scales", "qzeros")


def shapes(tensor):
    """The shapes of the same numbers with one axis of one less or more."""
    shape = tuple(tensor.shape)
    return {shape, bare(shape), (*bare(shape), 1), (1, *bare(shape))}


@pytest.mark.parametrize(
    "text",
    ["int8-tensor", "int8-channel", "int8-tensor-asym", "fp8-tensor", "fp8-channel", "nvfp4"],
)
def test_compressed_tensors_reads_every_shape(text):
    leaf = random_qtensor(with_scale_dtype(parse_spec(text), torch.float32), 8, 32)
    tensors = CT.encode("m", leaf)
    for name in [name for name in tensors if name.partition(".")[2] in SPREAD]:
        for shape in shapes(tensors[name]):
            assert_same(
                CT.decode("m", {**tensors, name: tensors[name].reshape(shape)}, leaf.spec), leaf
            )


@pytest.mark.parametrize("codec", ["gptq", "gptq_v2", "awq"])
def test_one_scale_per_row_has_one_axis_or_two(codec):
    leaf = random_qtensor(Int(4, Tile(1, None), True, torch.float16), 32, 64)
    tensors = CODECS[codec].encode("m", leaf)
    for name in ("m.scales", "m.qzeros"):
        flat = {**tensors, name: tensors[name].flatten()}
        assert_same(CODECS[codec].decode("m", flat, leaf.spec), leaf)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_of_inputs_has_any_number_of_axes(shape):
    spec = parse_input_spec("int8-tensor static")
    tensors = {"m.input_scale": torch.full(shape, 0.5)}
    assert torch.equal(
        CT.decode_input("m", tensors, spec).scales,
        QuantizeInput(spec.spec, torch.tensor([[0.5]])).scales,
    )


@pytest.mark.parametrize("shape", [(), (1,), (8,), (8, 1)])
def test_fp8_reads_one_scale_or_one_per_row(shape):
    said, weights = {"quant_method": "fp8"}, {"m.weight": torch.ones(8, 32).to(torch.float8_e4m3fn)}
    scale = torch.arange(1.0, 9.0)[: 8 if 8 in shape else 1].reshape(shape)
    codec, tensors = reader(said), weights | {"m.weight_scale": scale}
    spec = codec.specs(said, tensors)["m"]
    assert spec == parse_spec("fp8-channel" if 8 in shape else "fp8-tensor")
    assert torch.equal(codec.decode("m", tensors, spec).scales, scale.reshape(-1, 1))
    # A scale per token, whatever the weight's scales are.
    assert str(codec.inputs(said, tensors)["m"]) == "fp8-channel"


def test_other_numbers_are_still_refused():
    leaf = random_qtensor(with_scale_dtype(parse_spec("int8-channel"), torch.float32), 8, 32)
    for scale in (torch.ones(4, 2), torch.ones(1), torch.ones(8, 1, dtype=torch.int8)):
        with pytest.raises(QlabError, match=r"m\.weight_scale is"):
            CT.decode("m", CT.encode("m", leaf) | {"m.weight_scale": scale}, leaf.spec)
