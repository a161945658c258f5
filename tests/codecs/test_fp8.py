"""Directories of `quant_method: fp8`: golden numbers, transformers' own dequantization, and
refusals."""

import json

import pytest
import torch
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from leaves import assert_same
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

import qlab
from qlab.algebra.grid import encode, minmax
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import InputSpec, parse_spec
from qlab.codecs import reader
from qlab.errors import QlabError
from qlab.evaluation.perplexity import read
from qlab.files.checkpoint import open_checkpoint
from qlab.model.running import head

CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [2, 4],
}
CODEC = reader(CONFIG)
BLOCKS = parse_spec("fp8-b2x4")
CODES = torch.tensor([[1.0, 2, -3, 0.5, 448], [4, 0, 0, 0, 1], [8, 1, 1, 1, 2]]).to(
    torch.float8_e4m3fn
)
SCALES = torch.tensor([[0.5, 2.0], [4.0, 1.0]])


class Quantizer:
    """The part of transformers' quantizer that its operations ask for."""

    def __init__(self, block, scale_fmt="float"):
        self.quantization_config = FineGrainedFP8Config(
            weight_block_size=block, scale_fmt=scale_fmt
        )


def stored(**edits):
    tensors = {"m.weight": CODES, "m.weight_scale_inv": SCALES} | {
        f"m.{name}": t for name, t in edits.items()
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def test_blocks_are_multiplied_by_what_is_called_an_inverse():
    q = CODEC.decode("m", stored(), BLOCKS)
    assert dense(q).tolist() == [[0.5, 1, -1.5, 0.25, 896], [2, 0, 0, 0, 2], [32, 4, 4, 4, 2]]


@pytest.mark.parametrize("powers", [torch.float8_e8m0fnu, torch.uint8])
def test_scales_may_be_bytes_of_exponents(powers):
    bytes_ = torch.tensor([[126, 128], [129, 127]], dtype=torch.uint8).view(powers)
    assert_same(
        CODEC.decode("m", stored(weight_scale_inv=bytes_), BLOCKS),
        CODEC.decode("m", stored(), BLOCKS),
    )


@settings(max_examples=25)
@given(
    o=st.integers(1, 5),
    k=st.integers(1, 5),
    fmt=st.sampled_from(["float", "ue8m0"]),
    seed=st.integers(0, 99),
)
def test_we_read_what_transformers_rounds_as_it_does(o, k, fmt, seed):
    W = torch.randn(16 * o, 32 * k, generator=torch.Generator().manual_seed(seed))
    quantizer = Quantizer((16, 32), fmt)
    tensors = Fp8Quantize(quantizer)._quantize_one("m.weight", W)
    q = CODEC.decode("m", tensors, parse_spec("fp8-b16x32"))
    theirs = Fp8Dequantize(quantizer)._dequantize_one(
        tensors["m.weight"], tensors["m.weight_scale_inv"], torch.float32
    )
    assert torch.equal(dense(q, torch.float32), theirs) and (theirs - W).norm() < 0.05 * W.norm()


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_per_tensor_may_have_any_shape(name, shape):
    tensors = {"m.weight": CODES, f"m.{name}": torch.full(shape, 0.25)}
    assert torch.equal(
        dense(CODEC.decode("m", tensors, parse_spec("fp8-tensor"))), CODES.float() / 4
    )


def test_specs_and_inputs_are_those_of_the_config():
    names = ["a.weight", "a.weight_scale_inv", "b.weight_scale_inv", "norm.weight"]
    per_tensor = CONFIG | {"weight_block_size": None}
    static = per_tensor | {"activation_scheme": "static"}
    left_out = {key: value for key, value in CONFIG.items() if key != "weight_block_size"}
    for config, spec, inputs in (
        (CONFIG, "fp8-b2x4", InputSpec(parse_spec("fp8-g4"))),
        (left_out, "fp8-b128x128", InputSpec(parse_spec("fp8-g128"))),
        (per_tensor, "fp8-tensor", InputSpec(parse_spec("fp8-channel"))),
        (static, "fp8-tensor", InputSpec(parse_spec("fp8-tensor"), True)),
    ):
        assert reader(config).specs(config, names) == dict.fromkeys("ab", parse_spec(spec))
        assert reader(config).inputs(config, names) == dict.fromkeys("ab", inputs)


@pytest.mark.parametrize("name", ["activation_scale", "input_scale"])
def test_static_inputs_have_one_stored_scale(name):
    spec, x = InputSpec(parse_spec("fp8-tensor"), True), torch.randn(2, 3, 5)
    op = CODEC.decode_input("m", stored(**{name: torch.tensor(0.01)}), spec)
    assert torch.equal(
        op(x), (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).float() * torch.tensor(0.01)
    )
    assert CODEC.decode_input("m", stored(), InputSpec(parse_spec("fp8-g4"))) == QuantizeInput(
        parse_spec("fp8-g4")
    )


def test_the_last_group_of_an_input_need_not_be_full():
    x = torch.randn(3, 6)
    rounded = QuantizeInput(parse_spec("fp8-g4"))(x)
    assert (
        torch.equal(rounded[:, 4:], QuantizeInput(parse_spec("fp8-channel"))(x[:, 4:]))
        and rounded.shape == x.shape
    )


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_directory_evaluates_with_its_inputs_rounded(family, tmp_path):
    model = tiny(family)
    linears = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]
    state, spec = model.state_dict(), parse_spec("fp8-b32x32")
    for path in linears:
        q = encode(minmax, state[f"{path}.weight"], spec)
        state |= {f"{path}.weight": q.codes, f"{path}.weight_scale_inv": q.scales}
        model.get_submodule(path).weight.data = dense(q)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = CONFIG | {"weight_block_size": [32, 32], "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(
        json.dumps(model.config.to_dict() | {"quantization_config": config})
    )
    opened, ids = open_checkpoint(tmp_path), torch.arange(3, 35).reshape(2, 16)
    assert (
        set(opened.quantized) == set(opened.inputs) == set(linears)
        and opened.dtype == torch.float32
    )
    reading = read(opened, qlab.from_ids(opened, ids))
    rounding = QuantizeInput(parse_spec("fp8-g32"))
    for path in linears:
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args: (rounding(args[0]),)
        )
    with torch.no_grad():
        expected = model(ids).logits
    assert (head(reading.skeleton, ids, reading.hidden) - expected).norm() < 1e-4 * expected.norm()
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    # Without a GPU transformers rounds no inputs, and it takes blocks at the edge for full ones.
    for path in linears:
        W = dense(opened.leaf(f"{path}.weight"))
        assert len(W) % 32 or torch.equal(theirs.get_submodule(path).weight, W)


