"""Steps that compare with the reference behind those that turn a whole block: they run input by
input, on what those before them made, and the reference is in the same basis."""

import pytest
from model_folders import random_tokens

import qlab
from qlab.algebra.transform import each_cell

TURNED = qlab.chain(qlab.rotate_residual(), qlab.quarot())
ROUNDED = qlab.quantize_inputs("int4-channel")


def drifts(path, *steps):
    """Weight -> the drift of its input behind these steps, as a share of the second moment."""
    seen = {}

    def look(weight):
        drift, moment = (weight.stats[need].sum_kk for need in ("drift", "second_moment"))
        seen[weight.name] = float(drift.norm() / moment.norm())
        return weight.cell

    # inputs of routed experts have no drift
    looked = qlab.at("*.self_attn.*", each_cell("look", look, {"second_moment", "drift"}))
    recipe = qlab.chain(TURNED, *steps, looked)
    data = random_tokens(path, samples=1)
    qlab.logits(qlab.apply(qlab.open(path), recipe, data), data.ids)
    return seen


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_drift_behind_turns_is_of_what_was_rounded_before(family, saved):
    """Inputs of the first block that are rounded reach what comes behind them in it. Without
    rounding there is no drift: the reference is in the basis of the block."""
    path = saved(family)
    drift, none = drifts(path, ROUNDED), drifts(path)
    first = [drift[name] for name in drift if ".0." in name]
    assert min(first) == 0 and max(first) > 0.01
    assert none and max(none.values()) < 1e-4


def test_a_target_behind_turns_brings_the_model_nearer_to_the_reference(saved):
    """What an aim in the stream changes is towards the reference's logits."""
    path = saved()
    model, data = qlab.open(path), random_tokens(path, samples=24, length=64)
    reference = qlab.logits(model, data.ids)

    def error(*aims):
        applied = qlab.apply(model, qlab.chain(TURNED, ROUNDED, *aims), data)
        return float((qlab.logits(applied, data.ids) - reference).square().mean())

    assert error(qlab.aim_in_stream()) < error()
