"""Steps of one's own that go wrong are refused in one sentence that says where."""

from functools import partial

import pytest
import torch
from model_folders import random_tokens, refused

import qlab

INT4 = qlab.parse_spec("int4-g16")
KEY = "model.layers.0.self_attn:key"
PLACES = {"llama": "model.layers.0.", "gpt2": "transformer.h.0.", "qwen3_moe": "model.layers.0."}


def inserted(run, **needs):
    return qlab.chain(qlab.rtn(INT4), qlab.insert("mine", "*:key", run, **needs))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda wire, stats: lambda x: x[..., :2], (KEY, "made (1, 32, 2) of (1, 32, 32)")),
        (lambda wire, stats: lambda x: None, (KEY, "made a NoneType of (1, 32, 32)")),
        (lambda wire, stats: lambda x: x[..., :0].mean(), (KEY, "made () of")),
        (lambda wire, stats: stats["absmax"].max, (KEY, "'absmax'", "has none", "`needs`")),
        (lambda wire, stats: None, (KEY, "return a function x -> x")),
    ],
)
def test_an_insert_that_makes_no_value_names_its_wire(saved, make, words):
    model = qlab.open(saved("llama"))
    refused(lambda: qlab.plan(model, inserted(make), random_tokens(model.path)), *words)


@pytest.mark.parametrize("wire", ["*:enter", "*.q_proj:in", "*.down_proj:out"])
def test_an_insert_that_writes_to_its_value_names_its_wire(saved, wire):
    model = qlab.open(saved("llama"))
    step = qlab.insert("mine", wire, lambda wire, stats: lambda x: x.mul_(2))
    recipe = qlab.chain(qlab.rtn(INT4), step)
    refused(lambda: qlab.plan(model, recipe), wire[2:], "model.layers.0", "writes to the value")


def test_what_an_insert_returns_has_the_dtype_of_its_value(saved):
    model, ids = qlab.open(saved("llama")), torch.arange(3, 11)[None]
    plain, wide = (
        qlab.logits(qlab.apply(model, inserted(make), None), ids)
        for make in (lambda *_: lambda x: x / 2, lambda *_: lambda x: x.double() / 2)
    )
    assert torch.equal(plain, wide)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_statistic_that_was_not_asked_for_names_the_place(saved, family):
    model = qlab.open(saved(family))
    data = random_tokens(model.path)
    gauge = qlab.gauge("mine", "*:in", lambda turn: turn.sources()[0].stats["absmax"])
    block = qlab.each_block(
        "mine", lambda block: block.stats[block.segment.sites[-1].path]["absmax"]
    )
    for step in (gauge, block):
        value = qlab.apply(model, qlab.chain(step, qlab.rtn(INT4)), data)
        refused(partial(list, value.segments()), PLACES[family], "'absmax'", "none")


def test_a_grid_that_was_not_planned_is_refused_and_nothing_is_written(saved, tmp_path):
    model = qlab.open(saved("llama"))
    narrows = qlab.each_cell("mine", lambda weight: weight.cell.narrow(spec=INT4))
    refused(
        lambda: qlab.quantize(model, qlab.chain(narrows, qlab.rtn(INT4)), None, tmp_path / "q"),
        "layers.0.self_attn.q_proj",
        "narrows the grid to int4-g16",
        "planned without one",
    )
    assert not (tmp_path / "q").exists()


def test_a_gauge_sees_a_statistic_of_ones_own_by_its_name(saved):
    model = qlab.open(saved("qwen3_moe"))
    peak = qlab.Stat(lambda seen: seen.x_nk.abs().amax(0).float(), torch.maximum, name="peak")
    seen = []

    def look(turn):
        seen.extend(source.stats["peak"].shape for source in turn.sources())

    step = qlab.gauge("look", "*:in", look, needs={peak})
    value = qlab.apply(model, qlab.chain(step, qlab.rtn(INT4)), random_tokens(model.path))
    list(value.segments())
    assert {tuple(shape) for shape in seen} == {(64,), (32,)}


def test_a_call_with_wrong_arguments_names_the_function():
    with pytest.raises(TypeError, match=r"^rtn\(\) of qlab: missing a required argument: 'spec'"):
        qlab.rtn()


@pytest.mark.parametrize("prune", [qlab.magnitude, qlab.wanda, qlab.sparsegpt])
def test_patterns_without_groups_in_a_weight_are_refused_by_the_plan(prune, saved):
    model = qlab.open(saved("llama"))
    data = random_tokens(model.path)
    recipe = qlab.chain(prune("3:7"), qlab.rtn("int4-g16"))
    refused(lambda: qlab.plan(model, recipe, data), "q_proj", "no multiple of 7, so 3:7 has no")
    partly = qlab.chain(qlab.at("*.down_proj", prune("3:8")), qlab.rtn("int4-g16"))
    assert qlab.plan(model, partly, data)
