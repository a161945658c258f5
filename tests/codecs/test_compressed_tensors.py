"""The compressed-tensors codec's tensors: words by hand, the bijection, and what the format's own
library makes of our files."""

import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from leaves import assert_same, hexes, random_qtensor
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from qlab.algebra.online import Multiply
from qlab.algebra.qtensor import QTensor, dense, round_codes
from qlab.algebra.spec import Int, Tile, parse_spec, with_scale_dtype
from qlab.codecs import CODECS
from qlab.errors import QlabError

CODEC = CODECS["compressed-tensors"]
INT4, INT4_ASYM = parse_spec("int4-g16"), parse_spec("int4-g16-asym")


def absmax(W, spec):
    """Min-max rounding: s = max|W| / (2^b - 1) * 2, or the range through zero over 2^b - 1."""
    x = spec.tile.split(W)
    if spec.symmetric:
        scales, zeros = x.abs().amax(-1) / (2**spec.bits - 1) * 2, None
    else:
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        scales = (high - low) / (2**spec.bits - 1)
        zeros = (spec.qmin - low / scales).round().to(torch.int8)
    return QTensor(round_codes(W, scales, zeros, spec), scales, zeros, spec)


@st.composite
def qtensors(draw):
    group = draw(st.sampled_from([1, 5, 8, 32]))
    tile = draw(st.sampled_from([Tile(None, None), Tile(1, None), Tile(1, group)]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    spec = Int(draw(st.integers(2, 8)), tile, draw(st.booleans()), dtype)
    o, k = draw(st.integers(1, 40)), group * draw(st.integers(1, 12))
    return random_qtensor(spec, o, k, draw(st.integers(0, 99)))


@pytest.mark.parametrize(
    "bits, codes, words",
    [
        (4, list(range(-8, 8)), "76543210 fedcba98"),
        (8, [-128, -1, 0, 127], "ff807f00"),
        (3, list(range(-4, 4)) * 4, "88fac688 c688fac6 fac688fa"),
        (
            3,
            [3] * 11,
            "ffffffff 00000001",
        ),  # the eleventh code straddles; the row ends in zero bits
    ],
)
def test_pack_quantized_rows_have_the_golden_words(bits, codes, words):
    q = QTensor(
        torch.tensor([codes], dtype=torch.int8), torch.ones(1, 1), None, Int(bits, Tile(1, None))
    )
    tensors = CODEC.encode("m.q", q)
    assert hexes(tensors["m.q.weight_packed"]) == words
    assert tensors["m.q.weight_shape"].tolist() == [1, len(codes)]


def test_zero_points_pack_along_dim_0():
    zeros = torch.arange(-8, 8, dtype=torch.int8).reshape(8, 2)
    q = QTensor(torch.zeros(8, 32, dtype=torch.int8), torch.ones(8, 2), zeros, INT4_ASYM)
    packed = CODEC.encode("m", q)["m.weight_zero_point"]
    assert packed.shape == (1, 2) and hexes(packed) == "eca86420 fdb97531"


def test_w4a16_end_to_end_golden():
    q = absmax(torch.arange(-8.0, 8.0).repeat(8)[None], parse_spec("int4-g128"))
    tensors = CODEC.encode("m", q)
    assert tensors["m.weight_scale"].item() == pytest.approx(1.0666667)
    assert hexes(tensors["m.weight_packed"]) == " ".join(["76543211 fedcba98"] * 8)


def test_w4a16_asym_end_to_end_golden():
    q = absmax(torch.linspace(-3, 12, 128).repeat(8, 1), parse_spec("int4-g128-asym"))
    tensors = CODEC.encode("m", q)
    assert tensors["m.weight_scale"].tolist() == [[1.0]] * 8
    assert hexes(tensors["m.weight_packed"][0, :3]) == "11100000 22211111 33222222"
    assert hexes(tensors["m.weight_zero_point"]) == "33333333"


@settings(max_examples=150)
@given(qtensors())
def test_decode_inverts_encode_bit_for_bit(q):
    tensors = {
        name: tensor.view(-1).clone().view(tensor.shape)
        for name, tensor in CODEC.encode("m.q", q).items()
    }  # as in a file
    assert_same(CODEC.decode("m.q", tensors, q.spec), q)


@settings(max_examples=60)
@given(qtensors())
def test_the_librarys_decompressor_returns_the_dense_weight(q):
    scheme = QuantizationConfig.model_validate(CODEC.config({"m": q.spec})).config_groups["group_0"]
    tensors = {name.removeprefix("m."): tensor for name, tensor in CODEC.encode("m", q).items()}
    W = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    assert W.dtype == q.scales.dtype and torch.equal(W, dense(q))


@pytest.mark.parametrize(
    "spec, dequantize", [("int4-g16", False), ("int3-tensor", False), ("int4-g16-asym", True)]
)
def test_transformers_computes_the_logits_of_the_dense_weights(spec, dequantize, tmp_path):
    model, spec = tiny("llama"), with_scale_dtype(parse_spec(spec), torch.float32)
    linears = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    # transformers dequantizes every module with the first group, so mixed bits load only where it
    # leaves them packed
    mixed = (
        {}
        if dequantize
        else {name: replace(spec, bits=8) for name in linears if name.endswith("down_proj")}
    )
    specs = dict.fromkeys(linears, spec) | mixed | {"lm_head": None}
    quantized = {
        p: absmax(model.get_submodule(p).weight.detach(), s) for p, s in specs.items() if s
    }
    state = {
        n: t for n, t in model.state_dict().items() if n.removesuffix(".weight") not in quantized
    }
    for path, q in quantized.items():
        state |= CODEC.encode(path, q)
        model.get_submodule(path).weight.data = dense(q, torch.float32)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": CODEC.config(specs)}
    (tmp_path / "config.json").write_text(json.dumps(config))

    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **how).eval()
    tokens = torch.arange(1, 65).reshape(2, 32)
    with torch.no_grad():
        expected, logits = model(tokens).logits, loaded(tokens).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()

    tensors = load_file(tmp_path / "model.safetensors")
    for path in CODEC.specs(CODEC.config(specs), tensors):
        assert_same(CODEC.decode(path, tensors, specs[path]), quantized[path])


def int4(**changes):
    return replace(random_qtensor(with_scale_dtype(INT4, torch.float32), 4, 32), **changes)


@pytest.mark.parametrize(
    "leaf, message",
    [
        (
            QTensor(
                torch.zeros(4, 32, dtype=torch.int8), torch.ones(2, 2), None, Int(4, Tile(2, 16))
            ),
            "no scale per b2x16 block",
        ),
        (
            QTensor(torch.zeros(2, 4, 32, dtype=torch.int8), torch.ones(2, 4, 2), None, INT4),
            r"not \(2, 4, 32\)",
        ),
        (int4(perm=torch.arange(32)), "`perm`"),
        (int4(scales=torch.ones(4, 2).half()), "scales are torch.float16, expected torch.float32"),
        (
            int4(scales=torch.ones(4, 2, dtype=torch.float8_e4m3fn), spec=INT4),
            "scales are torch.float8_e4m3fn",
        ),
        (
            int4(spec=replace(INT4, scale_dtype=torch.float8_e4m3fn)),
            "has no torch.float8_e4m3fn scales",
        ),
        (
            int4(codes=torch.full((4, 32), 8, dtype=torch.int8)),
            r"codes span \[8, 8\] but int4 holds \[-8, 7\]",
        ),
        (
            int4(zeros=torch.full((4, 2), -9).to(torch.int8), spec=INT4_ASYM),
            r"zeros span \[-9, -9\]",
        ),
        (int4(zeros=torch.ones(4, 2), spec=INT4_ASYM), "int8 zeros, not torch.float32"),
    ],
)
def test_encode_refuses(leaf, message):
    with pytest.raises(QlabError, match=rf"^m\.q: .*{message}"):
        CODEC.encode("m.q", leaf)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("weight_packed", None, "weight_packed is missing"),
        ("weight_zero_point", None, "weight_zero_point is missing"),
        (
            "weight_shape",
            torch.tensor([4, 30]),
            r"weight_shape \(4, 30\) does not fit int4-g16-asym",
        ),
        ("weight_shape", torch.tensor([0, 32]), r"weight_shape \(0, 32\) does not fit"),
        (
            "weight_packed",
            torch.zeros(4, 3, dtype=torch.int32),
            r"weight_packed is .*\(4, 3\), expected .*\(4, 4\)",
        ),
        (
            "weight_packed",
            torch.zeros(4, 4),
            r"weight_packed is torch.float32 .*expected torch.int32",
        ),
        (
            "weight_scale",
            torch.ones(4, 1),
            r"weight_scale is .*\(4, 1\), expected torch.float32 \(4, 2\)",
        ),
        ("weight_scale", torch.ones(4, 2, dtype=torch.uint8), "weight_scale is torch.uint8"),
        (
            "weight_zero_point",
            torch.zeros(4, 2, dtype=torch.int8),
            "weight_zero_point is torch.int8",
        ),
        ("weight_g_idx", torch.zeros(32), "weight_g_idx is torch.float32"),
        (
            "weight_g_idx",
            torch.zeros(32, dtype=torch.int32),
            "weight_g_idx does not put 16 channels into each of 2 groups",
        ),
        ("weight_global_scale", torch.ones(1), "weight_global_scale has no place"),
        ("scales", torch.ones(4, 2), "scales has no place"),
        ("weight_scale", torch.full((4, 2), torch.nan), "weight_scale holds NaN"),
    ],
)
def test_decode_refuses(name, tensor, message):
    tensors = CODEC.encode("m.q", random_qtensor(with_scale_dtype(INT4_ASYM, torch.float32), 4, 32))
    tensors.pop(f"m.q.{name}", None)
    if tensor is not None:
        tensors[f"m.q.{name}"] = tensor
    with pytest.raises(QlabError, match=rf"^m\.q\.{message}"):
        CODEC.decode("m.q", tensors, INT4_ASYM)


def test_decode_refuses_a_zero_point_that_a_symmetric_spec_would_drop():
    tensors = CODEC.encode("m", int4()) | {
        "m.weight_zero_point": torch.zeros(1, 2, dtype=torch.int32)
    }
    with pytest.raises(QlabError, match=r"weight_zero_point has no place beside .* at int4-g16"):
        CODEC.decode("m", tensors, INT4)
    with pytest.raises(QlabError, match=r"^m: compressed-tensors has no scale per b2x16"):
        CODEC.decode("m", {}, Int(4, Tile(2, 16)))


def test_refusal_comes_before_any_work():
    assert CODEC.refusal(INT4) is None
    assert "no run-time Multiply" in CODEC.refusal(INT4, online=(Multiply(torch.ones(1)),))
    with pytest.raises(QlabError, match=r"^lm_head: compressed-tensors has no scale per b16x16"):
        CODEC.config({"lm_head": Int(4, Tile(16, 16))})
    with pytest.raises(QlabError, match="none of the 1 modules is quantized"):
        CODEC.config({"lm_head": None})
