"""Rotations: Hadamard matrices are what they should be, the function stays, outliers are spread."""

import pytest
import torch
from families import FAMILIES, MIXTURES, OTHERS, UNLIKE
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import random_tokens, refused
from segments import assert_same, batches_of, hidden, relative, segment

import qlab
from qlab.algebra.groups import General, groups, writers
from qlab.algebra.interpret import interpret
from qlab.algebra.qtensor import dense
from qlab.algebra.random import generator
from qlab.algebra.running import apply
from qlab.algebra.spec import parse_spec
from qlab.driver.lossless import refuse_changed
from qlab.methods.hadamard import (
    hadamard,
    is_order,
    largest_order,
    random_hadamard,
    random_orthogonal,
)
from qlab.methods.inputs import quantize_inputs

INT4 = parse_spec("int4-channel")
ROTATIONS = {
    "rotate_heads": qlab.rotate_heads,
    "rotate_online": qlab.rotate_online,
    "quarot": qlab.quarot,
    "incoherence": qlab.incoherence,
}


def run(seg, transform, graph=None):
    """All stages, each with its claim checked on a batch."""
    graph, stats = graph or seg.graph, {}
    for stage in transform:
        before = graph
        graph, stats = apply(stage, graph, stats)
        refuse_changed(stage, before, graph, None, batches_of(seg))
    return graph


# ------------------------------------------------------------------ matrices
@settings(max_examples=60)
@given(st.integers(1, 300))
def test_a_hadamard_matrix_is_of_signs_and_its_rows_are_orthogonal(n):
    if is_order(n):
        H = hadamard(n)
        assert torch.equal(H.abs(), torch.ones(n, n, dtype=torch.float64))
        assert torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.float64))
    else:
        refused(lambda: hadamard(n), f"size {n}", f"blocks of {largest_order(n)}")


def test_the_sizes_of_models_have_one():
    sizes = (12, 20, 28, 36, 40, 60, 80, 96, 112, 128, 576, 768, 1536, 3584)
    assert all(is_order(n) for n in sizes)
    assert not any(is_order(n) for n in (0, -4, 3, 6, 18, 22, 52))  # 52 needs more than primes


@settings(max_examples=40)
@given(st.integers(1, 6000))
def test_blocks_divide_and_are_the_largest(k):
    n = largest_order(k)
    assert k % n == 0 and is_order(n)
    assert not any(k % m == 0 and is_order(m) for m in range(n + 1, min(k, 4096) + 1))


@pytest.mark.parametrize("draw", [random_hadamard, random_orthogonal])
@pytest.mark.parametrize("n", [1, 12, 64])
def test_random_matrices_are_orthogonal_and_depend_on_the_seed_alone(draw, n):
    R, again, other = (draw(n, generator(s, "wire")) for s in (0, 0, 1))
    assert (R.double().T @ R.double() - torch.eye(n)).abs().max() < 1e-6
    assert torch.equal(R, again) and (n == 1 or not torch.equal(R, other))


# ------------------------------------------------------------------ the program
WRITERS = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "gemma2": {"self_attn.o_proj", "mlp.down_proj"},
    "olmo2": {"self_attn.o_proj", "mlp.down_proj"},
    "opt": {"self_attn.out_proj", "fc2"},
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "gpt_neox": {"attention.dense", "mlp.dense_4h_to_h"},
    "falcon": {"self_attention.dense", "mlp.dense_4h_to_h"},
    "mixtral": {"self_attn.o_proj", "mlp.experts.down_proj"},
    "deepseek_v3": {
        "self_attn.o_proj",
        "mlp.experts.down_proj",
        "mlp.shared_experts.down_proj",
    },
}


@pytest.mark.parametrize("family", WRITERS)
def test_what_writes_to_the_residual_stream_is_read_off_the_program(family):
    assert writers(segment(family).graph.code) == WRITERS[family]


# ------------------------------------------------------------------ rotations
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES, *OTHERS, *UNLIKE])
def test_the_function_stays(family):
    seg = segment(family)
    for name in ("quarot", "incoherence"):
        graph = run(seg, ROTATIONS[name]())
        for batch in seg.batches[:2]:
            out, before = (hidden(interpret(g, *batch)) for g in (graph, seg.graph))
            assert relative(out, before) < 1e-4
        assert graph.online


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "deepseek_v3"])
def test_heads_fold_and_the_other_writers_turn_at_run_time(family):
    seg = segment(family)
    graph = run(seg, qlab.quarot())
    code = seg.graph.code
    heads = {o for o, group in groups(code).items() if isinstance(group, General)}
    online = {s.path for s in code.sites if s.path in writers(code) and s.origin not in heads}
    assert graph.online.keys() == online
    turned = {s.path for s in code.sites if "rotated" in graph.notes.get(s.path, {})}
    assert turned == writers(code)
    assert not run(seg, qlab.rotate_heads()).online


