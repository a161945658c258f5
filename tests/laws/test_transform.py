"""Chains are concatenation, scopes say exactly which sites, and refusals name them."""

from dataclasses import replace

import pytest
import torch
from families import MIXTURES
from hypothesis import given
from hypothesis import strategies as st
from methods import LAW_METHODS
from segments import assert_same, normal, segment

from qlab.algebra.graph import by_source
from qlab.algebra.interpret import interpret
from qlab.algebra.qtensor import QTensor
from qlab.algebra.reparametrize import reparametrize
from qlab.algebra.running import apply, select
from qlab.algebra.scope import matches
from qlab.algebra.spec import parse_spec
from qlab.algebra.stats import STATS
from qlab.algebra.transform import Stage, at, chain, each_weight, keep, rules
from qlab.errors import QlabError
from qlab.methods.rtn import rtn

SPEC, COARSE = parse_spec("int4-g16"), parse_spec("int2-channel")
ATTENTION = {f"self_attn.{p}_proj" for p in "qkvo"}
NAMES = st.sampled_from(sorted(LAW_METHODS))


def rounded(graph):
    return {
        s.path: str(graph.params[s.weight].spec)
        for s in graph.sites
        if isinstance(graph.params[s.weight], QTensor)
    }


def run(graph, transform, stats=None):
    """All stages by hand, on statistics that are all there already."""
    for stage in transform:
        graph, stats = apply(stage, graph, stats)
    return graph, stats


@given(st.lists(NAMES, max_size=5), st.integers(0, 5), st.integers(0, 5))
def test_chain_is_associative_with_identity_and_keeps_the_order(names, i, j):
    ts = [LAW_METHODS[name](SPEC) for name in names]
    flat = tuple(stage for t in ts for stage in t)
    i, j = sorted((min(i, len(ts)), min(j, len(ts))))
    assert chain(*ts) == flat == chain(chain(*ts[:i]), chain(*ts[i:j]), chain(*ts[j:]))
    assert chain() == () and chain(chain(), *ts) == chain(*ts, chain()) == flat


@pytest.mark.parametrize("second", ["rtn", "gptq"])
def test_a_chain_does_what_its_parts_do_one_after_the_other(second):
    seg = segment("qwen2")
    first, then = LAW_METHODS["awq_scale"](SPEC), LAW_METHODS[second](SPEC)
    stats = seg.stats
    middle, moved = run(seg.graph, first, stats)
    by_hand = run(middle, then, moved)
    assert_same(run(seg.graph, chain(first, then), stats), by_hand)
    wrong = run(run(seg.graph, keep(), stats)[0], then, stats)[0]
    assert any(
        not torch.equal(wrong.params[s.weight].codes, by_hand[0].params[s.weight].codes)
        for s in seg.graph.sites
    )
    assert_same(seg.solve(())[0], seg.graph)


# Router and experts of a mixture share a norm and not their rows.
@pytest.mark.parametrize("family", ["opt", *MIXTURES])
def test_statistics_that_were_transported_are_those_of_the_new_inputs(family):
    seg = segment(family)
    graph, stats = run(seg.graph, LAW_METHODS["awq_scale"](SPEC), seg.stats)
    again = seg.all_stats(graph)
    assert stats.keys() == again.keys()
    changed = set()
    for key in {k for k in stats if k[1] == "second_moment"}:
        for before, moved, seen in zip(
            *(getattr(s[key], "states", (s[key],)) for s in (seg.stats, stats, again))
        ):
            assert torch.allclose(
                moved.mean_kk, seen.mean_kk, rtol=1e-4, atol=1e-4 * seen.mean_kk.abs().max()
            )
            changed |= set() if torch.allclose(moved.mean_kk, before.mean_kk) else {key}
    assert len(changed) > 1


