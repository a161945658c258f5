"""One forward pass that waits at every source: what it sees, what it solves and what leaves it."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, MIXTURES
from segments import assert_same, batches_of, hidden, normal, of, relative, segment
from torch import nn

from qlab.algebra.absorb import fold_scales
from qlab.algebra.graph import by_source
from qlab.algebra.interpret import Walk, inputs_of, interpret, outputs_of
from qlab.algebra.spec import parse_spec
from qlab.algebra.statistic import PerExpert
from qlab.algebra.transform import at, chain, keep, rules
from qlab.driver import solve
from qlab.driver.solve import solve_in_order
from qlab.methods.awq import awq, awq_scale
from qlab.methods.gptq import gptq
from qlab.methods.inputs import quantize_inputs
from qlab.methods.rtn import rtn

SPEC = parse_spec("int4-g16")
every_family = pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])


def rounded_before(graph, solved, source):
    """The graph with the leaves of `solved` at every site that runs before those of the source."""
    groups = by_source(graph.code.sites)
    done = [
        s.weight for earlier in list(groups)[: list(groups).index(source)] for s in groups[earlier]
    ]
    return graph.update({weight: solved.params[weight] for weight in done})


@every_family
@pytest.mark.parametrize("forgetful", [False, True])
def test_a_walk_meets_at_every_source_what_the_leaves_before_it_produce(family, forgetful):
    seg = segment(family)
    graph, solved = seg.graph, seg.solve(rtn(SPEC))[0]
    walk, batch = Walk(graph.code), seg.batches[0]
    for source in by_source(graph.code.sites):
        now = rounded_before(graph, solved, source)
        assert torch.equal(
            walk.to(now, source, *batch).x, inputs_of(now, [source], *batch)[source].x
        )
        if forgetful:
            walk.forget()
            assert walk.nbytes() == 0
    assert_same(walk.end(solved, *batch), outputs_of(solved, *batch))


@every_family
def test_each_source_is_solved_on_what_the_quantized_ones_before_it_produce(family):
    seg = segment(family)
    graph, (leaving,) = solve_in_order(seg.graph, gptq(SPEC), batches_of(seg))
    by_hand = seg.graph
    for sites in by_source(seg.graph.code.sites).values():
        here = replace(by_hand, selected=frozenset(s.path for s in sites))
        by_hand = replace(seg.solve(gptq(SPEC), here)[0], selected=None)
    assert_same(graph, by_hand)
    assert graph.selected is None
    for out, batch in zip(leaving, seg.batches, strict=True):
        assert torch.equal(hidden(out), hidden(interpret(graph, *batch)))


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_are_searched_in_order_and_folded_when_all_is_solved(family):
    seg, recipe = segment(family), awq(SPEC)
    graph, (leaving,) = solve_in_order(seg.graph, recipe, batches_of(seg))
    by_hand = seg.graph
    for sites in by_source(seg.graph.code.sites).values():
        here = replace(by_hand, selected=frozenset(s.path for s in sites))
        by_hand = replace(
            seg.solve(tuple(s for s in recipe if s.name != "absorb"), here)[0], selected=None
        )
    assert by_hand.online and not graph.online
    assert_same(graph, fold_scales(by_hand))
    for out, batch in zip(leaving, seg.batches, strict=True):
        assert relative(hidden(out), hidden(interpret(graph, *batch))) < 1e-5


def test_an_input_that_is_copied_early_waits_for_its_site():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            early = (2 * x).clone()
            return self.second(early) + self.first(x + 1)

    class Swapped(Late):
        def forward(self, x):
            early = (2 * x).clone()
            return self.first(x + 1) + self.second(early)

    for block in (Late(), Swapped()):
        seg = of(block, normal(2, 4, 16, seed=0))
        walk = Walk(seg.graph.code)
        for source in by_source(seg.graph.code.sites):
            expected = inputs_of(seg.graph, [source], *seg.batches[0])[source]
            assert torch.equal(walk.to(seg.graph, source, *seg.batches[0]).x, expected.x)


def test_what_does_not_fit_is_computed_again_to_the_same_bits(monkeypatch):
    seg, results = segment("llama"), []
    for most_bytes in (0, 20000, 1 << 30):
        monkeypatch.setattr(solve, "HELD", most_bytes)
        graph, (leaving,) = solve_in_order(seg.graph, gptq(SPEC), batches_of(seg))
        results.append([graph, *(out.clone() for (out,) in leaving)])
    first, *others = results
    for other in others:
        assert_same(first[0], other[0])
        assert all(map(torch.equal, first[1:], other[1:]))


def test_what_waits_is_within_the_limit(monkeypatch):
    seg, waiting = segment("llama"), []
    monkeypatch.setattr(solve, "HELD", 20000)
    walks = []
    monkeypatch.setattr(solve, "Walk", lambda code: walks.append(Walk(code)) or walks[-1])
    watched = rules({"*.o_proj": gptq(SPEC), "*": keep()})
    watched = tuple(
        replace(
            s,
            spec=None,
            apply=lambda g, st: waiting.append(sum(w.nbytes() for w in walks)) or (g, st),
        )
        for s in watched
    )
    solve_in_order(seg.graph, watched, batches_of(seg))
    assert 0 < max(waiting) <= 20000


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("at_once, most_bytes", [(1, 1 << 30), (3, 1 << 30), (3, 0)])
def test_experts_observed_in_parts_give_the_bits_of_all_at_once(
    family, at_once, most_bytes, monkeypatch
):
    seg, most = segment(family), []
    whole, (leaving,) = solve_in_order(seg.graph, gptq(SPEC), batches_of(seg))
    look = solve._observe_waiting
    monkeypatch.setattr(
        solve, "_observe_waiting", lambda *a, **k: most.append(look(*a, **k)) or most[-1]
    )
    monkeypatch.setattr(solve, "HELD", most_bytes)
    parts, (then,) = solve_in_order(seg.graph, gptq(SPEC), batches_of(seg), at_once)
    assert_same(parts, whole)
    assert parts.notes == whole.notes
    assert all(torch.equal(*pair) for pairs in zip(leaving, then) for pair in zip(*pairs))
    counts = [len(s.states) for stats in most for s in stats.values() if isinstance(s, PerExpert)]
    assert max(counts) == at_once and len(counts) > 2  # never more than were asked for


@pytest.mark.parametrize("family", ["llama", *MIXTURES])
def test_rounded_inputs_are_what_the_sites_behind_them_are_calibrated_on(family):
    seg, recipe = segment(family), chain(gptq(SPEC), quantize_inputs(parse_spec("int3-channel")))
    graph, (leaving,) = solve_in_order(seg.graph, recipe, batches_of(seg))
    by_hand = seg.graph
    for sites in by_source(seg.graph.code.sites).values():
        by_hand = replace(
            seg.solve(recipe, replace(by_hand, selected=frozenset(s.path for s in sites)))[0],
            selected=None,
        )
    assert_same(graph, by_hand)
    assert set(graph.online) == {site.path for site in graph.sites if not site.router}
    for (out,), batch in zip(leaving, seg.batches, strict=True):
        assert torch.equal(out, hidden(interpret(graph, *batch)))


def test_rules_hold_source_by_source():
    seg = segment("llama")
    recipe = rules({"*.o_proj": keep(), "*.mlp.*": rtn(SPEC), "*": gptq(SPEC)})
    graph, _ = solve_in_order(seg.graph, recipe, batches_of(seg))
    assert isinstance(graph.params["self_attn.o_proj.weight"], torch.Tensor)
    alone, _ = solve_in_order(seg.graph, at("*.mlp.*", rtn(SPEC)), batches_of(seg))
    assert torch.equal(
        graph.params["mlp.up_proj.weight"].codes, alone.params["mlp.up_proj.weight"].codes
    )


@pytest.mark.parametrize(
    "recipe, family, inputs, expected",
    [
        (rules({"*.o_proj": keep(), "*": gptq(SPEC)}), "llama", "quantized", True),
        (gptq(SPEC), "llama", "reference", False),
        (chain(awq_scale(SPEC), gptq(SPEC)), "llama", "quantized", True),
        (
            chain(awq_scale(SPEC), gptq(SPEC)),
            "mixtral",
            "quantized",
            False,
        ),  # a router and experts share channels
        (gptq(SPEC), "mixtral", "quantized", True),
        (
            awq(parse_spec("nvfp4")),
            "llama",
            "quantized",
            False,
        ),  # its scales take no others once they are rounded
        (
            chain(gptq(SPEC), quantize_inputs(parse_spec("int8-channel"))),
            "llama",
            "quantized",
            True,
        ),
    ],
)
def test_which_recipes_are_solved_in_order(recipe, family, inputs, expected):
    assert solve.in_order(segment(family).graph.code, recipe, inputs) is expected
