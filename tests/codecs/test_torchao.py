"""torchao's tensors in safetensors, flattened by the library itself, against its own
dequantization."""

import json

import pytest
import torch
from corruption import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qlab
from qlab.algebra.qtensor import dense
from qlab.algebra.spec import Int, Tile, parse_spec
from qlab.codecs import reader, torchao
from qlab.errors import QlabError
from qlab.lowering.weights.integers import is_exact

quantization = pytest.importorskip("torchao.quantization")


def quantized_by_torchao(config, dtype=torch.float32):
    """(quantization_config, tensors, dense weight as torchao computes it) of one linear quantized
    by the library."""
    from torchao.core.config import config_to_dict
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=False, dtype=dtype))
    quantization.quantize_(model, config)
    tensors, _ = flatten_tensor_state_dict(model.state_dict())
    said = {"quant_method": "torchao", "quant_type": {"default": config_to_dict(config)}}
    return json.loads(json.dumps(said)), tensors, model[0].weight.dequantize()


def configs():
    intx, asymmetric = quantization.IntxWeightOnlyConfig, quantization.MappingType.ASYMMETRIC
    return [
        (quantization.Int8WeightOnlyConfig(version=2), Int(8, Tile(1, None))),
        (intx(weight_dtype=torch.int4, granularity=quantization.PerGroup(32)), Int(4, Tile(1, 32))),
        (
            intx(
                weight_dtype=torch.int3,
                granularity=quantization.PerAxis(0),
                mapping_type=asymmetric,
            ),
            Int(3, Tile(1, None), False),
        ),
        (
            intx(
                weight_dtype=torch.int2,
                granularity=quantization.PerGroup(16),
                mapping_type=asymmetric,
            ),
            Int(2, Tile(1, 16), False),
        ),
    ]


@pytest.mark.parametrize("i", range(4))
def test_weights_are_those_of_the_library(i):
    config, spec = configs()[i]
    said, tensors, W = quantized_by_torchao(config)
    assert reader(said).specs(said, [*tensors, "1.weight"]) == {"0": spec}
    assert torch.equal(dense(reader(said).decode("0", tensors, spec), torch.float32), W)


