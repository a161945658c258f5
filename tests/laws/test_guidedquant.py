"""GuidedQuant: tokens weighed by the gradients at a weight's outputs, for groups of its rows."""

import re
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from families import tiny
from hypothesis import given
from hypothesis import strategies as st
from model_folders import random_tokens
from segments import correlated
from weights import weight

import qlab
from qlab.algebra.qtensor import dense
from qlab.algebra.spec import parse_spec, with_scale_dtype
from qlab.driver.apply import apply
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.guidedquant import guidedquant, relative, saliency, weighted
from qlab.methods.quadratic import Quadratic, joined
from qlab.methods.stages import (
    ALTERNATED,
    Problem,
    compensated,
    in_groups,
    obs,
    row_groups,
    solve,
    solver,
)

MODULE = "qlab.methods.guidedquant"
SEEDS, SPEC = st.integers(0, 99), parse_spec("int3-g16")


def opened(saved, family="llama"):
    source = saved(family, torch.float32)
    return open_checkpoint(source), random_tokens(source, 3, 16)


# ------------------------------------------------------------------ rows in groups
@given(st.integers(1, 40), st.integers(1, 50), st.sampled_from(["int4-g16", "int4-tensor"]))
def test_groups_hold_every_row_once(rows, groups, text):
    parts = row_groups(torch.Size([rows, 16]), parse_spec(text), groups)
    assert [i for part in parts for i in range(rows)[part]] == list(range(rows))
    assert len(parts) == (1 if text == "int4-tensor" else min(groups, rows))
    sizes = [part.stop - part.start for part in parts]
    assert text == "int4-tensor" or max(sizes) - min(sizes) <= 1


@given(SEEDS, st.integers(1, 4))
def test_every_group_is_solved_in_its_own_metric_and_no_stage_raises_j(seed, groups):
    W, x = weight(6, 32, seed), correlated(64, 32, seed)
    s_ng = torch.rand(64, groups, generator=torch.Generator().manual_seed(seed)) ** 3
    H_gkk = weighted(x, s_ng).mean_gkk
    spec = with_scale_dtype(SPEC, torch.float32)
    problem = Problem(target_ok=W, H_kk=H_gkk, damp=0.01, spec=spec)
    parts = [solve(p, compensated, obs, ALTERNATED) for p in in_groups(problem, H_gkk)]
    whole = joined(parts)
    values = list(whole.certificate.values())
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(values))
    rows = row_groups(W.shape, SPEC, groups)
    for part, own, p in zip(rows, parts, in_groups(problem, H_gkk)):
        assert torch.equal(dense(whole.leaf, torch.float32)[part], dense(own.leaf, torch.float32))
        exact = Quadratic(W[part], p.M_kk).rows(own.leaf).sum()
        torch.testing.assert_close(
            float(exact), list(own.certificate.values())[-1], rtol=1e-3, atol=1e-6
        )


@given(SEEDS)
def test_a_weighted_moment_is_that_of_tokens_repeated(seed):
    x = correlated(24, 8, seed)
    counts = torch.randint(0, 4, (24,), generator=torch.Generator().manual_seed(seed))
    repeated = x.repeat_interleave(counts, 0)
    sums = weighted(x, counts[:, None].float()).sum_gkk[0]
    torch.testing.assert_close(sums, repeated.T @ repeated, rtol=1e-4, atol=1e-4)


def test_tokens_without_any_gradient_count_the_same():
    s_ng = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    assert relative(s_ng).tolist() == [[1.0, 0.5], [1.0, 1.5]]


# ------------------------------------------------------------------ of whole models
def squared_gradients(family, data):
    """Weight -> the squared gradients at its outputs [n, o], by transformers' own model."""
    model = tiny(family).float().requires_grad_()
    outputs, squares = {}, {}
    for name, part in model.named_modules():
        if hasattr(part, "weight") and part.weight.ndim == 2:
            part.register_forward_hook(lambda _, x, z, name=name: outputs.update({name: z}))
    for ids in data.ids:
        with torch.enable_grad():
            loss = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:])
        slopes = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
        for name, slope in zip(outputs, slopes):
            squares.setdefault(name, []).append(slope.flatten(0, -2).square())
    return {name: torch.cat(parts) for name, parts in squares.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2"])
def test_tokens_weigh_by_the_gradients_of_the_whole_model(family, saved):
    model, data = opened(saved, family)
    seen = []

    def measure(whole):
        seen.append(saliency(whole, SPEC, 3))

    assert apply(model, qlab.bind("seen", measure, lambda _: qlab.keep()), data).resolved
    expected = squared_gradients(family, data)
    count = 0
    for path, of_segment in seen[0].items():
        for site, s_ng in of_segment.items():
            squares = expected[f"{path}.{site}"]
            rows = row_groups(torch.Size([squares.shape[1], 64]), SPEC, 3)
            means = torch.stack([squares[:, part].mean(1) for part in rows], 1)
            torch.testing.assert_close(s_ng, means / means.mean(0), rtol=2e-3, atol=1e-5)
            count += 1
    assert count >= 8


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_equal_weights_it_is_the_staged_solver(family, saved, monkeypatch):
    model, data = opened(saved, family)
    monkeypatch.setattr(
        sys.modules[MODULE], "relative", lambda s_ng: relative(torch.full_like(s_ng, 0.3))
    )
    equal = apply(model, guidedquant(SPEC, groups=3), data)
    plain = apply(model, solver(SPEC), data)
    assert torch.equal(qlab.logits(equal, data.ids), qlab.logits(plain, data.ids))
    monkeypatch.undo()
    weighed = apply(model, guidedquant(SPEC, groups=3), data)
    assert not torch.equal(qlab.logits(weighed, data.ids), qlab.logits(plain, data.ids))


def test_every_weight_is_solved_and_no_stage_raises_its_j(saved, tmp_path):
    model, data = opened(saved)
    result = qlab.quantize(model, guidedquant(SPEC, groups=2), data, tmp_path / "out")
    assert not qlab.verify(result.path, model).faults
    for row in result.sites.values():
        stages = ("nearest", "obs", *(f"{s.__name__}_{i}" for i, s in enumerate(ALTERNATED, 1)))
        values = [row[f"J_{stage}"] for stage in stages]
        assert all(after <= before * (1 + 1e-6) for before, after in pairwise(values))


def test_routed_experts_are_refused_before_anything_runs_and_others_of_a_mixture_are_not(saved):
    model, data = opened(saved, "qwen3_moe")
    with pytest.raises(QlabError, match=re.escape("layers.0.mlp.experts")) as refused:
        qlab.plan(model, guidedquant(SPEC), data)
    assert "routed experts" in str(refused.value) and "qlab.rules" in str(refused.value)
    mixed = qlab.rules({"*self_attn*": guidedquant(SPEC), "*": qlab.rtn(SPEC)})
    assert apply(model, mixed, data).bits_per_weight < 6


def test_what_it_cannot_take_is_a_sentence(saved):
    with pytest.raises(QlabError, match="groups is 0; give at least 1"):
        guidedquant(SPEC, groups=0)
    with pytest.raises(QlabError, match="damp"):
        guidedquant(SPEC, damp=2.0)
    model, _ = opened(saved)
    with pytest.raises(QlabError, match="guidedquant measures on calibration text"):
        qlab.plan(model, guidedquant(SPEC))
