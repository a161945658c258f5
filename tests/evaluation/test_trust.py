"""Which figures are more than chance: flips, quantiles, ties, seeds, and text that calibration
saw."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folders import random_tokens, refused

import qlab
from qlab.data.calibration import Tokens
from qlab.data.overlap import MOST, RUN, shared_windows, sketch
from qlab.driver.quantize import quantize
from qlab.evaluation.perplexity import evaluate
from qlab.evaluation.statistics import mcnemar, quantiles
from qlab.files.checkpoint import open_checkpoint

INT3 = qlab.parse_spec("int3-g32")


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_mid_p_of_a_fair_coin(lost, gained):
    n, k = lost + gained, min(lost, gained)
    ways = [math.comb(n, i) for i in range(k + 1)]
    expected = min(1.0, (2 * sum(ways) - ways[-1]) / 2**n) if n else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


@given(st.lists(st.floats(0, 9, width=32), min_size=1, max_size=30), st.floats(0.01, 1))
def test_quantiles_are_values_that_a_share_does_not_exceed(values, share):
    t = torch.tensor(values)
    (q,) = quantiles(t, (share,))
    assert q in t.tolist() and (t <= q).double().mean() >= share - 1e-9
    assert (t < q).double().mean() < share


@pytest.fixture(scope="module")
def models(saved, tmp_path_factory):
    """A model, and two of it that lost much and next to nothing."""
    folder, model = tmp_path_factory.mktemp("trust"), open_checkpoint(saved("llama"))
    made = {
        name: open_checkpoint(quantize(model, qlab.rtn(spec), None, folder / name).path)
        for name, spec in {"int2": qlab.parse_spec("int2-g32"), "int8": "int8-g32"}.items()
    }
    return model, made


def test_flips_are_answers_that_changed_from_or_to_the_texts_token(models):
    model, made = models
    data = random_tokens(model.path, 4, 32)
    result = evaluate(made["int2"], model, data)
    logits = [_answers(each, data.ids) for each in (made["int2"], model)]
    right, right_ref = (answers[:, :-1] == data.ids[:, 1:] for answers in logits)
    assert result.flips_lost == int((right_ref & ~right).sum())
    assert result.flips_gained == int((right & ~right_ref).sum())
    assert result.flips == (result.flips_lost + result.flips_gained) / result.predictions
    assert result.flips <= 1 - result.top1_agreement + 1e-9
    assert result.kl_median <= result.kl_p90 <= result.kl_p99 <= result.kl_max
    assert result.kl == pytest.approx(sum(result.kl_by_window) / 4)
    said = result.json()
    assert said["flips"] == result.flips and len(said["nll_by_window"]) == 4


def _answers(model, ids):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    with torch.no_grad():
        return loaded(input_ids=ids).logits.argmax(-1)


def test_differences_within_the_paired_interval_are_ties(models):
    model, made = models
    data = random_tokens(model.path, 8, 32)
    coarse, fine = (evaluate(made[name], model, data) for name in ("int2", "int8"))
    assert fine.kl < coarse.kl and not qlab.difference(coarse, fine).kl_tie
    itself = qlab.difference(fine, fine)
    assert itself.tie and itself.kl_tie and itself.ratio == 1
    one, other = qlab.difference(coarse, fine), qlab.difference(fine, coarse)
    assert one.tie == other.tie and one.ratio == pytest.approx(1 / other.ratio)
    assert one.ratio == pytest.approx(coarse.perplexity / fine.perplexity)
    low, high = one.kl_ci
    assert other.kl == pytest.approx(-one.kl) and 0 < low < one.kl < high
    assert other.kl_ci == pytest.approx((-high, -low), rel=0.05)
    same = evaluate(model, model, data)
    assert same.indistinguishable and "indistinguishable" in str(same)
    ahead = replace(coarse, ratio_ci=(1.01, 1.2))
    assert not ahead.indistinguishable and "indistinguishable" not in str(ahead)
    elsewhere = evaluate(made["int8"], model, random_tokens(model.path, 8, 32, seed=1))
    refused(lambda: qlab.difference(fine, elsewhere), "of other windows")
    refused(lambda: qlab.difference(fine, None), "other is None")
    runs = {0: fine, 1: elsewhere}
    refused(lambda: qlab.over_seeds(runs.__getitem__, [0, 1]), "of other windows")


def test_tables_call_runs_ties_that_the_interval_does_not_tell_apart(models, tmp_path):
    model, made = models
    data = random_tokens(model.path, 8, 32)
    fine = evaluate(made["int8"], model, data)
    worse = replace(fine, perplexity=2 * fine.perplexity, nll_by_window=_plus(fine, 0.7))
    near = replace(fine, perplexity=fine.perplexity * 1.0001, nll_by_window=_wobble(fine))
    runs = [
        (made[name].path, each) for name, each in zip(("int8", "int8", "int2"), (near, fine, worse))
    ]
    table = qlab.results(runs)
    assert [row["standing"] for row in table.rows] == ["tie", "best", None]
    assert "tie" in str(table)
    alone = qlab.results(runs[:1])
    assert alone.rows[0]["standing"] is None and "standing" not in alone.columns
    former = table.to_csv().splitlines()
    (tmp_path / "runs.csv").write_text(former[0].removesuffix(",standing") + "\n")
    table.to_csv(tmp_path / "runs.csv")  # a table of before the column is replaced


def _plus(result, more):
    return tuple(nll + more for nll in result.nll_by_window)


def _wobble(result):
    return tuple(nll + 0.01 * (-1) ** i for i, nll in enumerate(result.nll_by_window))


def test_seeds_spread_beside_the_interval_over_windows(saved, text, tmp_path):
    path = saved("llama")
    held_out = random_tokens(path, 4, 32, seed=9)

    def run(seed):
        data = qlab.tokens(path, [text], samples=4, length=32, seed=seed)
        made = qlab.quantize(path, qlab.gptq(INT3), data, tmp_path / str(seed), overwrite=True)
        return qlab.evaluate(made, path, held_out)

    result = qlab.over_seeds(run, [0, 1, 2])
    assert list(result.evaluations) == [0, 1, 2] and len(set(result.kl)) == 3
    assert "over seeds" in str(result) and "over windows" in str(result)
    assert result.json()["kl"] == result.kl
    refused(lambda: qlab.over_seeds(run, [1, 1]), "each seed once")
    refused(lambda: qlab.over_seeds(run, []), "none")


@given(st.integers(0, 2**32), st.integers(RUN, 90), st.integers(0, 40))
def test_windows_share_runs_with_what_they_were_cut_from_alone(seed, length, start):
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 1000, (3, 130), generator=drawn)
    strange = torch.randint(0, 1000, (2, length), generator=drawn)
    windows = torch.cat([ids[:1, start : start + length], strange])
    assert shared_windows(windows, sketch(_tokens(ids))).tolist() == [True, False, False]


def test_a_sketch_is_small_whatever_the_text_and_finds_windows_of_it():
    ids = torch.randint(0, 40000, (64, 2048), generator=torch.Generator().manual_seed(0))
    record = sketch(_tokens(ids))
    assert len(record["hashes"]) == MOST * 8
    assert shared_windows(ids[:32, 300:812], record).double().mean() > 0.9
    assert not shared_windows(ids.flip(1)[:, :512], record).any()
    padding = torch.zeros(2, 200, dtype=torch.long)
    assert shared_windows(padding, sketch(_tokens(padding))) is None
    assert shared_windows(ids[:, :20], record) is None


def _tokens(ids):
    return Tokens(ids=ids, texts=(), sha256="", seed=None)


def test_evaluating_on_calibration_text_is_warned_of(saved, tmp_path):
    path = saved("llama")
    seen, unseen = random_tokens(path, 4, 96, seed=1), random_tokens(path, 4, 96, seed=2)
    made = qlab.quantize(path, qlab.gptq(INT3), seen, tmp_path / "out")
    with pytest.warns(UserWarning, match="4 of 4 windows .100%. have 50 tokens in a row"):
        assert qlab.evaluate(made, path, seen).calibration_overlap == 1
    both = _tokens(torch.cat([seen.ids[:1], unseen.ids[:3]]))
    with pytest.warns(UserWarning, match="1 of 4 windows"):
        qlab.perplexity(made, both)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert qlab.evaluate(made, path, unseen).calibration_overlap == 0
        assert qlab.evaluate(path, path, seen).calibration_overlap is None
    with pytest.warns(UserWarning, match="this recipe was calibrated on"):
        qlab.perplexity(qlab.apply(path, qlab.gptq(INT3), seen), seen)
    converted = qlab.convert(made, "compressed-tensors", tmp_path / "again")
    with pytest.warns(UserWarning, match="was calibrated on"):
        qlab.perplexity(converted, seen)
