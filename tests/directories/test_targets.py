"""Engines' limits are checked when the plan is made, with the sites, and with the nearest thing
that fits."""

import pytest
import torch

from qlab.algebra.spec import Int, parse_spec
from qlab.algebra.transform import keep, rules
from qlab.codecs import storable
from qlab.codecs.engines import TARGETS, Floats, refusal, safest_codec, uniformity
from qlab.driver.plan import plan
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.rtn import rtn

CT = "compressed-tensors"


@pytest.mark.parametrize(
    "target, codec, spec, experts, expected",
    [
        ("vllm", CT, "int4-g128", False, None),
        ("vllm", CT, "int4-g128-asym", False, None),
        (
            "vllm",
            CT,
            "int4-g128-asym",
            True,
            "the nearest it loads is int4-g128 with the codec compressed-tensors",
        ),
        ("vllm", CT, "int4-g16", False, "the nearest it loads is int4-g32 with"),
        ("vllm", CT, "int4-tensor", False, "the nearest it loads is int4-channel"),
        ("vllm", "gptq", "int4-g128-asym", False, "the codec awq holds them"),
        ("vllm", "gptq", "int3-g128", False, "the codec compressed-tensors holds them"),
        ("vllm", CT, "int1-g128", False, "the nearest it loads is int2-g128"),
        ("vllm", CT, "mxfp6", False, "the nearest it loads is"),
        ("vllm", CT, "nvfp4", False, None),
        ("lmdeploy", "awq", "int4-g128", False, None),
        ("lmdeploy", "awq", "int4-g64", False, "the nearest it loads is"),
        ("lmdeploy", CT, "int4-g32", False, None),
        ("lmdeploy", CT, "int8-g128", False, "the nearest it loads is int4-g128"),
        ("lmdeploy", "gptq", "int4-g128", False, None),
        ("transformers", CT, "int4-g64", False, None),
        ("transformers", CT, "int4-g64-asym", False, "the codec awq holds them"),
        ("transformers", "gptq", "int3-g64", False, None),
        ("transformers", "gptq", "int3-g64-asym", False, "the codec gptq_v2 holds them"),
        ("transformers", "gptq_v2", "int3-g64-asym", False, None),
        ("sglang", CT, "int4-g128", False, None),
        ("sglang", CT, "int4-g128-asym", False, None),
        ("sglang", CT, "int8-channel-asym", False, None),
        ("sglang", CT, "int4-g128-asym", True, "the nearest it loads is int4-g128 with"),
        ("sglang", CT, "int4-g16", False, "the nearest it loads is int4-g32 with"),
        ("lmdeploy", CT, "int4-g64", False, "the nearest it loads is int4-g"),
        ("lmdeploy-turbomind", CT, "int4-g128-asym", False, None),
        ("lmdeploy-turbomind", CT, "int4-channel", False, "the nearest it loads is int4-g128"),
        ("lmdeploy-pytorch", CT, "int4-g32", False, "the nearest it loads is int4-g128 with the"),
        ("lmdeploy-pytorch", CT, "int4-g32", True, None),
        ("lmdeploy-pytorch", CT, "int4-g32-asym", True, "the nearest it loads is int4-g32 with"),
        ("lmdeploy-pytorch", "awq", "int4-g128-asym", False, None),
        ("lmdeploy-pytorch", "awq", "int4-g128", True, "the codec"),
    ],
)
def test_what_an_engine_loads(target, codec, spec, experts, expected):
    reason = refusal(target, codec, parse_spec(spec), experts)
    if expected is None:
        assert reason is None
    else:
        assert reason is not None and f"{target} loads no {spec}" in reason and expected in reason


@pytest.mark.parametrize("target", TARGETS)
def test_the_nearest_thing_is_itself_loaded(target):
    for text in ("int1-g16", "int6-g256-asym", "int8-b64x64", "fp8-g64", "mxfp6", "int4-g128-asym"):
        for experts in (False, True):
            reason = refusal(target, "nothing", parse_spec(text), experts)
            assert reason is not None
            if "the nearest it loads is " in reason:
                near, codec = reason.split("the nearest it loads is ")[1].split(" with the codec ")
                assert refusal(target, codec, parse_spec(near), experts) is None


def test_the_nearest_group_divides_the_channels():
    assert "is int4-channel with" in str(
        refusal("vllm", CT, Int(4, parse_spec("int4-g16").tile), k=80)
    )


@pytest.mark.parametrize(
    "target, spec, codec",
    [
        ("vllm", "int4-g128", CT),
        ("vllm", "int4-g128-asym", "awq"),
        ("vllm", "int8-channel", CT),
        ("vllm", "int3-g64", CT),
        ("vllm", "fp8-channel", CT),
        ("lmdeploy", "int4-g128-asym", CT),
        ("lmdeploy", "int4-g128", CT),
        ("transformers", "int4-g64-asym", "awq"),
        ("sglang", "int4-g16", CT),
        ("transformers", "int3-g64-asym", "gptq_v2"),
        ("sglang", "int4-g128", CT),
    ],
)
def test_the_safest_codec(target, spec, codec):
    assert safest_codec(target, parse_spec(spec)) == codec


