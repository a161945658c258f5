"""The target that also makes up for the residual stream: what it sees of the stream, and that it is
never worse on tokens that were held out."""

import pytest
import torch
from families import MIXTURES
from hypothesis import given
from hypothesis import strategies as st
from segments import assert_same, batches_of, hidden, normal, relative, segment
from test_gptaq import drifted, drifting

from qlab.algebra.graph import by_source, lone_weight
from qlab.algebra.interpret import inputs_of, interpret, values_at
from qlab.algebra.spec import parse_spec
from qlab.algebra.statistic import Observation
from qlab.algebra.stats import HELD_OUT, STATS, STRETCH
from qlab.algebra.stream import streams_joined
from qlab.algebra.transform import at, chain, each_cell
from qlab.driver.observe import Reference, observe
from qlab.driver.solve import solve_in_order
from qlab.errors import QlabError
from qlab.methods.loaq import NEEDS, aim_in_stream
from qlab.methods.qronos import aim_held_out, pull_of, step_of
from qlab.methods.rtn import rtn

SPEC = parse_spec("int4-g16")
WRITERS = ("llama", "qwen3", "phi3", "gpt2", "opt", "mixtral")


def joined_sites(seg):
    joined = streams_joined(seg.graph.code)
    sources = by_source(seg.graph.code.sites)
    return {sources[source][0].path: (source, node) for source, node in joined.items()}


@pytest.mark.parametrize("family", WRITERS)
def test_the_stream_and_the_output_make_what_comes_behind(family):
    seg, (args, kwargs) = segment(family), segment(family).batches[0]
    joined = joined_sites(seg)
    names = [path.rpartition(".")[2] for path in joined]
    assert names == {
        "gpt2": ["c_proj", "c_proj"],
        "opt": ["out_proj", "fc2"],
        "mixtral": ["o_proj"],
    }.get(family, ["o_proj", "down_proj"])
    path, (_, node) = list(joined.items())[-1]
    if family != "mixtral":
        (r,) = values_at(seg.graph, [(node, None)], args, kwargs)
        out = inputs_of(seg.graph, [f"{path}:out"], args, kwargs)[f"{path}:out"].x
        leaving = hidden(interpret(seg.graph, args, kwargs))
        assert relative(r.flatten(0, -2) + out.flatten(0, -2), leaving.flatten(0, -2)) < 1e-6


def test_a_sum_with_what_comes_after_the_input_is_no_stream():
    """Where attention and MLP stand side by side, the later one's sum is there in time alone."""
    assert list(joined_sites(segment("gpt_neox"))) == ["mlp.dense_4h_to_h"]


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_behind_a_norm_nothing_is_known_of_the_stream(family):
    assert not joined_sites(segment(family))


def seen_of(x, other, stream):
    o = Observation(x, torch.arange(len(x)), reference_nk=other, stream_no=stream)
    return {name: STATS[name].lift(o) for name in (*NEEDS, "drift", "stream_drift")}


@given(st.tuples(st.integers(1, 8), st.integers(2, 12), st.integers(0, 99)))
def test_what_is_chosen_is_never_worse_on_the_tokens_that_were_held_out(shape):
    o, k, seed = shape
    n = 2 * HELD_OUT * STRETCH
    W, (x, other) = normal(o, k, seed=seed + 3), drifting(k, seed, n)
    stream = 0.3 * x @ normal(o, k, seed=seed).T + 0.1 * normal(n, o, seed=seed + 1)
    graph, (stage,) = lone_weight("m", W), aim_in_stream((0.01,))
    states = {("m", name): state for name, state in seen_of(x, other, stream).items()}
    note = stage.apply(graph, states)[0].notes["m"]
    held = (torch.arange(n) // STRETCH) % HELD_OUT == HELD_OUT - 1
    goal = (other @ W.T + stream)[held].double()
    fitted = seen_of(x[~held], other[~held], stream[~held])
    pull = pull_of(W, fitted["drift"], fitted["stream_drift"])
    step = step_of(pull, fitted["second_moment"], note["aim_damp"])

    def error(V):
        return float((x[held].double() @ V.double().T - goal).square().sum())

    assert 0 < note["aim_strength"] <= 1
    assert error(W + note["aim_strength"] * step) <= error(W) * (1 + 1e-5)


def test_a_stream_that_the_input_says_is_made_up_for():
    n, k = 4 * STRETCH, 24
    W, x, lacking = normal(8, k, seed=1), normal(n, k, seed=2), normal(8, k, seed=3)
    graph, (stage,) = lone_weight("m", W), aim_in_stream()
    states = {("m", name): s for name, s in seen_of(x, x, x @ lacking.T).items()}
    moved, _ = stage.apply(graph, states)
    assert relative(moved.weight_ok(moved.sites[0]), W + lacking) < 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2", *MIXTURES])
def test_the_drift_of_the_stream_is_the_same_by_both_ways_of_solving(family):
    """Observed of a whole segment, and of walks that wait inside it."""
    seg, off = segment(family), drifted(segment(family))
    reference = Reference(seg.graph, batches_of(seg))
    seen = {}

    def remember(weight):
        seen[weight.name] = weight.stats["stream_drift"]
        return weight.cell

    joined = {f"{seg.graph.path}.{path}": node for path, node in joined_sites(seg).items()}
    look = each_cell("look", remember, {"stream_drift"})
    for name in joined:
        solve_in_order(seg.graph, at(name, look), off, reference=reference)
    for name, (source, _) in joined.items():
        stats = observe(seg.graph, {(source, "stream_drift")}, off, reference=reference)
        whole, waiting = stats[source, "stream_drift"], seen[name]
        assert whole.tokens == waiting.tokens == 72 and whole.sum_kk.any()
        assert torch.allclose(whole.sum_kk, waiting.sum_kk, rtol=1e-4, atol=1e-5)


def test_without_drift_nothing_moves():
    seg = segment("llama")
    assert_same(seg.solve(chain(aim_in_stream(), rtn(SPEC)))[0], seg.solve(rtn(SPEC))[0])


def test_where_no_stream_is_known_it_is_qronos_target(monkeypatch):
    monkeypatch.setattr("qlab.algebra.stats.STRETCH", 4)
    seg = segment("gemma2")
    reference = Reference(seg.graph, batches_of(seg))
    graphs = [
        solve_in_order(seg.graph, aim, drifted(seg), reference=reference)[0]
        for aim in (aim_in_stream(), aim_held_out())
    ]
    moved = 0
    for site in seg.graph.sites:
        ours, theirs = (graph.weight_ok(site) for graph in graphs)
        assert relative(ours, theirs) < 1e-4
        moved += not torch.equal(theirs, seg.graph.weight_ok(site))
    assert moved


def test_bad_settings_are_refused():
    with pytest.raises(QlabError, match="damps is empty"):
        aim_in_stream(())
    with pytest.raises(QlabError, match="damp is 3"):
        aim_in_stream((0.1, 3))
