"""The schedule of a plan: its steps in running order, and the passes over the samples."""

import json

import pytest
from model_folders import random_tokens

import qlab
from qlab.algebra.insert import insert
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at, chain, outside
from qlab.driver.apply import apply
from qlab.driver.observe import observe
from qlab.driver.plan import plan
from qlab.driver.schedule import rounds
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.auto_round import auto_round_refine
from qlab.methods.awq import awq
from qlab.methods.gptaq import gptaq
from qlab.methods.gptq import gptq
from qlab.methods.rotate import rotate_online
from qlab.methods.rtn import rtn
from qlab.methods.smoothquant import smoothquant

INT4, NVFP4 = parse_spec("int4-g16"), parse_spec("nvfp4")
PER_TENSOR = qlab.quantize_inputs("int8-tensor", static="absmax")


@pytest.fixture(scope="module")
def source(saved):
    return saved("llama")


@pytest.fixture(scope="module")
def model(source):
    return open_checkpoint(source)


def steps_of(planned):
    return [(row.step, row.where, row.when, row.passes) for row in planned.schedule]


def test_the_schedule_has_the_steps_in_the_order_in_which_they_run(model, source):
    recipe = chain(awq(INT4), auto_round_refine(steps=2), outside(rtn(parse_spec("int8-channel"))))
    planned = plan(model, recipe, random_tokens(source))
    assert steps_of(planned) == [
        ("rtn", "around the blocks", "", 0),
        ("awq_scale", "2 blocks", "input by input", 1),
        ("rtn", "2 blocks", "input by input", 0),
        ("absorb", "2 blocks", "when all inputs are done", 0),
        ("auto_round_refine", "2 blocks", "when the steps above are done", 0),
    ]
    assert [row.weights for row in planned.schedule] == [1, 14, 14, 14, 14]
    assert planned.schedule[-1].windows == 16 and planned.schedule[1].observes == [
        "absmean",
        "second_moment",
    ]
    assert json.loads(json.dumps(planned.json()))["schedule"][0]["sees"] == "each weight"
    keys = insert("halve", "*:key", lambda wire, stats: lambda x: x / 2)
    (_, row) = apply(model, chain(rtn(INT4), keys), None).plan.schedule
    assert (row.sees, row.wires, row.weights) == ("each wire", 2, 0)


OBSERVING = [
    chain(smoothquant(), gptq(INT4)),
    chain(smoothquant(), awq(INT4)),
    chain(rotate_online(), rtn(INT4), PER_TENSOR),
    # absmax is not known of inputs that turned
    chain(smoothquant(), rotate_online(), rtn(NVFP4), qlab.quantize_inputs(NVFP4)),
    chain(at("*.mlp.*", gptq(INT4)), at("*.self_attn.*", awq(INT4))),
    awq(NVFP4),
]


# gptaq is for quantized inputs alone.
@pytest.mark.parametrize(
    "recipe, inputs",
    [
        *[(recipe, "quantized") for recipe in (*OBSERVING, gptaq(INT4))],
        *[(recipe, "reference") for recipe in OBSERVING],
    ],
)
def test_passes_are_those_that_the_run_makes(recipe, inputs, model, source, monkeypatch):
    counted = []

    def counting(graph, *args, **kwargs):
        counted.append(graph.path)
        return observe(graph, *args, **kwargs)

    monkeypatch.setattr("qlab.driver.segments.observe", counting)
    data = random_tokens(source)
    applied = apply(model, recipe, data, inputs=inputs)
    list(applied.segments())
    together = rounds(applied.plan.schedule)
    assert counted.count("model.layers.0") == counted.count("model.layers.1") == together
    assert applied.plan.passes == max(1, together) + 1 if together else 1
