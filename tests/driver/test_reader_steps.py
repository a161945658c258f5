"""Methods that a reader of the manual wrote, from the first figure to the verified folder."""

import pytest
import torch
from model_folders import random_tokens, refused
from reader_steps import READER_STEPS, UNHELD_READER, WHOLE_READER_STEPS

import qlab

STEPS = {**READER_STEPS, **WHOLE_READER_STEPS}
FAMILY = dict.fromkeys(STEPS, "llama") | {"counted": "qwen3_moe"}


@pytest.mark.parametrize("step", STEPS)
def test_what_a_reader_applies_is_what_is_written_or_is_refused_by_name(saved, tmp_path, step):
    model = qlab.open(saved(FAMILY[step], torch.bfloat16))
    data, held_out = (random_tokens(model.path, seed=seed) for seed in (0, 1))
    recipe, out = STEPS[step](qlab.parse_spec("int4-g16")), tmp_path / "out"
    applied = qlab.apply(model, recipe, data)
    kl = qlab.evaluate(applied, model, held_out).kl
    assert 0 < kl < 0.5
    if step in UNHELD_READER:
        refused(lambda: qlab.write(applied, out), UNHELD_READER[step])
        assert not out.exists()
        return
    qlab.write(applied, out)
    assert qlab.verify(out, model).faults == []
    assert qlab.evaluate(qlab.open(out), model, held_out).kl == pytest.approx(kl, rel=1e-3)
