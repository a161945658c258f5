"""Weights aimed at the reference: the closed form is a least-squares solution, without drift
nothing moves, and errors shrink."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, MIXTURES
from hypothesis import given
from hypothesis import strategies as st
from segments import assert_same, batches_of, hidden, normal, relative, segment

from qlab.algebra.graph import lone_weight
from qlab.algebra.interpret import interpret
from qlab.algebra.reparametrize import reparametrize
from qlab.algebra.spec import parse_spec
from qlab.algebra.statistic import Observation
from qlab.algebra.stats import STATS, Moment
from qlab.algebra.transform import Stage, at, chain
from qlab.algebra.views import Gauged
from qlab.driver.observe import Reference, observe
from qlab.driver.solve import solve, solve_in_order
from qlab.errors import QlabError
from qlab.methods.gptaq import aim_at_reference, gptaq
from qlab.methods.gptq import gptq

SPEC = parse_spec("int4-g16")
SHAPES = st.tuples(st.integers(1, 8), st.integers(2, 12), st.integers(0, 99))
STRENGTHS = st.floats(0.1, 1.0)


def drifting(k, seed, n=64):
    """x, and x' a little away from it in a direction that depends on x, so that a weight can make
    up for some of it."""
    x = normal(n, k, seed=seed) + 0.3
    return x, x + x @ (0.2 * normal(k, k, seed=seed + 1)) + 0.1 * normal(n, k, seed=seed + 2)


def aimed(W_ok, x, other, **options):
    graph = lone_weight("m", W_ok)
    seen = Observation(x, torch.arange(len(x)), reference_nk=other)
    stats = {("m", name): STATS[name].lift(seen) for name in ("second_moment", "drift")}
    [stage] = aim_at_reference(**options)
    return stage.apply(graph, stats)[0].weight_ok(graph.sites[0])


@given(SHAPES, STRENGTHS)
def test_it_is_the_least_squares_solution(shape, strength):
    o, k, seed = shape
    W, (x, other), damp = normal(o, k, seed=seed + 3), drifting(k, seed), 0.01
    V = aimed(W, x, other, strength=strength, damp=damp).double()
    between = (x + strength * (other - x)).double()
    ridge = damp * x.double().square().mean(0).mean() * len(x)
    A = torch.cat([x.double(), ridge.sqrt() * torch.eye(k)])
    expected = torch.linalg.lstsq(
        A, torch.cat([between, ridge.sqrt() * torch.eye(k)]) @ W.double().T
    ).solution.T
    assert torch.allclose(V, expected, rtol=1e-3, atol=1e-4)


@given(SHAPES)
def test_outputs_come_nearer_to_the_reference(shape):
    o, k, seed = shape
    W, (x, other) = normal(o, k, seed=seed + 3), drifting(k, seed)
    tried = (W, aimed(W, x, other, strength=0.5), aimed(W, x, other, strength=1.0, damp=1e-4))
    errors = [(x @ V.T - other @ W.T).norm() for V in tried]
    assert errors[0] > errors[1] > errors[2]


@given(SHAPES)
def test_without_drift_the_weight_keeps_its_bits(shape):
    o, k, seed = shape
    W, x = normal(o, k, seed=seed), normal(32, k, seed=seed + 1)
    assert torch.equal(aimed(W, x, None), W) and torch.equal(aimed(W, x, x), W)


def test_a_second_moment_beyond_repair_is_refused_by_site_and_raised_damping_is_noted():
    [stage], graph = aim_at_reference(), lone_weight("m", normal(3, 8, seed=0))
    drift = Moment(torch.ones(8, 8), 1)
    with pytest.raises(
        QlabError, match=r"^m: the second moment is not positive definite even with damping 1"
    ):
        stage.apply(
            graph,
            {
                ("m", "second_moment"): Moment(torch.eye(8) - torch.ones(8, 8), 1),
                ("m", "drift"): drift,
            },
        )
    shaky = torch.eye(8) - 0.13 * torch.ones(8, 8)
    notes = stage.apply(graph, {("m", "second_moment"): Moment(shaky, 1), ("m", "drift"): drift})[
        0
    ].notes
    assert notes["m"]["aim_damp"] > 0.01


@given(SHAPES)
def test_scaling_the_inputs_before_or_after_is_the_same(shape):
    o, k, seed = shape
    W = normal(o, k, seed=seed + 3)
    x, other = drifting(k, seed)
    m = normal(k, seed=seed + 4).abs() + 0.5
    first = aimed(W, x, other, damp=1e-7) / m
    then = aimed(W / m, x * m, other * m, damp=1e-7)
    assert torch.allclose(first, then, rtol=1e-2, atol=1e-3)


def drifted(seg):
    """The segment's calls with hidden states a little away, as rounded blocks before it would send
    them."""
    d = next(batches_of(seg)())[1][0].shape[-1]
    return lambda: (
        (call, (h + 0.2 * h @ normal(d, d, seed=5) / d**0.5,)) for call, (h,) in batches_of(seg)()
    )


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_a_block_whose_inputs_drift_ends_nearer_to_the_reference(family):
    seg, reference = segment(family), segment(family).graph
    exact = [hidden(interpret(reference, *batch)) for batch in seg.batches]
    _, (plain,) = solve_in_order(reference, gptq(SPEC), drifted(seg))
    _, (aimed_at, beside) = solve_in_order(
        reference, gptaq(SPEC), drifted(seg), reference=Reference(reference, batches_of(seg))
    )
    errors = [
        sum(relative(hidden(out), y) for out, y in zip(stream, exact))
        for stream in (plain, aimed_at)
    ]
    assert errors[1] < errors[0]
    assert all(map(torch.equal, map(hidden, beside), exact))  # the reference goes on as it is


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_and_weights_of_experts_stay(family):
    seg = segment(family)
    graph, _ = solve_in_order(
        seg.graph, aim_at_reference(), drifted(seg), None, Reference(seg.graph, batches_of(seg))
    )
    moved = {
        site.path
        for site in graph.sites
        if graph.params[site.weight] is not seg.graph.params[site.weight]
    }
    assert moved and moved == {
        site.path for site in graph.sites if not site.route and not site.router
    }


@pytest.mark.parametrize("in_order", [False, True])
def test_scales_before_it_or_after_it_make_the_same_block(in_order):
    seg = segment("llama")
    reference = Reference(segment("llama").graph, batches_of(segment("llama")))
    m, outs = normal(128, seed=7).abs() + 0.5, []

    def move(graph, stats):
        return (
            reparametrize(graph, stats, graph.sites[0].source, m, 1 / m)
            if graph.sites
            else (graph, stats)
        )

    scale = (Stage("scale", frozenset(), move, Gauged(by_source=True)),)
    aim, scale = (at("*.down_proj", stages) for stages in (aim_at_reference(damp=1e-6), scale))
    for recipe in (chain(scale, aim), chain(aim, scale)):
        if in_order:
            _, (leaving, _) = solve_in_order(seg.graph, recipe, drifted(seg), reference=reference)
            outs.append(list(map(hidden, leaving)))
        else:
            graph, _ = solve(
                seg.graph,
                recipe,
                lambda now, keys: observe(now, keys, drifted(seg), reference=reference),
            )
            outs.append([hidden(interpret(graph, *call.inputs(h))) for call, h in drifted(seg)()])
    plain = [hidden(interpret(seg.graph, *call.inputs(h))) for call, h in drifted(seg)()]
    for first, then, unmoved in zip(*outs, plain):
        assert relative(first, then) < 1e-2 * relative(first, unmoved)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_on_the_reference_s_own_activations_it_is_gptq(family):
    seg = segment(family)
    assert_same(seg.solve(gptaq(SPEC))[0], seg.solve(gptq(SPEC))[0])
    same = Reference(seg.graph, batches_of(seg))
    first = next(iter(seg.graph.sites)).source
    stats = observe(seg.graph, {(first, "drift")}, batches_of(seg), reference=same)
    assert not stats[first, "drift"].sum_kk.any()


def test_blocks_and_sources_see_the_same_drift():
    seg = segment("llama")
    first = next(iter(seg.graph.sites)).source
    whole = observe(
        seg.graph,
        {(first, "drift")},
        drifted(seg),
        reference=Reference(seg.graph, batches_of(seg)),
    )
    seen = {}
    [stage] = aim_at_reference()
    keep = replace(stage, apply=lambda graph, stats: seen.update(stats) or (graph, stats))
    solve_in_order(
        seg.graph, (keep,), drifted(seg), reference=Reference(seg.graph, batches_of(seg))
    )
    assert whole[first, "drift"].sum_kk.any() and torch.equal(
        seen[first, "drift"].sum_kk, whole[first, "drift"].sum_kk
    )