@settings(max_examples=60)
@given(
    st.integers(2, 8),
    st.sampled_from(["SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR", "ASYMMETRIC"]),
    st.sampled_from([None, 8, 16, 32, 64]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_integers_of_every_width_group_and_mapping_are_those_of_the_library(
    bits, mapping, group, dtype
):
    # one bit is left out: its largest symmetric code is 0, by which SYMMETRIC_NO_CLIPPING_ERR
    # divides
    granularity = quantization.PerAxis(0) if group is None else quantization.PerGroup(group)
    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=granularity,
        mapping_type=quantization.MappingType[mapping],
    )
    said, tensors, W = quantized_by_torchao(config, dtype)
    spec = Int(bits, Tile(1, group), mapping != "ASYMMETRIC")
    assert reader(said).specs(said, tensors) == {"0": spec}
    leaf = reader(said).decode("0", tensors, spec)
    assert leaf.scales.dtype == W.dtype == dtype
    assert torch.equal(dense(leaf, dtype), W)


@pytest.mark.parametrize("group", [None, 16, 64])
def test_int8_of_every_group_is_the_librarys(group):
    granularity = quantization.PerRow() if group is None else quantization.PerGroup(group)
    said, tensors, W = quantized_by_torchao(
        quantization.Int8WeightOnlyConfig(granularity=granularity, version=2)
    )
    [spec] = reader(said).specs(said, tensors).values()
    assert spec == Int(8, Tile(1, group))
    assert torch.equal(dense(reader(said).decode("0", tensors, spec), torch.float32), W)


INT4 = {
    "quant_method": "torchao",
    "quant_type": {
        "default": {
            "_type": "Int4WeightOnlyConfig",
            "_version": 2,
            "_data": {
                "group_size": 32,
                "int4_packing_format": {"_type": "Int4PackingFormat", "_data": "PLAIN"},
            },
        }
    },
}


def test_plain_int4_has_the_even_column_in_the_low_nibble_and_a_zero_point_in_units_of_the_weight():
    words = torch.tensor([[0x8F, 0x70]], dtype=torch.uint8).view(torch.int8)  # codes -1, -8, 0, 7
    tensors = {
        "m._weight_qdata": words,
        "m._weight_scale": torch.tensor([[0.5], [2.0]]),
        "m._weight_zero_point": torch.tensor([[0.25], [-1.0]]),
    }
    assert reader(INT4).specs(INT4, tensors) == {"m": None}
    assert reader(INT4).decode("m", tensors, None).tolist() == [[-0.25, -3.75, -1.0, 13.0]]


@pytest.mark.parametrize(
    "default, message",
    [
        (
            {"_type": "GemliteUIntXWeightOnlyConfig", "_data": {}},
            "torchao's GemliteUIntXWeightOnlyConfig; qlab reads Int8WeightOnlyConfig",
        ),
        (
            {
                "_type": "Int4WeightOnlyConfig",
                "_data": {"int4_packing_format": {"_type": "P", "_data": "TILE_PACKED_TO_4D"}},
            },
            "TILE_PACKED",
        ),
        ({"_type": "Int8WeightOnlyConfig", "_data": {"group_size": 0}}, "group_size 0"),
        (
            {
                "_type": "Int8WeightOnlyConfig",
                "_data": {"granularity": {"_type": "PerTensor", "_data": {}}},
            },
            "granularity PerTensor",
        ),
        ({"_type": "Int8WeightOnlyConfig", "_data": None}, "writes the fields"),
        ({"_type": "IntxWeightOnlyConfig", "_data": {}}, "with a _type"),
        (4, "with a _type"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(default, message):
    said = {"quant_method": "torchao", "quant_type": {"default": default}}
    with pytest.raises(QlabError, match=message):
        reader(said).specs(said, ["m._weight_qdata"])
    for quant_type in ("int4_weight_only", None, {"default": {}, "m": {}}):
        with pytest.raises(QlabError, match="one config for all modules"):
            reader(said).specs({"quant_type": quant_type}, [])


def module(symmetric):
    return {
        "m._weight_qdata": torch.randint(-8, 8, (32, 64), dtype=torch.int8),
        "m._weight_scale": torch.rand(32, 2),
        "m._weight_zero_point": torch.full((32, 2), 0 if symmetric else 3, dtype=torch.int8),
    }


def test_codes_and_zero_points_outside_the_grid_are_refused():
    codec = reader(INT4)
    with pytest.raises(QlabError, match=r"spans \[-8, 7\] and int3 holds \[-4, 3\]"):
        codec.decode("m", module(True), Int(3, Tile(1, 32)))
    with pytest.raises(QlabError, match="not 0 everywhere"):
        codec.decode("m", module(False), Int(4, Tile(1, 32)))
    with pytest.raises(QlabError, match="_weight_act_pre_scale has no place"):
        codec.decode(
            "m", {**module(True), "m._weight_act_pre_scale": torch.ones(1)}, Int(4, Tile(1, 32))
        )


@settings(max_examples=100)
@given(st.data(), st.booleans())
def test_damaged_tensors_are_refused_or_make_no_difference(data, symmetric):
    tensors, spec = module(symmetric), Int(4, Tile(1, 32), symmetric)
    W = dense(reader(INT4).decode("m", tensors, spec), torch.float64)
    try:
        leaf = reader(INT4).decode("m", data.draw(damaged(tensors)), spec)
    except QlabError:
        return
    assert (dense(leaf, torch.float64) - W).abs().max() <= 2.0**-9 * W.abs().max()


def e4m3(**fields):
    return {"_type": "torch.dtype", "_data": "float8_e4m3fn"} | fields


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        (
            "Int8DynamicActivationInt8WeightConfig",
            {"act_mapping_type": {"_type": "MappingType", "_data": "OTHER"}},
            "act_mapping_type 'OTHER'",
        ),
        ("Float8WeightOnlyConfig", {"weight_dtype": e4m3(_data="float8_e5m2")}, "float8_e5m2"),
        (
            "Float8DynamicActivationFloat8WeightConfig",
            {"packing_format": {"_type": "P", "_data": "SPARSE_CUTLASS"}},
            "packing_format 'SPARSE_CUTLASS'",
        ),
        ("Float8DynamicActivationFloat8WeightConfig", {"activation_value_ub": 3.0}, "ub 3.0"),
    ],
)
def test_inputs_that_cannot_be_read_are_refused(kind, fields, message):
    whole = {"_type": "PerRow", "_data": {"dim": -1}}
    data = {"granularity": whole, "weight_dtype": e4m3(), "activation_dtype": e4m3()} | fields
    said = {"quant_type": {"default": {"_type": kind, "_data": data}}}
    with pytest.raises(QlabError, match=message):
        torchao.specs(said, ["m._weight_qdata"])
        torchao.inputs(said, ["m._weight_qdata"])


def rounding_configs():
    int8, intx = (
        quantization.Int8DynamicActivationInt8WeightConfig,
        quantization.Int8DynamicActivationIntxWeightConfig,
    )
    asymmetric = quantization.MappingType.ASYMMETRIC
    whole = quantization.PerTensor()
    return [
        (int8(), "int8-channel", "int8-channel"),
        (
            int8(granularity=whole, act_mapping_type=asymmetric),
            "int8-tensor",
            "int8-tensor-asym",
        ),
        (int8(reduce_range=True), "int8-channel", "int7-channel"),
        (
            intx(weight_dtype=torch.int4, weight_granularity=quantization.PerGroup(32)),
            "int4-g32",
            "int8-channel-asym",
        ),
    ]


@pytest.mark.skipif(not is_exact(), reason="the library's sums of int8 products are not exact here")
@pytest.mark.parametrize("i", range(4))
def test_inputs_are_rounded_as_the_library_rounds_them(i):
    config, spec, inputs = rounding_configs()[i]
    said, tensors, W = quantized_by_torchao(config)
    codec = reader(said)
    assert {n: str(s) for n, s in codec.specs(said, tensors).items()} == {"0": spec}
    [(path, rounding)] = codec.inputs(said, tensors).items()
    assert path == "0" and str(rounding) == inputs
    leaf = codec.decode("0", tensors, parse_spec(spec))
    assert torch.equal(dense(leaf, torch.float32), W)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32, bias=False)), torch.randn(5, 64)
    quantization.quantize_(model, config)
    y = codec.decode_input("0", tensors, rounding)(x) @ dense(leaf, torch.float32).mT
    theirs, plain = model(x), x @ dense(leaf, torch.float32).mT
    assert (y - theirs).norm() <= 0.1 * (plain - theirs).norm()


