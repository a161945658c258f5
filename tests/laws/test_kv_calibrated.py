"""What calibration adds to a rounded cache: keys without their mean, and clipped ranges."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folders import random_tokens, refused
from segments import batches_of, hidden, normal, relative, run_checked, segment

import qlab
from qlab.algebra.insert import insert
from qlab.algebra.interpret import inputs_of, interpret
from qlab.algebra.online import QuantizeClipped, QuantizeInput, Subtract
from qlab.algebra.running import keys_of, select
from qlab.algebra.spec import parse_spec
from qlab.algebra.wires import wires
from qlab.driver.lossless import refuse_changed
from qlab.evaluation.perplexity import read
from qlab.methods.kv_clipped import SHARES

# Keys of a query each, shared by several, by all, normed, in windows, of mixtures, latent.
ATTENTIONS = ("llama", "gpt2", "opt", "falcon", "gemma3_text", "qwen3_moe", "deepseek_v3")


def solved(seg, recipe):
    graph, _ = seg.solve(recipe)
    return graph


def keys_in(graph, name, batch):
    return inputs_of(graph, [name], *batch)[name].x.flatten(0, -2)


def key_wires(seg):
    return [wire.name for wire in wires(seg.graph.code).values() if wire.kind == "key"]


# ------------------------------------------------------------------ centred keys
@pytest.mark.parametrize("family", ATTENTIONS)
def test_attention_does_not_see_that_keys_are_centred(family):
    seg = segment(family)
    graph = solved(seg, qlab.centre_keys())
    assert list(graph.inserts) == key_wires(seg)
    for batch in seg.batches:
        out, before = (hidden(interpret(g, *batch)) for g in (graph, seg.graph))
        assert relative(out, before) < 1e-5
    for name in graph.inserts:
        means = [keys_in(graph, name, batch) for batch in seg.batches]
        before = [keys_in(seg.graph, name, batch) for batch in seg.batches]
        assert torch.cat(means).mean(0).norm() < 1e-4 * torch.cat(before).mean(0).norm()


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_keys_that_have_a_mean_lose_less_when_they_are_centred(family):
    seg = segment(family)
    far = insert("far", "*:key", lambda wire, stats: lambda x: x + 8 * _signs(x.shape[-1]))
    cache = qlab.kv_cache("int4-token-asym")
    losses = []
    for recipe in (qlab.chain(far, cache), qlab.chain(far, qlab.centre_keys(), cache)):
        out, before = (
            hidden(interpret(g, *seg.batches[0])) for g in (solved(seg, recipe), seg.graph)
        )
        losses.append(relative(out, before))
    assert 0 < losses[1] < 0.5 * losses[0]


def _signs(size):
    return normal(size, seed=9).sign()


def test_turned_keys_have_the_turned_mean():
    seg = segment("llama")
    graph = solved(seg, qlab.chain(qlab.rotate_scores(), qlab.centre_keys()))
    turn, shift = graph.inserts["self_attn:key"]
    plain = solved(seg, qlab.centre_keys()).inserts["self_attn:key"][0]
    assert torch.allclose(shift.c_k, turn(plain.c_k), atol=1e-5)


@pytest.mark.parametrize("family, operation", [("gemma2", "tanh"), ("gpt_oss", "cat")])
def test_caps_and_sinks_see_the_shift_and_are_refused_before_any_work(saved, family, operation):
    seg = segment(family)
    said = ("self_attn:key", "cannot be shifted by centre_keys", operation, "leave the step out")
    refused(lambda: solved(seg, qlab.centre_keys()), *said)
    model, data = saved(family), random_tokens(saved(family))
    recipe = qlab.chain(qlab.centre_keys(), qlab.rtn("int4-g16"))
    refused(lambda: qlab.plan(model, recipe, data), "model.layers.0.self_attn:key", *said[1:])


def test_a_shift_of_one_token_alone_is_refused():
    """The driver checks the claim."""
    seg = segment("llama")
    (stage,) = qlab.centre_keys()
    first = lambda x: torch.cat([x[..., :1, :] - 1, x[..., 1:, :]], -2)
    wrong = seg.graph.inserting("self_attn:key", first)
    refused(
        lambda: refuse_changed(stage, seg.graph, wrong, None, batches_of(seg)),
        "'centre_keys' changes what",
    )
    run_checked(seg, (stage,), seg.observe(seg.graph, keys_of(stage, seg.graph)))


# ------------------------------------------------------------------ clipped ranges
@given(
    seed=st.integers(0, 99),
    share=st.sampled_from(SHARES),
    text=st.sampled_from(["int4-channel", "int4-g8", "int3-channel-asym", "fp8-channel"]),
)
def test_a_clipped_range_is_that_of_clipped_numbers(seed, share, text):
    """Of numbers that are already within the share of every range but for the ends, clipping rounds
    as if these were cut."""
    spec = parse_spec(text)
    x = normal(6, 24, seed=seed)
    assert torch.equal(QuantizeClipped(spec, 1.0)(x), QuantizeInput(spec)(x))
    groups = x.reshape(-1, spec.tile.cols or 24)
    low, high = (groups.amin(1, keepdim=True), groups.amax(1, keepdim=True))
    if spec.symmetric:
        high = torch.maximum(-low.clamp_max(0), high.clamp_min(0))
        low = -high
    cut = groups.clamp(low.clamp_max(0) * share, high.clamp_min(0) * share).reshape(x.shape)
    y = QuantizeClipped(spec, share)(x)
    step = (high.clamp_min(0) - low.clamp_max(0)) * share / (2**spec.bits - 1)
    error = (y - cut).reshape(groups.shape).abs()
    limit = step if text != "fp8-channel" else cut.reshape(groups.shape).abs() / 16 + step
    assert (error <= 1.001 * limit).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("spec", ["int4-token", "int3-g16-asym"])
def test_the_share_with_the_least_error_is_taken(family, spec):
    seg = segment(family)
    graph = solved(seg, qlab.kv_clipped(spec))
    keys = key_wires(seg)
    assert graph.inserts.keys() >= set(keys)
    (stage,) = qlab.kv_clipped(spec)
    stats = seg.observe(seg.graph, keys_of(stage, select(stage, seg.graph)))
    shares = set()
    for name, (op,) in graph.inserts.items():
        x_nk = stats[name, "sample"].x_nk
        error = {
            p: float((QuantizeClipped(op.spec, p)(x_nk) - x_nk).square().sum()) for p in SHARES
        }
        assert error[op.share] == min(error.values())
        shares.add(op.share)
    assert shares != {1.0}


def test_gradients_go_straight_through_clipped_ranges():
    x = normal(4, 16, seed=3).requires_grad_()
    with torch.enable_grad():
        QuantizeClipped(parse_spec("int4-channel"), 0.8)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 16))


def test_what_cannot_be_clipped_is_refused():
    refused(lambda: qlab.kv_clipped("int8-head"), "int8-head has scales that are stored")
    refused(lambda: qlab.kv_clipped("nvfp4"), "keys and values cannot be")
    cut = lambda: solved(segment("llama"), qlab.kv_clipped("int4-g32"))
    refused(cut, "groups of 32 do not divide the 16 channels of a head")


# ------------------------------------------------------------------ in a model
def test_formats_refuse_both_and_plan_says_so(saved):
    model, data = saved("llama"), random_tokens(saved("llama"))
    for step in ("centre_keys", "kv_clipped-int4-token"):
        recipe = qlab.method(f"{step}+rtn", "int4-g16")
        plan = lambda recipe=recipe: qlab.plan(model, recipe, data)
        refused(plan, "self_attn", "compressed-tensors", "qlab.apply")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_evaluation_runs_what_interpret_runs(saved, family):
    """A block of the value, walked alone, gives the hidden states that evaluation reads."""
    model, data = qlab.open(saved(family)), random_tokens(saved(family), samples=2, length=16)
    turned = qlab.chain(qlab.rotate_heads(), qlab.rotate_scores())
    recipe = qlab.chain(turned, qlab.centre_keys(), qlab.kv_clipped("int4-token-asym"))
    value = qlab.apply(model, recipe, data, dtype=torch.float32)
    seen = read(value, data)
    kinds = {
        type(op) for _, graph in value.segments() for ops in graph.inserts.values() for op in ops
    }
    assert {Subtract, QuantizeClipped} <= kinds
    exact = read(qlab.apply(model, qlab.chain(turned, qlab.centre_keys()), data), data)
    plain = read(model, data)
    assert relative(exact.hidden, plain.hidden) < 1e-4 < relative(seen.hidden, plain.hidden)