@pytest.mark.parametrize(
    "edits, message",
    [
        ({"weight": None}, "m.weight is missing"),
        ({"weight": CODES.float()}, "m.weight is torch.float32"),
        ({"weight": CODES[0]}, r"m.weight is torch.float8_e4m3fn \(5,\)"),
        ({"weight": torch.full((3, 5), torch.nan).to(torch.float8_e4m3fn)}, "m.weight holds NaN"),
        ({"weight_scale_inv": None}, "m has no scales"),
        ({"weight_scale": SCALES}, "m has weight_scale_inv and weight_scale"),
        (
            {"weight_scale_inv": SCALES[:1]},
            r"weight_scale_inv is torch.float32 \(1, 2\), expected torch.float32 \(2, 2\)",
        ),
        ({"weight_scale_inv": SCALES.int()}, "weight_scale_inv is torch.int32"),
        ({"weight_scale_inv": SCALES - 0.5}, "no positive number"),
        ({"weight_scale_inv": torch.full((2, 2), 255, dtype=torch.uint8)}, "holds NaN"),
    ],
)
def test_damaged_weights_are_refused(edits, message):
    with pytest.raises(QlabError, match=message):
        CODEC.decode("m", stored(**edits), BLOCKS)


@pytest.mark.parametrize(
    "change, names, message",
    [
        ({"fmt": "e5m2"}, ["m.weight_scale"], "fmt 'e5m2'"),
        ({"scale_fmt": "e4m3"}, ["m.weight_scale"], "scale_fmt 'e4m3'"),
        ({"expert_dtype": "fp4"}, ["m.weight_scale"], "expert_dtype 'fp4'"),
        ({"activation_scheme": "sometimes"}, ["m.weight_scale"], "activation_scheme 'sometimes'"),
        ({"modules_to_convert": ["embed_tokens"]}, ["m.weight_scale"], "modules_to_convert"),
        ({"weight_block_size": [128]}, ["m.weight_scale"], "weight_block_size"),
        ({"weight_block_size": [0, 128]}, ["m.weight_scale"], "weight_block_size"),
        ({"kv_cache": True}, ["m.weight_scale"], "unknown key 'kv_cache'"),
        (
            {},
            ["experts.gate_up_proj_scale_inv"],
            "experts.gate_up_proj_scale_inv scales fused experts",
        ),
    ],
)
def test_configs_that_qlab_does_not_read_are_refused_by_name(change, names, message):
    with pytest.raises(QlabError, match=message):
        CODEC.specs(CONFIG | change, names)


def test_it_is_read_only_and_says_so():
    q = QTensor(CODES, SCALES, None, BLOCKS)
    for refuse in (lambda: CODEC.encode("m", q), lambda: CODEC.config({"m": BLOCKS})):
        with pytest.raises(
            QlabError, match="qlab reads fp8 and does not write it; use compressed-tensors"
        ):
            refuse()
    assert "does not write it" in CODEC.refusal(BLOCKS)
    with pytest.raises(
        QlabError, match="m has no scale for its inputs where these are fp8-tensor static"
    ):
        CODEC.decode_input("m", stored(), InputSpec(parse_spec("fp8-tensor"), True))
    with pytest.raises(QlabError, match="m has input_scale where these are fp8-g4"):
        CODEC.decode_input("m", stored(input_scale=torch.ones(1)), InputSpec(parse_spec("fp8-g4")))
