"""compressed-tensors' formats: bytes by hand, the bijection, and the format's own library reading
and writing the same."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from leaves import assert_same, bits, hexes, random_qtensor

from qlab.algebra.grid import encode, minmax
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import (
    NAMED,
    Float,
    InputSpec,
    Tile,
    parse_input_spec,
    parse_spec,
    with_scale_dtype,
)
from qlab.codecs import CODECS
from qlab.codecs.compressed_tensors.config import Scheme
from qlab.codecs.compressed_tensors.scheme import PRESETS, args_of, format_of
from qlab.errors import QlabError

CODEC = CODECS["compressed-tensors"]
FLOATS = ("fp8-tensor", "fp8-channel", "fp8-g32", "fp8-b16x24", "mxfp4", "mxfp6", "mxfp8", "nvfp4")
INT8 = (QuantizeInput(parse_spec("int8-channel")),)  # inputs that make int8 weights int-quantized
INTS = (
    "int8-channel",
    "int8-tensor",
    "int8-g32",
    "int8-channel-asym",
    "int8-tensor-asym",
    "int8-g32-asym",
)
E4M3_ROW = [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6, 0.25]

HEADER = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}

sizes = st.tuples(st.integers(1, 40), st.integers(1, 4))
scales = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def settled(text, dtype=torch.float32):
    return with_scale_dtype(parse_spec(text), dtype)


def library(spec, inputs=None):
    """The library's compressor and scheme for such a weight."""
    scheme = QuantizationConfig.model_validate(
        CODEC.config({"m": spec}, {"m": inputs})
    ).config_groups["group_0"]
    return BaseCompressor.get_value_from_registry(scheme.format), scheme


