"""Methods that turn or measure the whole model, by their names: written, read back and verified."""

import pytest
import torch
from model_folders import random_tokens
from quick import QUICK, WHOLE

import qlab
from qlab.algebra.spec import parse_spec

INT8 = parse_spec("int8-channel")


@pytest.mark.parametrize(
    "name, family",
    [
        *[(name, "llama") for name in WHOLE],
        ("spinquant", "mixtral"),
        ("guidedquant", "phi3"),
    ],
)
def test_it_is_written_as_it_is_evaluated(name, family, saved, tmp_path):
    source = saved(family)
    model, data = qlab.open(source), random_tokens(source)
    quantized = qlab.apply(model, QUICK[name](INT8), data, dtype=torch.float32)
    result = qlab.write(quantized, tmp_path / "out")
    assert not qlab.verify(result.path, model).faults
    figures = qlab.evaluate(qlab.open(result.path), model, data)
    assert 0 < figures.kl < 0.01
    assert figures.kl == pytest.approx(qlab.evaluate(quantized, model, data).kl, rel=1e-3)