def test_an_engine_that_reads_one_spec_for_all():
    two = {"a": parse_spec("int4-g128"), "b": parse_spec("int4-g32")}
    assert (
        uniformity("lmdeploy", two)
        == "lmdeploy reads one spec for all weights, not int4-g128, int4-g32"
    )
    assert uniformity("vllm", two) is None and uniformity("lmdeploy", {"a": two["a"]}) is None


def test_the_plan_names_the_sites_and_what_fits(saved):
    model = open_checkpoint(saved("llama", torch.float16))
    recipe = rules({"*.down_proj": rtn(parse_spec("int4-g16")), "*": rtn(parse_spec("int4-g32"))})
    with pytest.raises(QlabError) as error:
        plan(model, recipe, target="vllm")
    message = str(error.value)
    assert message.startswith(
        "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj: vllm loads no int4-g16"
    )
    assert "the nearest it loads is int4-g32 with the codec compressed-tensors" in message
    with pytest.raises(QlabError, match="lmdeploy reads one spec for all weights"):
        plan(
            model,
            rules(
                {"*.down_proj": rtn(parse_spec("int4-g32-asym")), "*": rtn(parse_spec("int4-g32"))}
            ),
            target="lmdeploy",
        )
    mistral = open_checkpoint(saved("mistral", torch.float16))
    with pytest.raises(QlabError, match="lmdeploy builds no MistralForCausalLM; lmdeploy-pytorch"):
        plan(mistral, rtn(parse_spec("int4-g32")), target="lmdeploy")
    with pytest.raises(QlabError, match="the target 'tensorrt' is unknown"):
        plan(model, rtn(parse_spec("int4-g32")), target="tensorrt")
    assert plan(model, rtn(parse_spec("int4-g32")), target="vllm").sites


@pytest.mark.parametrize(
    "family, pattern, sites",
    [
        (
            "llama",
            "*.q_proj",
            "self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj",
        ),
        ("llama", "*.gate_proj", "mlp.gate_proj, model.layers.0.mlp.up_proj"),
        ("llama", "*.down_proj", None),
        ("llama", "*.o_proj", None),
        (
            "mixtral",
            "*.down_proj",
            "mlp.experts.gate_up_proj, model.layers.0.mlp.experts.down_proj",
        ),
        ("mixtral", "*.self_attn.*", None),
    ],
)
@pytest.mark.parametrize("other", ["int8-g32", None])
def test_weights_that_an_engine_joins_have_one_spec(family, pattern, sites, other, saved):
    model = open_checkpoint(saved(family, torch.float16))
    recipe = rules(
        {pattern: rtn(parse_spec(other)) if other else keep(), "*": rtn(parse_spec("int4-g32"))}
    )
    assert plan(model, recipe, target="transformers").sites
    if sites is None:
        assert plan(model, recipe, target="vllm").sites
    else:
        words = (
            "vllm joins these weights and reads one spec for them, not int4-g32, "
            f"{other or 'unquantized'}"
        )
        with pytest.raises(QlabError, match=f"^model.layers.0.{sites}.*: {words}"):
            plan(model, recipe, target="vllm")


def test_blocks_that_an_engine_wants_whole():
    spec = parse_spec("fp8-b128x128")
    assert refusal("vllm", CT, spec, k=256) is refusal("transformers", CT, spec, k=96) is None
    assert refusal("vllm", CT, spec, k=96) == (
        "vllm loads fp8-b128x128 weights where 128 divides their input channels, of which there "
        "are 96; the nearest it loads is fp8-channel with the codec compressed-tensors"
    )


def test_what_is_listed_names_codecs_and_specs_that_exist():
    for target in TARGETS.values():
        for row in target.rows:
            assert row.codec in (CT, "awq", "gptq", "gptq_v2")
            assert (
                row.specs if isinstance(row, Floats) else row.bits and row.tiles and row.symmetric
            )


def test_scales_are_stored_in_a_dtype_that_the_codec_has():
    spec = parse_spec("int4-g32")
    assert storable(spec, CT, torch.bfloat16) == spec
    assert storable(spec, "nothing", torch.float32) == spec


def test_scales_become_halves_where_the_codec_has_no_other(four_bits):
    spec = parse_spec("int4-g32-asym")
    assert storable(spec, four_bits, torch.float32).scale_dtype == torch.float16
    assert storable(parse_spec("int8-channel"), four_bits, torch.float32).scale_dtype is None


def test_rows_that_fill_no_words_are_refused_when_the_plan_is_made(saved):
    model = open_checkpoint(saved("llama", torch.float16, intermediate_size=100))
    recipe = rtn(parse_spec("int4-channel"))
    for codec in ("awq", "gptq"):
        with pytest.raises(QlabError, match=r"layers.0.mlp.gate_proj, .*100.* do not fill"):
            plan(model, recipe, codec=codec)
    assert plan(model, recipe).sites


def test_what_no_configuration_can_say_is_refused_when_the_plan_is_made(saved):
    model = open_checkpoint(saved("llama", torch.float16))
    recipe = rules({"*.down_proj": rtn(parse_spec("int4-g64")), "*": rtn(parse_spec("int4-g32"))})
    with pytest.raises(QlabError, match=r"(?i)awq"):
        plan(model, recipe, codec="awq")
    assert plan(model, recipe, codec="gptq").sites
