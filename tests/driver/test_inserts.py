"""Inserts on values of whole models: evaluated without a format, and refused where none holds
them; static inputs as files."""

import warnings

import pytest
import torch
from model_folders import random_tokens

import qlab
from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import parse_spec
from qlab.errors import QlabError


def windows(model, text):
    return qlab.tokens(model, text, samples=4, length=32)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_a_rounded_cache_is_part_of_what_a_recipe_makes(saved, text, family):
    model = qlab.open(saved(family))
    rtn, data = qlab.rtn(parse_spec("int8-channel")), windows(model, text)
    recipe = qlab.chain(rtn, qlab.kv_cache("int4-head"))
    blocks = dict(qlab.apply(model, recipe, data).segments())
    for path, block in blocks.items():
        assert list(block.inserts) == ["self_attn:key", "self_attn:value"], path
    plain = qlab.perplexity(qlab.apply(model, rtn, None), data).perplexity
    cached = qlab.perplexity(qlab.apply(model, recipe, data), data).perplexity
    assert cached != plain


@pytest.mark.parametrize(
    "stage, codec, words",
    [
        (qlab.kv_cache("int8-token"), "compressed-tensors", "no scale per token of all heads"),
        (qlab.kv_cache("int8-tensor-asym"), "compressed-tensors", "no int8-tensor-asym there"),
        (qlab.kv_cache("int5-head"), "compressed-tensors", "holds symmetric int4, int8 and fp8"),
        (qlab.kv_cache("int4-g8"), "gptq", r"puts operations on .*self_attn:"),
        (qlab.rotate_scores(), "awq", r"puts operations on .*self_attn:"),
        (
            qlab.insert("mine", "*:key", lambda wire, stats: torch.neg),
            "compressed-tensors",
            r"puts operations on .*self_attn:",
        ),
        (
            qlab.insert("mine", "*.mlp.act_fn:out", lambda wire, stats: torch.neg),
            "compressed-tensors",
            r"puts operations on .*mlp.act_fn:out",
        ),
        (
            qlab.chain(qlab.kv_cache("int8-head"), qlab.kv_cache("int8-head")),
            "compressed-tensors",
            "turns a value once and then rounds it",
        ),
        (
            qlab.chain(qlab.kv_cache("int8-head"), qlab.rotate_scores()),
            "compressed-tensors",
            "turns a value once and then rounds it",
        ),
        (
            qlab.at("*.0.*", qlab.kv_cache("fp8-tensor")),
            "compressed-tensors",
            r"layers.1.self_attn does not round its keys and values as .*layers.0.self_attn does",
        ),
        (
            qlab.at("*:key", qlab.kv_cache("fp8-tensor")),
            "compressed-tensors",
            "rounds keys and values, or queries too, and not key alone",
        ),
    ],
)
def test_what_the_format_does_not_hold_is_refused_before_any_work(saved, text, stage, codec, words):
    model = qlab.open(saved("llama", torch.float16))
    recipe = qlab.chain(qlab.rtn("int4-g32"), stage)
    with pytest.raises(QlabError, match=words):
        qlab.plan(model, recipe, windows(model, text), codec=codec)


def test_a_pattern_without_a_wire_is_refused_with_the_nearest(saved):
    model = qlab.open(saved("llama"))
    stray = qlab.insert("stray", "*.self_attn:keys", lambda wire, stats: torch.neg)
    with pytest.raises(QlabError, match=r"'stray' matches no wire .*self_attn:key"):
        qlab.plan(model, qlab.chain(qlab.rtn("int4-g32"), stray))


