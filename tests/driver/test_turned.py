"""Steps that compare with the reference behind those that turn a whole block: they run input by
input, on what those before them made, and the reference is in the same basis."""

import pytest
from model_folders import random_tokens

import qlab
from qlab.algebra.transform import each_cell

TURNED = qlab.chain(qlab.rotate_residual(), qlab.quarot())
ROUNDED = qlab.quantize_inputs("int4-channel")


BIND = qlab.bind("nothing", lambda model: 0, lambda value: qlab.keep())
SMOOTHED = qlab.smoothquant()
SCALED = qlab.awq_scale("int4-g32")
MLP_ROUNDED = qlab.at("*.layers.1.mlp.*", qlab.rtn("int4-g32"))
TURNS = {
    "llama, folded and at run time": ("llama", TURNED),
    "mixtral, folded and at run time": ("mixtral", TURNED),
    "llama, by statistics": ("llama", SMOOTHED),
    "mixtral, by statistics": ("mixtral", SMOOTHED),
    # several inputs are made of the norm in front of a mixture
    "mixtral, input by input elsewhere": ("mixtral", SCALED),
    "qwen3_moe, by statistics behind a rotation": (
        "qwen3_moe",
        qlab.chain(qlab.rotate_heads(), SCALED),
    ),
    "llama, in front of a bind": ("llama", qlab.chain(TURNED, BIND)),
    "mixtral, heads in front of a bind": ("mixtral", qlab.chain(qlab.rotate_heads(), BIND)),
    "llama, by statistics in front of a bind": ("llama", qlab.chain(SMOOTHED, BIND)),
    "llama, and another behind it": ("llama", qlab.chain(qlab.rotate_heads(), BIND, SMOOTHED)),
    "llama, rounded in front of it": (
        "llama",
        qlab.chain(qlab.rotate_heads(), MLP_ROUNDED, BIND),
    ),
}


def drifts(path, turned, *steps):
    """Weight -> the drift of its input behind these steps, as a share of the second moment."""
    seen = {}

    def look(weight):
        drift, moment = (weight.stats[need].sum_kk for need in ("drift", "second_moment"))
        seen[weight.name] = float(drift.norm() / moment.norm())
        return weight.cell

    # inputs of routed experts have no drift
    looked = qlab.at("*.self_attn.*", each_cell("look", look, {"second_moment", "drift"}))
    recipe = qlab.chain(turned, *steps, looked)
    data = random_tokens(path, samples=1)
    qlab.logits(qlab.apply(qlab.open(path), recipe, data), data.ids)
    return seen


@pytest.mark.parametrize("case", TURNS)
def test_a_drift_behind_turns_is_of_what_was_rounded_before(case, saved):
    """Inputs of the first block that are rounded reach what comes behind them in it. Without
    rounding there is no drift: the reference is in the basis of the block."""
    family, turned = TURNS[case]
    path = saved(family)
    drift, none = drifts(path, turned, ROUNDED), drifts(path, turned)
    first = [drift[name] for name in drift if ".layers.0." in name]
    # a turn at another place of the program rounds what is the same otherwise
    assert min(first) < 1e-6 and max(first) > 0.01
    unrounded = [none[name] for name in none if ".layers.0." in name]
    assert unrounded and max(unrounded) < 1e-4


def test_a_reference_that_nothing_can_turn_is_refused_beforehand(saved):
    path = saved()
    aims = qlab.at("*.self_attn.*", qlab.aim_at_reference())
    recipe = qlab.chain(
        SMOOTHED, MLP_ROUNDED, BIND, aims, qlab.at("*.self_attn.*", qlab.rtn("int4-g32"))
    )
    words = (
        "aim_at_reference compares with the reference behind nothing, and smoothquant turned what "
        "was rounded in front of that by statistics, .*; put nothing in front of smoothquant$"
    )
    with pytest.raises(qlab.QlabError, match=words):
        qlab.plan(qlab.open(path), recipe, random_tokens(path))


MASKED = qlab.magnitude("2:4")
LATE = {
    "a mask": (qlab.chain(MASKED, qlab.rotate_heads()), "rotate_heads", "magnitude"),
    "rounded keys": (qlab.chain(qlab.kv_cache("int8-head"), SMOOTHED), "smoothquant", "kv_cache"),
    "inputs that are rounded": (
        qlab.chain(ROUNDED, qlab.quarot()),
        "rotate_heads",
        "quantize_inputs",
    ),
}


@pytest.mark.parametrize("case", LATE)
def test_a_turn_of_all_inputs_that_does_not_come_first_is_refused_in_front_of_an_aim(case, saved):
    steps, turning, front = LATE[case]
    path = saved()
    recipe, data = qlab.chain(steps, qlab.gptaq("int4-g32")), random_tokens(path)
    words = f"aim_at_reference compares .* {turning}.* of model.layers.0 at once behind {front},"
    for run in (qlab.plan, qlab.apply):
        with pytest.raises(qlab.QlabError, match=words):
            run(qlab.open(path), recipe, data)
    without = qlab.chain(steps, qlab.gptq("int4-g32"))
    assert qlab.apply(qlab.open(path), without, data).plan.sites


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_plan_says_that_aims_behind_scales_run_input_by_input(family, saved):
    path = saved(family)
    recipe = qlab.chain(SMOOTHED, qlab.gptaq("int4-g32"))
    rows = qlab.plan(qlab.open(path), recipe, random_tokens(path)).schedule
    when = {row.step: (row.when, row.passes) for row in rows}
    assert when["smoothquant"] == ("all inputs at once", 1)
    assert when["aim_at_reference"][0] == "input by input"


def test_a_target_behind_turns_brings_the_model_nearer_to_the_reference(saved):
    """What an aim in the stream changes is towards the reference's logits."""
    path = saved()
    model, data = qlab.open(path), random_tokens(path, samples=24, length=64)
    reference = qlab.logits(model, data.ids)

    def error(*aims):
        applied = qlab.apply(model, qlab.chain(TURNED, ROUNDED, *aims), data)
        return float((qlab.logits(applied, data.ids) - reference).square().mean())

    assert error(qlab.aim_in_stream()) < error()
