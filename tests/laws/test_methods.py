"""Every method is pure, deterministic and independent of visiting order, on every family and
spec."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from families import FAMILIES, MIXTURES
from methods import (
    BESIDE,
    LAW_METHODS,
    LAW_STEPS,
    MOVING,
    ONLINE,
    PRUNED,
    UNROUNDED,
    in_turn,
    pairs,
)
from quick import INSTEAD, WHOLE
from segments import assert_same, hidden, relative, reversed_sites, segment, tensors, untouched

from qlab.algebra.interpret import interpret
from qlab.algebra.leaf import Sum, proper
from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.running import apply
from qlab.algebra.spec import Int, Tile, parse_spec, with_scale_dtype
from qlab.algebra.stats import STATS
from qlab.methods import METHODS

every_method = pytest.mark.parametrize("method", LAW_METHODS)
all_families = [*FAMILIES, *MIXTURES]
every_family = pytest.mark.parametrize("family", all_families)
ROUNDING = [m for m in LAW_METHODS if m not in UNROUNDED]


def run(seg, transform, stats, graph=None):
    graph = graph or seg.graph
    for stage in transform:
        graph, stats = apply(stage, graph, stats)
    return graph, stats


def test_every_public_method_is_under_the_laws():
    """Those that turn the whole model have theirs in tests/driver/test_whole_methods.py."""
    of_blocks = METHODS.keys() - set(WHOLE)
    assert of_blocks <= LAW_METHODS.keys() and INSTEAD.keys() <= METHODS.keys()
    assert all(LAW_METHODS[name] is METHODS[name] for name in of_blocks - INSTEAD.keys())


@pytest.mark.parametrize("method, family", pairs(LAW_STEPS, all_families))
def test_a_transform_writes_to_none_of_its_inputs(method, family):
    seg, transform = segment(family), LAW_STEPS[method](parse_spec("int3-g32-asym"))
    stats = seg.stats_for(transform)
    kept = dict(stats)
    graph = seg.graph
    for stage in transform:
        params = dict(graph.params)
        with untouched(graph, seg.graph, stats, seg.stats):
            after, moved = apply(stage, graph, stats)
        assert graph.params == params and stats.keys() == kept.keys()
        assert all(stats[key] is kept[key] for key in kept)
        graph, stats, kept = after, moved, dict(moved)


@pytest.mark.parametrize("method, text, family", in_turn(LAW_STEPS, ("qwen2", "opt", "gpt2")))
def test_the_same_inputs_give_the_same_bits_in_any_order_of_sites(method, text, family):
    seg, transform = segment(family), LAW_STEPS[method](parse_spec(text))
    stats = seg.stats_for(transform)
    forward, backward = (
        run(seg, transform, stats, g) for g in (seg.graph, reversed_sites(seg.graph))
    )
    for one, other in zip(forward, backward):
        assert_same(one, other)
    assert forward[0].notes == backward[0].notes


@every_family
def test_the_order_of_batches_does_not_matter(family):
    seg = segment(family)
    keys = {(s.source, name) for s in seg.graph.sites for name in STATS}
    first, *others = (seg.observe(seg.graph, keys, order) for order in permutations(range(3)))
    for other in others:
        assert other.keys() == first.keys()
        for key in first:
            for a, b in zip(tensors([first[key]]), tensors([other[key]])):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
        source = next(iter(keys))[0]
        assert_same(first[source, "sample"], other[source, "sample"])


@pytest.mark.parametrize("method, family", pairs(ROUNDING, all_families))
def test_every_site_becomes_codes_of_its_own_shape_near_the_weight(method, family):
    seg = segment(family)
    spec = parse_spec("int8-g16")
    graph, _ = seg.solve(LAW_METHODS[method](spec))
    for site in (s for s in graph.sites if not s.router):
        assert isinstance(graph.params[site.weight], Sum) == (method in BESIDE)
        q = proper(graph.params[site.weight])
        assert isinstance(q, QTensor) and q.spec == with_scale_dtype(spec, torch.float32)
        assert q.shape == seg.graph.weight_ok(site).shape
        note = graph.notes[site.path]
        assert note["weight_error"] < 0.03 or note.get("dead") or method in PRUNED
    assert (method in ONLINE) == bool(graph.online)
    if method in PRUNED:
        return
    for i in range(2):
        out, reference = (hidden(interpret(g, *seg.batches[i])) for g in (graph, seg.graph))
        # Near a tie a token of a mixture changes its expert.
        by_token = (out - reference).norm(dim=-1) / reference.norm(dim=-1)
        assert 0 < (by_token.median() if family in MIXTURES else relative(out, reference)) < 0.02
    untouched_leaves = set(graph.params) - {s.weight for s in graph.sites if not s.router}
    if not method.startswith(MOVING):
        assert all(graph.params[name] is seg.graph.params[name] for name in untouched_leaves)


@pytest.mark.parametrize("method", ROUNDING)
def test_notes_hold_the_errors_that_were_made(method):
    seg = segment("opt")
    stages = LAW_METHODS[method](parse_spec("int4-g16"))
    stats = seg.stats_for(stages)
    before, moved = run(seg, stages[:-1], stats)
    after, _ = run(seg, stages[-1:], moved, before)
    for site in seg.graph.sites:
        # rtn sees what a mask left, other steps what they aim at.
        aimed = before.weight_ok(site) if stages[-1].name == "rtn" else after.target_ok(site)
        W, q = aimed.double(), dense(after.params[site.weight], torch.float64)
        note = after.notes[site.path]
        assert note["weight_error"] == pytest.approx(float((W - q).norm() / W.norm()), rel=1e-4)
        if "second_moment" in stages[-1].needs:
            H = moved[site.source, "second_moment"].mean_kk.double()
            loss = ((W - q) @ H * (W - q)).sum() / (W @ H * W).sum()
            assert note["loss"] == pytest.approx(float(loss), rel=1e-3) and note["tokens"] == 72


@every_method
def test_scales_are_stored_in_the_dtype_of_the_spec_or_the_model(method):
    seg = segment("llama")
    half = replace(seg.graph, dtype=torch.bfloat16)
    for spec, dtype in (
        (parse_spec("int4-g16"), torch.bfloat16),
        (Int(4, Tile(1, 16), True, torch.float16), torch.float16),
    ):
        transform = LAW_METHODS[method](spec)
        graph, _ = run(seg, transform, seg.stats_for(transform), half)
        leaves = [proper(graph.params[s.weight]) for s in graph.sites]
        assert {q.scales.dtype for q in leaves if isinstance(q, QTensor)} in ({dtype}, set())