def test_blocks_whose_programs_show_no_attention_are_named(saved):
    model, rtn = qlab.open(saved("lfm2")), qlab.rtn("int4-g16")
    cache = qlab.kv_cache("int8-token")
    with pytest.warns(UserWarning, match=r"kv_cache leaves model\.layers\.1 as they are: .*no att"):
        planned = qlab.apply(model, qlab.chain(rtn, cache), None).plan
    assert [list(row.unseen) for row in planned.schedule] == [[], ["model.layers.1"]]
    assert planned.json()["schedule"][1]["unseen"] == ["model.layers.1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        meant = qlab.at("*.layers.0.*", cache)
        (_, row) = qlab.apply(model, qlab.chain(rtn, meant), None).plan.schedule
        qlab.apply(qlab.open(saved("llama")), qlab.chain(rtn, cache), None).plan.json()
    assert row.unseen == [] and row.wires == 2


@pytest.mark.parametrize("static", list(qlab.RANGES))
@pytest.mark.parametrize("spec", ["int8-tensor", "fp8-tensor", "nvfp4"])
def test_static_inputs_are_written_and_read(saved, text, tmp_path, spec, static):
    model = qlab.open(saved("llama"))
    data = windows(model, text)
    weights = "nvfp4" if spec == "nvfp4" else spec.replace("tensor", "channel")
    recipe = qlab.chain(qlab.rtn(weights), qlab.quantize_inputs(spec, static=static))
    qlab.quantize(model, recipe, data, tmp_path / "out")
    read = qlab.open(tmp_path / "out")
    assert {str(s) for s in read.inputs.values()} == {f"{spec} static"}
    ours = qlab.perplexity(qlab.apply(model, recipe, data), data).perplexity
    assert qlab.perplexity(read, data).perplexity == pytest.approx(ours, rel=1e-3)


WIRES = (
    *("down_proj:in", "down_proj:out", "key", "value", "enter", "leave"),
    "input_layernorm:out",
)


@pytest.mark.parametrize("inputs", ["quantized", "reference"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_inserts_reach_their_wires_in_every_block(saved, family, inputs):
    model, reached = qlab.open(saved(family)), []

    def marking(pattern):
        def mark(wire, stats):
            assert "absmax" in stats
            return lambda x: reached.append((pattern, wire.where)) or x

        name = f"*.{pattern}" if ":" in pattern else f"*:{pattern}"
        return qlab.insert(f"mark {pattern}", name, mark, needs={"absmax"})

    recipe = qlab.chain(qlab.rtn(qlab.parse_spec("int4-g16")), *map(marking, WIRES))
    value = qlab.apply(model, recipe, random_tokens(model.path), inputs=inputs)
    qlab.logits(value, torch.arange(3, 11)[None])
    assert all(name.endswith(wire) for wire, name in reached)
    blocks = {(wire, name.partition(":")[0].split(".")[2]) for wire, name in reached}
    assert blocks == {(wire, block) for wire in WIRES for block in "01"}


def test_values_that_a_step_makes_nan_are_refused_by_its_name(saved, text):
    model = qlab.open(saved("llama"))
    data = windows(model, text)
    nan = qlab.insert("broken", "*:value", lambda wire, stats: lambda x: x * float("nan"))
    recipe = qlab.chain(qlab.rtn(parse_spec("int8-channel")), nan)
    with pytest.raises(QlabError, match="NaN or Inf in window 0 behind rtn, broken; look at"):
        qlab.evaluate(qlab.apply(model, recipe, data), model, data)


def test_what_an_undeclared_insert_makes_is_asked_about_before_any_work(saved):
    """A rounding has a place in the format. Another function has none, unless a later step folds
    it; statistics of it are of random rows."""
    model, int8 = qlab.open(saved("llama", torch.float16)), parse_spec("int8-channel")
    data = random_tokens(model.path)
    makes = {
        "rounds": (lambda wire, stats: QuantizeInput(int8), ()),
        "halves": (lambda wire, stats: lambda x: x / 2, ()),
        "clips": (lambda wire, stats: lambda x: x.clamp(max=stats["absmax"].max()), ("absmax",)),
        "fails": (lambda wire, stats: lambda x: x @ x.new_ones(3), ()),
    }
    recipes = {
        name: qlab.chain(qlab.rtn(int8), qlab.insert(name, "*.down_proj:in", make, needs))
        for name, (make, needs) in makes.items()
    }
    assert qlab.plan(model, recipes["rounds"], data).bits_per_weight < 9
    for name in ("halves", "clips"):
        with pytest.raises(QlabError, match=r"layers.0.mlp.down_proj.* no run-time function"):
            qlab.plan(model, recipes[name], data)
        assert qlab.apply(model, recipes[name], data).bits_per_weight < 9
    with pytest.raises(QlabError, match=r"'fails' .* fails on \(1, 32, 128\) in torch.float16"):
        qlab.apply(model, recipes["fails"], data)
