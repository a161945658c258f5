"""Methods that were written from the manual alone, from the first figure to the verified folder."""

import pytest
import torch
from model_folders import random_tokens, refused
from newcomer_steps import NEWCOMER_STEPS, UNHELD
from own_steps import OWN_STEPS, UNWRITTEN

import qlab

CODECS = {"llama": "compressed-tensors", "gpt2": "gptq", "qwen3_moe": "compressed-tensors"}
STEPS, REFUSED = {**OWN_STEPS, **NEWCOMER_STEPS}, {**UNWRITTEN, **UNHELD}
PLAIN = ("codebook",)  # numbers without a grid


@pytest.mark.parametrize("family", CODECS)
@pytest.mark.parametrize("step", [step for step in STEPS if step not in PLAIN])
def test_what_is_applied_is_what_is_written_or_is_refused_by_name(saved, tmp_path, step, family):
    model = qlab.open(saved(family, torch.bfloat16))
    data, held_out = (random_tokens(model.path, seed=seed) for seed in (0, 1))
    recipe, out = STEPS[step](qlab.parse_spec("int4-g16")), tmp_path / "out"
    applied = qlab.apply(model, recipe, data)
    kl = qlab.evaluate(applied, model, held_out).kl
    assert 0 < kl < 0.5
    if step in REFUSED:
        refused(lambda: qlab.write(applied, out, codec=CODECS[family]), REFUSED[step])
        assert not out.exists()
        return
    qlab.write(applied, out, codec=CODECS[family])
    assert qlab.verify(out, model).faults == []
    assert qlab.evaluate(qlab.open(out), model, held_out).kl == pytest.approx(kl, rel=1e-3)