def local(tensors):
    return {name.removeprefix("m."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("text", FLOATS + INTS)
@settings(max_examples=25)
@given(size=sizes, dtype=scales, seed=st.integers(0, 99))
def test_decode_inverts_encode_bit_for_bit(text, size, dtype, seed):
    q = random_qtensor(settled(text, dtype), size[0], 32 * size[1], seed)
    assert_same(CODEC.decode("m", CODEC.encode("m", q, INT8), q.spec), q)
    assert_same(CODEC.decode("m", CODEC.encode("m", q), q.spec), q)


@pytest.mark.parametrize("text", FLOATS + INTS)
@settings(max_examples=25)
@given(size=sizes, seed=st.integers(0, 99))
def test_the_library_decompresses_our_files_to_our_dense_weights(text, size, seed):
    spec = settled(text)
    q = random_qtensor(spec, size[0], 32 * size[1], seed)
    online = INT8 if text in INTS else ()
    compressor, scheme = library(spec, online[0].input_spec if online else None)
    W = compressor.decompress(local(CODEC.encode("m", q, online)), scheme)["weight"]
    assert torch.equal(W, dense(q, torch.float32).to(W.dtype)) and W.dtype in (
        torch.float32,
        torch.bfloat16,
    )


@pytest.mark.parametrize("text", FLOATS + INTS)
@settings(max_examples=25)
@given(size=sizes, seed=st.integers(0, 99))
def test_we_read_what_the_library_compresses(text, size, seed):
    spec = settled(text)
    W = torch.randn(size[0], 32 * size[1], generator=torch.Generator().manual_seed(seed))
    compressor, scheme = library(spec, INT8[0].input_spec if text in INTS else None)
    x, state = spec.tile.split(W), {"weight": W}
    if spec.outer:
        state["weight_global_scale"] = generate_gparam(W.min(), W.max())
    s, z = calculate_qparams(
        x.amin(-1), x.amax(-1), scheme.weights, state.get("weight_global_scale")
    )
    flat = (1,) if scheme.weights.strategy == "tensor" else s.shape
    state |= {"weight_scale": s.reshape(flat), "weight_zero_point": z.reshape(flat)}
    tensors = compressor.compress(state, scheme)
    assert_same(
        CODEC.decode("m", {f"m.{name}": t for name, t in tensors.items()}, spec),
        encode(minmax, W, spec),
    )


def test_fp4_bytes_are_golden():
    mx = CODEC.encode("m", encode(minmax, torch.tensor([E4M3_ROW * 2]), NAMED["mxfp4"]))
    nv = CODEC.encode("m", encode(minmax, torch.tensor([E4M3_ROW]), NAMED["nvfp4"]))
    assert mx["m.weight_packed"][0, :8].tolist() == nv["m.weight_packed"][0].tolist()
    assert nv["m.weight_packed"].numpy().tobytes().hex(" ") == "ef cd ab 09 21 43 65 07"
    assert mx["m.weight_scale"].tolist() == [[0x7F]] and bits(nv["m.weight_scale"]).tolist() == [
        [0x7E]
    ]
    assert nv["m.weight_global_scale"].tolist() == [448.0]


def narrow(values, name):
    spec = NAMED[name]
    codes = torch.tensor([values], dtype=torch.float32).to(spec.code_dtype)
    return QTensor(codes, torch.ones(1, 1).to(spec.scale_dtype), None, spec)


def test_the_sign_of_zero_and_the_order_of_six_bit_codes_are_kept():
    row = [0, 0.5, 1, 1.5, -0.0, *[0] * 27]
    assert CODEC.encode("m", narrow(row, "mxfp4"))["m.weight_packed"][0, :3].tolist() == [
        0x10,
        0x32,
        0x08,
    ]
    row = [0, 0.125, 0.25, 0.375, -0.0, -7.5, *[0] * 26]
    assert CODEC.encode("m", narrow(row, "mxfp6"))["m.weight_packed"][0, :6].tolist() == [
        0x40,
        0x20,
        0x0C,
        0xE0,
        0x0F,
        0,
    ]


def test_fp8_and_int8_are_one_code_per_byte():
    q = encode(minmax, torch.tensor([[448.0, -1, 0.5, 0], [1, 2, 4, 448]]), settled("fp8-channel"))
    tensors = CODEC.encode("m", q)
    assert bits(tensors["m.weight"]).tolist() == [[0x7E, 0xB8, 0x30, 0], [0x38, 0x40, 0x48, 0x7E]]
    assert tensors["m.weight_scale"].tolist() == [[1.0], [1.0]]
    q = encode(minmax, torch.tensor([[-128.0, 127, 3, 0]]), settled("int8-tensor-asym"))
    tensors = CODEC.encode("m", q, INT8)
    assert tensors["m.weight"].tolist() == [[-128, 127, 3, 0]] and tensors[
        "m.weight_zero_point"
    ].tolist() == [0]
    assert tensors["m.weight_scale"].tolist() == [1.0] and set(tensors) == {
        "m.weight",
        "m.weight_scale",
        "m.weight_zero_point",
    }


@pytest.mark.parametrize("o, k, stored", [(40, 64, (3, 3)), (16, 24, (1, 1)), (17, 25, (2, 2))])
def test_ragged_blocks_are_stored_as_they_are(o, k, stored):
    tensors = CODEC.encode("m", random_qtensor(settled("fp8-b16x24"), o, k))
    assert tensors["m.weight"].shape == (o, k) and tensors["m.weight_scale"].shape == stored


@pytest.mark.parametrize("name", sorted(PRESET_SCHEMES))
def test_presets_are_the_librarys(name):
    weights, rounded = PRESETS[name]
    scheme = preset_name_to_scheme(name, ["Linear"])
    assert (scheme.weights is None, scheme.input_activations is None) == (
        weights is None,
        rounded is None,
    )
    where = {
        "scale_dtype",
        "strategy",
        "num_bits",
        "symmetric",
        "type",
        "group_size",
        "block_structure",
        "dynamic",
    }
    kept = lambda args: {key: value for key, value in args.model_dump().items() if key in where}
    if weights:
        ours = args_of(parse_spec(weights))
        assert kept(scheme.weights) == ours
    if rounded:
        spec = parse_input_spec(rounded)
        assert kept(scheme.input_activations) == args_of(spec.spec, spec.static, of_inputs=True)
    config = HEADER | {"config_groups": {name.lower(): ["Linear"]}}
    if weights:
        assert CODEC.specs(config, ["m.weight_scale"]) == {"m": parse_spec(weights)}
        assert CODEC.inputs(config, ["m.weight_scale"]) == (
            {"m": parse_input_spec(rounded)} if rounded else {}
        )


def test_formats_are_those_that_the_library_picks_but_for_narrow_integers_with_rounded_inputs():
    ours, theirs = {}, {}
    for name, (weights, rounded) in PRESETS.items():
        if weights:
            ours[name] = format_of(
                parse_spec(weights), parse_input_spec(rounded) if rounded else None
            )
            theirs[name] = infer_module_format(
                torch.nn.Linear, preset_name_to_scheme(name, ["Linear"])
            ).value
    differ = {name for name in ours if ours[name] != theirs[name]}
    assert {(ours[name], theirs[name]) for name in differ} == {("pack-quantized", "int-quantized")}
    assert all(parse_spec(PRESETS[name][0]).bits < 8 for name in differ)


@settings(max_examples=60)
@given(st.lists(st.sampled_from([None, *PRESETS.values()]), min_size=3, max_size=3))
def test_a_config_of_several_formats_is_read_as_it_was_written(drawn):
    schemes = {f"h.{i}": pair for i, pair in enumerate(drawn) if pair and pair[0]}
    specs = {
        f"h.{i}": parse_spec(schemes[f"h.{i}"][0]) if f"h.{i}" in schemes else None
        for i in range(3)
    }
    inputs = {path: parse_input_spec(pair[1]) for path, pair in schemes.items() if pair[1]}
    if not schemes:
        return
    config = CODEC.config(specs, inputs)
    written = QuantizationConfig.model_validate(config).model_dump()
    assert written == {key: config.get(key) for key in written}
    formats = {group["format"] for group in config["config_groups"].values()}
    assert config["format"] == (formats.pop() if len(formats) == 1 else "mixed-precision")
    names = [f"{path}.weight_scale" if spec else f"{path}.weight" for path, spec in specs.items()]
    assert CODEC.specs(config, names) == {path: spec for path, spec in specs.items() if spec}
    assert CODEC.inputs(config, names) == inputs


def test_explicit_nulls_and_the_dtypes_of_zero_points_are_read():
    """As compressed-tensors 0.19 writes FP8_BLOCK."""
    nulls = {
        "actorder": None,
        "scale_dtype": None,
        "zp_dtype": None,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
    }
    weights = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "group_size": None,
        "strategy": "block",
        "block_structure": [128, 128],
        "dynamic": False,
        **nulls,
    }
    inputs = weights | {
        "strategy": "group",
        "group_size": 128,
        "block_structure": None,
        "dynamic": True,
        "observer": None,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": "float-quantized",
    }
    config = HEADER | {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }
    names = ["m.weight", "m.weight_scale", "lm_head.weight"]
    assert CODEC.specs(config, names) == {"m": parse_spec("fp8-b128x128")}
    assert CODEC.inputs(config, names) == {"m": InputSpec(parse_spec("fp8-g128"))}
    weights["block_structure"] = "128x128"
    assert CODEC.specs(config, names) == {"m": parse_spec("fp8-b128x128")}


def changed(text, **edits):
    tensors = CODEC.encode("m", random_qtensor(settled(text), 4, 64))
    return {
        name: tensor
        for name, tensor in (tensors | {f"m.{k}": v for k, v in edits.items()}).items()
        if tensor is not None
    }


NAN8 = torch.full((4, 64), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "text, edits, message",
    [
        ("fp8-channel", {"weight": None}, "m.weight is missing"),
        (
            "fp8-channel",
            {"weight": torch.zeros(4, 64)},
            "weight is torch.float32 .*expected torch.float8_e4m3fn",
        ),
        (
            "fp8-channel",
            {"weight": torch.zeros(0, 64).to(torch.float8_e4m3fn)},
            "weight is .*expected",
        ),
        ("fp8-channel", {"weight": NAN8}, "weight holds NaN"),
        (
            "fp8-channel",
            {"weight_scale": torch.ones(3)},
            r"weight_scale is torch.float32 \(3,\), expected torch.float32 \(4, 1\)",
        ),
        (
            "fp8-channel",
            {"weight_scale": torch.full((4, 1), torch.inf)},
            "weight_scale holds NaN or Inf",
        ),
        ("fp8-channel", {"weight_zero_point": torch.zeros(4, 1)}, "weight_zero_point has no place"),
        (
            "fp8-g32",
            {"weight": torch.zeros(4, 60).to(torch.float8_e4m3fn)},
            "weight does not fit its config: groups of 32",
        ),
        ("mxfp8", {"weight_scale": torch.full((4, 2), 255, dtype=torch.uint8)}, "holds 255"),
        (
            "mxfp4",
            {"weight_scale": torch.ones(4, 2)},
            "weight_scale is torch.float32 .*expected torch.uint8",
        ),
        (
            "mxfp4",
            {"weight_packed": torch.zeros(4, 31, dtype=torch.uint8)},
            "no whole groups of mxfp4",
        ),
        (
            "mxfp6",
            {"weight_packed": torch.zeros(4, 47, dtype=torch.uint8)},
            "no whole groups of mxfp6",
        ),
        (
            "mxfp6",
            {"weight_packed": torch.zeros(4, dtype=torch.uint8)},
            "weight_packed is .*expected",
        ),
        ("nvfp4", {"weight_global_scale": None}, "weight_global_scale is missing"),
        ("nvfp4", {"weight_global_scale": torch.zeros(1)}, "weight_global_scale is 0"),
        ("nvfp4", {"weight_shape": torch.tensor([4, 64])}, "weight_shape has no place"),
        (
            "int8-channel",
            {"weight_packed": None, "weight_shape": None, "weight": torch.zeros(4, 64)},
            "expected torch.int8",
        ),
    ],
)
def test_decode_refuses(text, edits, message):
    with pytest.raises(QlabError, match=message):
        CODEC.decode("m", changed(text, **edits), parse_spec(text))


def test_codes_outside_a_narrow_grid_are_refused_in_both_directions():
    with pytest.raises(QlabError, match="m: codes are not all numbers of mxfp4"):
        CODEC.encode("m", narrow([0.25] * 32, "mxfp4"))
    tensors = {
        "m.weight": torch.full((1, 4), 9, dtype=torch.int8),
        "m.weight_scale": torch.ones(1, 1),
    }
    with pytest.raises(QlabError, match=r"codes span \[9, 9\] but int4 holds"):
        CODEC.decode("m", tensors, parse_spec("int4-channel"))


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            Float(2, 1, Tile(1, None)),
            "has no fp4-channel; its floats below 8 bits are mxfp4, mxfp6 and nvfp4",
        ),
        (
            Float(4, 3, Tile(128, 128), torch.float8_e8m0fnu),
            "no torch.float8_e8m0fnu scales for fp8-b128x128",
        ),
    ],
)
def test_floats_without_a_format_are_refused_before_any_work(spec, message):
    assert message in CODEC.refusal(spec)


def test_schemes_compare_by_value():
    assert (
        Scheme(parse_spec("mxfp4"), None) == Scheme(NAMED["mxfp4"])
        and hexes(torch.tensor([10])) == "0000000a"
    )
