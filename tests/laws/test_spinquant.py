"""SpinQuant: learned rotations are orthogonal, keep the function, and never end above where they
began."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logits import IDS
from model_folders import random_tokens, refused

import qlab
from qlab.algebra.frame import keeping_ones
from qlab.methods.hadamard import random_orthogonal
from qlab.methods.spinquant import _moved, _Rounded, _skew

GRIDS = ("int3-channel", "int4-channel")  # of weights, and of inputs


def learned(path, **changes):
    """What the recipe's bind returned, with the model in the basis that it chose."""
    seen = []
    recipe = qlab.spinquant(*GRIDS, **{"steps": 3, **changes})
    (stage,) = recipe

    def then(value):
        seen.append(value)
        return stage.then(value)

    again = qlab.bind("spinquant", stage.measure, then)
    value = qlab.apply(qlab.open(path), again, random_tokens(path, samples=3, length=16))
    return seen, value


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_what_is_learned_keeps_the_model_and_betters_the_loss(saved, family):
    path = saved(family)
    seen, value = learned(path)
    logits, reference = qlab.logits(value, IDS), qlab.logits(path, IDS)
    assert float((logits - reference).norm() / reference.norm()) < 1e-4
    (one,) = seen
    assert len(one.matrices) == 3  # R1, and R2 of two blocks
    for R in one.matrices.values():
        assert (R @ R.T - torch.eye(len(R))).abs().max() < 1e-5
    assert 0 < one.after < one.before


def test_the_same_seed_learns_the_same_and_no_steps_learn_nothing(saved):
    path = saved("llama")
    runs = [
        learned(path, steps=steps, seed=seed) for steps, seed in ((1, 0), (1, 0), (0, 0), (0, 1))
    ]
    first, again, start, other = (seen for seen, value in runs if [qlab.logits(value, IDS)])
    assert all(torch.equal(R, again[0].matrices[n]) for n, R in first[0].matrices.items())
    assert start[0].before == start[0].after == first[0].before
    assert other[0].before != start[0].before


@pytest.mark.parametrize("way", [1, -1])
def test_what_is_kept_has_the_loss_that_is_said(way, saved, monkeypatch):
    """Also where every step leads up, and what it began with is kept."""
    rates = []

    def moved(R, A, rate):
        rates.append(rate)
        return _moved(R, way * A, rate)

    monkeypatch.setattr(import_module("qlab.methods.spinquant"), "_moved", moved)
    path, losses = saved("llama"), []
    (stage,) = qlab.spinquant(*GRIDS, steps=3)
    grids = [qlab.parse_spec(text) for text in GRIDS]

    def measure(model):
        value = stage.measure(model)
        rounded = _Rounded(*grids, seed=0)
        rounded.matrices = dict(value.matrices)
        losses.append((value.after, model.losses(model.kl_to(model), changed=rounded)))
        return value

    data = random_tokens(path, samples=3, length=16)
    again = qlab.bind("spinquant", measure, stage.then)
    qlab.logits(qlab.apply(qlab.open(path), again, data), IDS)
    ((said, found),) = losses
    assert sum(found) / len(found) == pytest.approx(said, rel=1e-5)
    halved = list(dict.fromkeys(rates))
    assert halved == [0.05 / 2**i for i in range(len(halved))]
    assert len(halved) > 1 or way > 0  # a step that does not better the loss halves the next


@settings(max_examples=30)
@given(st.integers(2, 24), st.integers(0, 99), st.floats(1e-3, 1), st.booleans())
def test_a_step_stays_on_the_group_and_goes_down(size, seed, rate, centred):
    drawn = torch.Generator().manual_seed(seed)
    R = random_orthogonal(size, drawn).double()
    R = keeping_ones(R) if centred else R
    target = torch.randn(size, size, generator=drawn, dtype=torch.float64)
    with torch.enable_grad():
        R.requires_grad_()
        loss = (R * target).sum()
        loss.backward()
    A = _skew(R, centred)
    moved = _moved(R.detach(), A, rate)
    assert (moved @ moved.T - torch.eye(size)).abs().max() < 1e-5
    if centred:
        assert (moved.sum(1) - 1).abs().max() < 1e-5
    small = _moved(R.detach(), A, 1e-6)
    assert float((small * target).sum()) <= float(loss.detach()) + 1e-9


def test_bad_settings_and_places_are_refused(saved):
    refused(lambda: qlab.spinquant(*GRIDS, steps=-1), "steps is -1")
    refused(lambda: qlab.spinquant(*GRIDS, rate=0.0), "rate")
    behind = qlab.chain(qlab.smoothquant(), qlab.spinquant(*GRIDS, steps=0))

    def planned(family, recipe):
        return lambda: qlab.plan(saved(family), recipe, random_tokens(saved(family)))

    refused(planned("llama", behind), "spinquant", "first in the recipe")
    part = qlab.at("*mlp*", qlab.spinquant(*GRIDS))
    refused(planned("llama", part), "spinquant", "leaves out", "q_proj")
    refused(planned("gemma2", qlab.spinquant(*GRIDS)), "model.layers.0", "mul")
    tower = "model.vision_tower", "leave spinquant out"
    refused(planned("llava", qlab.spinquant(*GRIDS)), *tower)