@pytest.mark.parametrize(
    "pattern, chosen",
    [
        ("*", None),
        ("*.self_attn.*", ATTENTION),
        ("re:.*self_attn\\.[qkvo]_proj", ATTENTION),
        ("model.layers.1.*", set()),
        ("*.q_proj", {"self_attn.q_proj"}),
        ("re:q_proj", set()),
        ("model.layers.?.mlp.up_proj", {"mlp.up_proj"}),
    ],
)
def test_at_touches_exactly_the_matching_sites(pattern, chosen):
    seg = segment("llama")
    graph, _ = seg.solve(at(pattern, rtn(SPEC)))
    assert set(rounded(graph)) == ({s.path for s in seg.graph.sites} if chosen is None else chosen)
    for site in graph.sites:
        if site.path not in rounded(graph):
            assert graph.params[site.weight] is seg.graph.params[site.weight]
    assert graph.selected is None


def test_scopes_nest():
    (stage,) = at("*.self_attn.*", at("*.q_proj", rtn(SPEC)))
    assert [s.path for s in select(stage, segment("llama").graph).sites] == ["self_attn.q_proj"]
    assert str(stage.scope) == "*.self_attn.* and *.q_proj"


def test_the_first_matching_rule_decides():
    seg = segment("llama")
    graph, _ = seg.solve(rules({"*.q_proj": keep(), "*.self_attn.*": rtn(SPEC), "*": rtn(COARSE)}))
    expected = {s.path: str(SPEC if s.path in ATTENTION else COARSE) for s in graph.sites} | {
        "self_attn.q_proj": None
    }
    assert {s.path: rounded(graph).get(s.path) for s in graph.sites} == expected


def test_one_matching_rule_gives_what_the_method_gives_alone():
    seg = segment("llama")
    assert_same(seg.solve(rules({"*": rtn(SPEC)}))[0], seg.solve(rtn(SPEC))[0])


def test_a_site_that_no_rule_covers_is_refused_by_name():
    with pytest.raises(
        QlabError, match=r"no rule covers model\.layers\.0\.mlp\.gate_proj, .*mlp\.down_proj"
    ):
        segment("llama").solve(rules({"*.self_attn.*": rtn(SPEC)}))