def test_a_size_without_a_matrix_is_turned_in_blocks():
    seg = segment("llama")
    blocks = lambda n, g: random_hadamard(min(n, 32), g)
    graph = run(seg, qlab.rotate_online(draw=blocks))
    (op,) = graph.online["mlp.down_proj"]
    assert op.M_nn.shape == (32, 32)


def test_the_seed_and_the_name_decide():
    seg = segment("llama")
    once, twice, other = (run(seg, qlab.quarot(seed)) for seed in (0, 0, 1))
    assert_same(once, twice)
    assert not torch.equal(
        once.params["self_attn.o_proj.weight"], other.params["self_attn.o_proj.weight"]
    )


def outliers(seg, path, factor=30.0):
    """The segment's graph with a few large input channels in a weight."""
    (site,) = (s for s in seg.graph.code.sites if s.path == path)
    W = seg.graph.params[site.weight].clone()
    W[:, [3, 50]] *= factor
    return seg.graph.update({site.weight: W}), site


@pytest.mark.parametrize("name", ["rotate_online", "incoherence"])
@pytest.mark.parametrize("family, path", [("llama", "mlp.down_proj"), ("opt", "fc2")])
def test_weights_become_incoherent(family, path, name):
    graph, site = outliers(segment(family), path)
    rotated = run(segment(family), ROTATIONS[name](), graph)
    largest = lambda g: float(g.weight_ok(site).abs().max() / g.weight_ok(site).std())
    assert largest(rotated) < 0.5 * largest(graph)
    assert rotated.weight_ok(site).norm() == pytest.approx(float(graph.weight_ok(site).norm()))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_four_bits_of_weights_and_inputs_lose_less(family):
    """Of an input with outliers, as what multiplies a gate has."""
    seg = segment(family)
    down = next(s for s in seg.graph.code.sites if s.path.endswith("down_proj"))
    up = next(s for s in seg.graph.code.sites if s.path.endswith(("up_proj", "gate_up_proj")))
    W = seg.graph.params[up.weight].clone()
    W[..., -5:, :] *= 20
    graph = seg.graph.update({up.weight: W})
    rounded = qlab.at("*down_proj", qlab.chain(qlab.rtn(INT4), quantize_inputs(INT4)))
    losses = []
    for recipe in (rounded, qlab.chain(qlab.rotate_online(), rounded)):
        solved = graph
        for stage in recipe:
            solved, _ = apply(stage, solved, {})
        out, before = (hidden(interpret(g, *seg.batches[0])) for g in (solved, graph))
        losses.append(relative(out, before))
    assert losses[1] < 0.7 * losses[0]
    assert dense(solved.params[down.weight], torch.float32).isfinite().all()


def test_a_written_model_with_turned_heads_computes_what_it_is_made_of(saved, tmp_path):
    source = saved("llama")
    recipe = qlab.chain(qlab.rotate_heads(), qlab.gptq("int8-channel"))
    result = qlab.quantize(source, recipe, random_tokens(source), tmp_path / "out")
    assert not qlab.verify(result, source).faults
    assert qlab.evaluate(result, source, random_tokens(source, seed=1)).kl < 1e-3


@pytest.mark.parametrize(
    "family, codec, words",
    [
        ("llama", "gptq", "GPTQ holds no run-time operations"),
        ("mixtral", "compressed-tensors", "the input of fused experts"),
    ],
)
def test_what_turns_at_run_time_is_refused_before_any_work_by_formats_without_a_place(
    family, codec, words, saved
):
    recipe = qlab.chain(qlab.quarot(), qlab.rtn(INT4))
    refused(lambda: qlab.plan(saved(family, torch.float16), recipe, codec=codec), words)


def test_a_draw_that_is_no_rotation_is_refused():
    stretch = lambda n, g: 2 * random_hadamard(n, g)
    refused(lambda: run(segment("llama"), qlab.rotate_heads(draw=stretch)), "M_inv is not the inv")


@pytest.mark.parametrize("n", [26, 52, 14, 7])
def test_a_size_without_a_hadamard_matrix_is_turned_in_blocks(n):
    R = random_hadamard(n, torch.Generator().manual_seed(0))
    assert relative(R @ R.T, torch.eye(n)) < 1e-6
    assert (R != 0).sum(1).unique().tolist() == [largest_order(n)]