@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor", "PerGroup"])
def test_floats_are_those_of_the_library(granularity):
    groups = (32,) if granularity == "PerGroup" else ()
    config = quantization.Float8WeightOnlyConfig(
        granularity=getattr(quantization, granularity)(*groups)
    )
    said, tensors, W = quantized_by_torchao(config)
    [spec] = reader(said).specs(said, tensors).values()
    assert torch.equal(dense(reader(said).decode("0", tensors, spec), torch.float32), W)
    assert not reader(said).inputs(said, tensors)


def test_floats_beside_floats_are_read_as_the_library_writes_their_config():
    whole = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    data = {"weight_dtype": e4m3(), "activation_dtype": e4m3(), "granularity": [whole, whole]}
    default = {"_type": "Float8DynamicActivationFloat8WeightConfig", "_data": data}
    said = {"quant_method": "torchao", "quant_type": {"default": default}}
    names = ["m._weight_qdata", "m._weight_scale"]
    assert str(reader(said).specs(said, names)["m"]) == "fp8-channel"
    assert str(reader(said).inputs(said, names)["m"]) == "fp8-channel"


@pytest.mark.parametrize("i", range(3))
def test_a_model_quantized_by_the_library_opens_runs_and_is_lowered(i, saved, tmp_path):
    from transformers import AutoModelForCausalLM, TorchAoConfig

    config, kernel = [
        (quantization.Int8DynamicActivationInt8WeightConfig(), "int8_int8"),
        (quantization.Int8WeightOnlyConfig(version=2), "int8"),
        (quantization.Float8WeightOnlyConfig(), None),
    ][i]
    if kernel == "int8_int8" and not is_exact():
        pytest.skip("torchao's sums of integers are not exact on this processor")
    theirs = AutoModelForCausalLM.from_pretrained(
        saved("llama"), quantization_config=TorchAoConfig(config), dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "theirs")
    model = qlab.open(tmp_path / "theirs")
    assert model.quantized
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    reference = theirs(ids).logits.double()
    for computed in (qlab.logits(model, ids), qlab.lower(tmp_path / "theirs")(ids).logits):
        assert (computed.double() - reference).norm() <= 0.05 * reference.norm()
    layer = qlab.lower(tmp_path / "theirs").model.layers[0].mlp.up_proj
    assert kernel is None or layer.kernel.name == kernel or layer.passed