@pytest.mark.parametrize("method", ["awq", "awq_scale"])
def test_splitting_a_shared_input_under_a_reparametrization_is_refused_by_name(method):
    with pytest.raises(QlabError) as refusal:
        segment("llama").solve(at("*.q_proj", LAW_METHODS[method](SPEC)))
    assert (
        "model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj shares its input"
        in str(refusal.value)
    )
    assert "one rule for all of them" in str(refusal.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", LAW_METHODS)
def test_weights_that_are_not_finite_are_refused_by_site(value, method):
    seg = segment("opt")
    weight = seg.graph.params["fc1.weight"].clone()
    weight[3, 5] = value
    lossless_first = [t for t in LAW_METHODS[method](SPEC) if t.spec] or rtn(SPEC)
    stats = seg.stats_for(lossless_first)
    with pytest.raises(QlabError, match=r"model\.decoder\.layers\.0\.fc1\.weight holds NaN or Inf"):
        run(seg.graph.update({"fc1.weight": weight}), lossless_first, stats)


def test_a_weight_of_another_shape_is_refused_by_site():
    seg = segment("llama")
    with pytest.raises(QlabError, match=r"mine made a weight \(64, 32\) of one \(64, 64\)"):
        run(seg.graph, each_weight("mine", lambda W, seen, spec: (W[:, :32], {}), SPEC), seg.stats)


def test_a_note_that_the_report_cannot_hold_is_refused_by_site():
    seg = segment("llama")
    with pytest.raises(
        QlabError, match=r"proj: mine notes what no report holds \(Object of type Tensor"
    ):
        run(
            seg.graph,
            each_weight("mine", lambda W, seen, spec: (W, {"mean": W.mean()}), SPEC),
            seg.stats,
        )
    with pytest.raises(
        QlabError, match=r"proj: mine notes what no report holds \(Out of range float values"
    ):
        run(
            seg.graph,
            each_weight("mine", lambda W, seen, spec: (W, {"mean": float("nan")}), SPEC),
            seg.stats,
        )


@pytest.mark.parametrize("name", ["weight_error", "loss", "tokens", "spec", "bits_per_weight"])
def test_a_step_does_not_say_what_is_measured_of_it(name):
    seg = segment("llama")
    with pytest.raises(
        QlabError, match=f"proj: mine notes '{name}', which is measured and not said by a step"
    ):
        run(seg.graph, each_weight("mine", lambda W, seen, spec: (W, {name: 0.0}), None), seg.stats)


def test_a_weight_or_scales_that_are_no_numbers_are_refused_by_site():
    seg = segment("llama")
    with pytest.raises(QlabError, match=r"proj: mine made a weight that holds NaN or Inf"):
        run(
            seg.graph,
            each_weight("mine", lambda W, seen, spec: (W * torch.nan, {}), SPEC),
            seg.stats,
        )
    large = seg.graph.update(
        {n: leaf * 1e7 for n, leaf in seg.graph.params.items() if n.endswith("proj.weight")}
    )
    with pytest.raises(
        QlabError,
        match=(
            r"proj: rtn made scales that torch\.float16 does not hold \(NaN or Inf\); choose "
            r"another"
        ),
    ):
        run(large, rtn(replace(SPEC, scale_dtype=torch.float16)), seg.stats)


def test_groups_that_do_not_divide_are_refused_by_site():
    with pytest.raises(
        QlabError,
        match=r"layers\.0\.self_attn\.q_proj: groups of 48 do not divide the 64 input channels",
    ):
        segment("llama").solve(rtn(parse_spec("int4-g48")))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_reparametrizing_moves_weights_inputs_and_statistics_together(family):
    seg = segment(family)
    source, sites = next(iter(by_source(seg.graph.sites).items()))
    k = seg.graph.weight_ok(sites[0]).shape[1]
    stats, M = seg.stats, torch.linalg.qr(normal(k, k, seed=1))[0]
    graph, moved = reparametrize(seg.graph, stats, source, M, M.T)
    again = seg.observe(graph, {(source, name) for name in STATS})
    H, H_again = (s[source, "second_moment"].mean_kk for s in (moved, again))
    assert torch.allclose(H, H_again, atol=1e-4 * float(H_again.abs().max()))
    assert torch.allclose(graph.weight_ok(sites[0]), seg.graph.weight_ok(sites[0]) @ M, atol=1e-5)
    assert (source, "absmax") not in moved and (source, "second_moment") in moved
    assert all(moved[key] is stats[key] for key in stats if key[0] != source)


def test_interpreting_differentiates_through_leaves():
    seg = segment("opt")
    with torch.enable_grad():
        W = seg.graph.params["fc1.weight"].clone().requires_grad_()
        out = interpret(seg.graph.update({"fc1.weight": W}), *seg.batches[0])
        (out if isinstance(out, torch.Tensor) else out[0]).square().sum().backward()
    assert W.grad.abs().sum() > 0


def test_patterns_are_globs_or_anchored_expressions():
    assert matches("*.q", "a.q") and not matches("*.q", "a.qq") and not matches("*.Q", "a.q")
    assert (
        matches("re:a\\.[qk]", "a.k")
        and not matches("re:a", "a.k")
        and not matches("a.[!q]", "a.q")
    )


def test_stages_are_values():
    (stage,) = rtn(SPEC)
    assert isinstance(stage, Stage) and replace(stage) == stage
    with pytest.raises(AttributeError):
        stage.name = "other"


def test_what_cannot_be_transported_is_observed_again_on_the_new_graph():
    seg, needs, seen = segment("opt"), frozenset({"absmax", "second_moment"}), {}

    def turn(graph, stats):
        for source, sites in by_source(graph.sites).items():
            k = graph.weight_ok(sites[0]).shape[1]
            R = torch.linalg.qr(normal(k, k, seed=k))[0]
            graph, stats = reparametrize(graph, stats, source, R, R.T)
        return graph, stats

    def look(graph, stats):
        seen.update(stats)
        return graph, stats

    graph, _ = seg.solve((Stage("turn", needs, turn), Stage("look", needs, look)))
    again = seg.all_stats(graph)
    for source in by_source(graph.sites):
        assert torch.equal(seen[source, "absmax"], again[source, "absmax"])
        assert not torch.allclose(seen[source, "absmax"], seg.stats[source, "absmax"])
        H, observed = (s[source, "second_moment"].mean_kk for s in (seen, again))
        assert torch.allclose(H, observed, atol=1e-4 * float(observed.abs().max()))
