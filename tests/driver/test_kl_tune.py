"""KL tuning: codes and shapes stay, scales are what files hold, the divergence on the windows held
out never rises, and what is written is what was learned."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folders import contents, random_tokens
from torch.utils import _pytree as pytree

from qlab.algebra.leaf import proper
from qlab.algebra.learn_whole import Schedule, divided
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at, chain
from qlab.data.calibration import from_ids
from qlab.directories.verify import verify
from qlab.driver.apply import apply
from qlab.driver.model import Model
from qlab.driver.quantize import quantize
from qlab.driver.write import write
from qlab.errors import QlabError
from qlab.evaluation.perplexity import evaluate
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptq import gptq
from qlab.methods.kl_tune import RELAXED, kl_tune
from qlab.methods.qat_end_to_end import qat_end_to_end
from qlab.methods.rtn import rtn
from qlab.methods.spinquant import spinquant

INT4 = parse_spec("int4-g16")
LEARNING = {"steps": 6, "rate": 0.004}
FAMILIES = ["llama", "gpt2", "opt", "qwen3_moe"]
SPECS = ["int3-g32-asym", "int2-channel-asym", "nvfp4"]


def opened(saved, family="llama", dtype=torch.float32):
    """A model, and one window several times, so that what is learned on some of them lowers the
    divergence on those held out."""
    model = open_checkpoint(saved(family, dtype))
    return model, from_ids(model, random_tokens(model.path, 1, 24).ids.repeat(4, 1))


def segments(value):
    return dict(value.segments())


def codes_of(graph):
    leaves = {name: proper(leaf) for name, leaf in graph.params.items()}
    return {name: leaf for name, leaf in leaves.items() if isinstance(leaf, QTensor)}


def refuse_other_codes(before, after):
    """All but scales, norms and biases is bit for bit what it was."""
    moved = 0
    for name, leaf in before.params.items():
        new = after.params[name]
        codes, new_codes = proper(leaf), proper(new)
        if isinstance(codes, QTensor):
            assert torch.equal(codes.codes.float(), new_codes.codes.float())
            assert new_codes.scales.dtype == codes.scales.dtype
            assert torch.isfinite(new_codes.scales.float()).all()
            for part in ("zeros", "outer", "perm"):
                kept, now = getattr(codes, part), getattr(new_codes, part)
                assert (kept is None and now is None) or torch.equal(kept, now)
            moved += int((codes.scales.float() != new_codes.scales.float()).sum())
        elif leaf.ndim != 1:
            assert torch.equal(leaf, new)
    return moved


@pytest.mark.parametrize(
    "family, text", [*((f, "int4-g16") for f in FAMILIES), *(("llama", s) for s in SPECS)]
)
def test_codes_stay_and_the_divergence_falls(family, text, saved):
    model, data = opened(saved, family)
    front = rtn(parse_spec(text))
    tuned = apply(model, chain(front, kl_tune(**LEARNING)), data)
    plain = segments(apply(model, front, data))
    moved = 0
    for path, after in tuned.segments():
        moved += refuse_other_codes(plain[path], after)
        for note in after.notes.values():
            assert note["kl"] <= note["kl_before"]
    assert moved or text == "nvfp4"  # whose scales are 3 bits wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_and_norms_are_what_files_hold(dtype, saved, tmp_path):
    model, data = opened(saved, "llama", dtype)
    recipe = chain(gptq(INT4), kl_tune(**LEARNING))
    value = apply(model, recipe, data)
    result = write(value, tmp_path / "out")
    written = open_checkpoint(result.path)
    moved = 0
    for path, graph in value.segments():
        for name, leaf in graph.params.items():
            kept = written.leaf(f"{path}.{name}")
            for ours, theirs in zip(pytree.tree_leaves(leaf), pytree.tree_leaves(kept)):
                if isinstance(ours, torch.Tensor):
                    assert torch.equal(ours.float(), theirs.float())
            is_vector = isinstance(leaf, torch.Tensor) and leaf.ndim == 1
            moved += is_vector and not torch.equal(leaf, model.leaf(f"{path}.{name}").to(leaf))
    assert moved
    assert evaluate(written, model, data).kl == pytest.approx(
        evaluate(value, model, data).kl, rel=1e-4
    )
    assert not verify(result.path, model.path).faults


@pytest.mark.parametrize("family", ["llama"])
def test_it_learns_what_the_whole_model_needs(family, saved):
    """Also on windows that it has not learned from."""
    model, _ = opened(saved, family)
    data = random_tokens(model.path, 16, 16)
    front, spec = rtn, parse_spec("int2-g16")
    unseen = random_tokens(model.path, 8, 16, seed=7)
    plain = evaluate(apply(model, front(spec), data), model, unseen).kl
    value = apply(model, chain(front(spec), kl_tune(steps=12, rate=0.02, windows=4)), data)
    assert evaluate(value, model, unseen).kl < 0.95 * plain


def test_the_same_seed_gives_the_same_bytes(saved, tmp_path):
    model, data = opened(saved)
    recipe = chain(rtn(INT4), kl_tune(steps=2))
    first = quantize(model, recipe, data, tmp_path / "first")
    second = quantize(model, recipe, data, tmp_path / "second")
    assert contents(first.path) == contents(second.path)
    details = [stage.detail for stage in apply(model, recipe, data).resolved.recipe]
    assert any("value" in detail for detail in details)


@given(st.integers(2, 40), st.floats(0.01, 0.99))
def test_no_window_is_both_learned_from_and_held_out(count, share):
    learn_from, held_out = divided("a step", count, share)
    assert sorted([*learn_from, *held_out]) == list(range(count)) and learn_from and held_out


def test_a_row_moves_all_its_scales(saved):
    model, data = opened(saved)
    graph = next(iter(segments(apply(model, rtn(INT4), data)).values()))
    moves = {name: torch.zeros(shape) for name, shape in RELAXED.shapes(graph).items()}
    name, q = next(iter(codes_of(graph).items()))
    full = f"{graph.path}.{name}"
    moves[f"{full} rows"][0], moves[full][1, 0] = 0.5, 0.25
    scales = proper(RELAXED.stored(graph, moves)[name]).scales
    assert torch.allclose(scales[0], 1.5 * q.scales[0]) and scales.shape[1] > 1
    assert torch.allclose(scales[1, 0], 1.25 * q.scales[1, 0])
    assert torch.equal(scales[1, 1:], q.scales[1, 1:]) and torch.equal(scales[2:], q.scales[2:])


@given(st.integers(1, 200), st.floats(0, 0.5))
def test_the_rate_rises_and_falls(steps, warm_up):
    schedule = Schedule(steps=steps, rate=0.1, windows=1, held_out=0.5, warm_up=warm_up)
    rates = [schedule.rate_at(t) for t in range(steps)]
    top = rates.index(max(rates))
    assert min(rates) > 0 and max(rates) <= 0.1 and top <= warm_up * steps
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert warm_up or rates[0] == 0.1


def test_without_steps_nothing_moves(saved):
    model, data = opened(saved)
    tuned = apply(model, chain(rtn(INT4), kl_tune(steps=0)), data)
    plain = segments(apply(model, rtn(INT4), data))
    for path, after in tuned.segments():
        assert refuse_other_codes(plain[path], after) == 0


def test_divergence_keeps_what_was_best(saved):
    model, data = opened(saved)
    value = apply(model, chain(rtn(INT4), kl_tune(steps=12, rate=1.0, windows=2)), data)
    plain = apply(model, rtn(INT4), data)
    notes = [note for graph in segments(value).values() for note in graph.notes.values()]
    assert all(note["kl"] <= note["kl_before"] for note in notes)
    if notes[0]["kept_step"] == 0:
        assert evaluate(value, model, data).kl == evaluate(plain, model, data).kl


@pytest.mark.parametrize(
    "step, recipe",
    [
        ("kl_tune", chain(rtn(INT4), kl_tune(steps=4, windows=2))),
        ("qat_end_to_end", chain(rtn(INT4), qat_end_to_end(steps=4, windows=2))),
        ("spinquant", chain(spinquant(parse_spec("int4-channel"), steps=4), rtn(INT4))),
    ],
)
def test_divergence_is_a_warning_of_the_run(step, recipe, saved, monkeypatch):
    model, data = opened(saved)
    kl_to, calls = Model.kl_to, []

    def lost(self, other):
        """A divergence that is NaN from the seventh window on."""
        loss = kl_to(self, other)

        def value(logits, window):
            calls.append(window)
            return loss(logits, window) * (1 if len(calls) <= 6 else torch.nan)

        return value

    monkeypatch.setattr(Model, "kl_to", lost)
    with pytest.warns(UserWarning, match=rf"{step} diverged at step \d, and the best") as warned:
        value = apply(model, recipe, data)
        list(value.segments())
    assert len([w for w in warned if "diverged" in str(w.message)]) == 1


@pytest.mark.parametrize(
    "arguments",
    [{"steps": -1}, {"windows": 0}, {"rate": 0.0}, {"rate": 2.0}, {"held_out": 0.0}],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(QlabError, match="give at least 0 steps"):
        kl_tune(**arguments)


def test_what_it_cannot_tune_is_refused(saved):
    model, data = opened(saved)
    for front, windows, said in [
        ((), data, "nothing in front of it rounds a weight"),
        (rtn(parse_spec("mxfp4")), data, "powers of two"),
        (rtn(INT4), random_tokens(model.path, 1, 16), "at least 2 windows"),
        (rtn(INT4), None, "calibration"),
    ]:
        with pytest.raises(QlabError, match=said):
            assert apply(model, chain(front, kl_tune(steps=1)), windows).resolved


def test_it_tunes_the_sites_that_it_may_touch_alone(saved):
    model, data = opened(saved)
    recipe = chain(rtn(INT4), at("*.mlp.*", kl_tune(**LEARNING)))
    plain, moved = segments(apply(model, rtn(INT4), data)), 0
    for path, after in apply(model, recipe, data).segments():
        for name, leaf in after.params.items():
            before = plain[path].params[name]
            if isinstance(leaf, QTensor) and not torch.equal(leaf.scales, before.scales):
                assert ".mlp." in f".{name}"
                moved += 1
            elif isinstance(leaf, torch.Tensor):
                assert torch.equal(leaf, before)
    assert moved


def test_a_killed_run_goes_on_with_the_same_value(saved, tmp_path, monkeypatch):
    model, data = opened(saved)
    recipe = chain(rtn(INT4), kl_tune(steps=2))
    whole = quantize(model, recipe, data, tmp_path / "whole")
    from qlab.driver import write as module

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, recipe, data, tmp_path / "killed")
    monkeypatch.undo()
    again = quantize(model, recipe, data, tmp_path / "killed", resume=True)
    assert contents(again.path) == contents(whole.path)
    assert again.seconds_of_binds
