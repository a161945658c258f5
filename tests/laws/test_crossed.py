"""Scales and matrices that fold across a value on which an operation stands, in either order."""

import pytest
import torch
from families import MIXTURES
from model_folders import random_tokens
from segments import batches_of, hidden, relative, segment

import qlab
from qlab.algebra.crossed import crossed
from qlab.algebra.gauge import gauge
from qlab.algebra.interpret import inputs_of, interpret
from qlab.algebra.wires import wires
from qlab.driver.lossless import refuse_changed
from qlab.driver.solve import in_order, solve, solve_in_order
from qlab.errors import QlabError

STORED, FP8_LARGEST = "fp8-head", 448
GAUGES = {
    "awq_scale": qlab.awq_scale("int8-channel"),
    "smoothquant": qlab.smoothquant(),
    "rotate_heads": qlab.rotate_heads(),
    "rotate_scores": qlab.rotate_scores(),
}
CACHES = {
    "stored": qlab.kv_cache(STORED),
    "per token": qlab.kv_cache("int8-token"),
    "clipped": qlab.kv_clipped("int4-token"),
    "centred": qlab.chain(qlab.centre_keys(), qlab.kv_cache(STORED)),
}
FAMILIES = ("llama", "phi3", "gpt2", "mixtral")
gauges = pytest.mark.parametrize("turning", GAUGES)


def solved(seg, recipe):
    """The block as the driver solves it, with every claim checked."""
    batches = batches_of(seg)

    def check(stage, before, after):
        refuse_changed(stage, before, after, None, batches)

    if in_order(seg.graph.code, recipe, "quantized"):
        return solve_in_order(seg.graph, recipe, batches, check=check)[0]
    return solve(seg.graph, recipe, seg.observe, check)[0]


def without_rounding(graph):
    """The block without what stands on its values but rotations of keys and queries."""
    kept = {
        wire: tuple(op for op in ops if type(op).__name__ in ("MatMul", "Multiply"))
        for wire, ops in graph.inserts.items()
    }
    return graph.with_inserts({wire: ops for wire, ops in kept.items() if ops})


def refuse_other_function(seg, graph):
    for batch in seg.batches[:2]:
        after, before = (hidden(interpret(g, *batch)) for g in (graph, seg.graph))
        assert relative(after, before) < 1e-4


@gauges
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("cache_first", [False, True])
def test_the_function_stays_in_either_order(turning, cache, cache_first):
    seg = segment("llama")
    pair = (GAUGES[turning], CACHES[cache])
    graph = solved(seg, qlab.chain(*(reversed(pair) if cache_first else pair)))
    refuse_other_function(seg, without_rounding(graph))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("turning", ["awq_scale", "smoothquant", "rotate_heads"])
@pytest.mark.parametrize("cache_first", [False, True])
def test_a_stored_scale_is_that_of_the_values_that_run(family, turning, cache_first):
    seg = segment(family)
    pair = (GAUGES[turning], qlab.kv_cache(STORED))
    graph = solved(seg, qlab.chain(*(reversed(pair) if cache_first else pair)))
    plain = without_rounding(graph)
    refuse_other_function(seg, plain)
    (name,) = [wire for wire in graph.inserts if wire.endswith(":value")]
    values = [inputs_of(plain, [name], *batch)[name].x.flatten(0, -2) for batch in seg.batches]
    heads = wires(graph.code)[name].heads
    largest_h = torch.cat(values).float().unflatten(1, (heads, -1)).abs().amax((0, 2))
    (op,) = graph.inserts[name]
    torch.testing.assert_close(op.scales[0] * FP8_LARGEST, largest_h, rtol=1e-3, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_first_decides_whether_values_turn(family):
    seg = segment(family)
    for turning in ("smoothquant", "rotate_heads"):
        cache = qlab.kv_cache(STORED)
        behind = solved(seg, qlab.chain(GAUGES[turning], cache))
        in_front = solved(seg, qlab.chain(cache, GAUGES[turning]))
        alone = solved(seg, GAUGES[turning])
        readers = [s for s in seg.graph.sites if crossed_by_value(seg.graph.code, s)]
        assert readers
        for site in readers:
            turned, left, reference = (g.params[site.weight] for g in (behind, in_front, alone))
            assert torch.equal(turned, reference)
            assert torch.equal(left, seg.graph.params[site.weight])


def crossed_by_value(code, site):
    return any(wire.endswith(":value") for wire in crossed(code).get(site.origin, ()))


@pytest.mark.parametrize("family", ["llama", "phi3", *MIXTURES])
def test_a_fold_crosses_values_and_outputs_and_no_keys(family):
    for between in crossed(segment(family).graph.code).values():
        assert not any(wire.endswith((":query", ":key", ":in")) for wire in between)
    by_llama = crossed(segment("llama").graph.code)
    readers = {site.origin: site.path for site in segment("llama").graph.code.sites}
    between = {readers[origin]: names for origin, names in by_llama.items()}
    assert {"self_attn.v_proj:out", "self_attn:value"} < {*between.pop("self_attn.o_proj")}
    assert between == {
        "self_attn.v_proj": ("input_layernorm:out",),
        "mlp.up_proj": ("post_attention_layernorm:out",),
        "mlp.down_proj": ("mlp.up_proj:out",),
    }


def test_operations_on_outputs_stop_folds_too():
    seg = segment("llama")
    rounded = qlab.insert("mine", "*.up_proj:out", lambda wire, stats: torch.round)
    graph = solved(seg, qlab.chain(rounded, qlab.smoothquant()))
    refuse_other_function(seg, graph.with_inserts({}))
    down = next(site for site in seg.graph.sites if site.path.endswith("down_proj"))
    assert torch.equal(graph.params[down.weight], seg.graph.params[down.weight])


def test_a_gauge_that_would_fold_across_is_refused_by_name():
    seg = segment("llama")
    flip = gauge("flip", "*.o_proj:in", lambda turn: torch.full((turn.size,), 2.0))
    with pytest.raises(QlabError, match=r"an operation on .*self_attn:value stands between; put"):
        solved(seg, qlab.chain(qlab.kv_cache("int8-token"), flip))
    solved(seg, qlab.chain(flip, qlab.kv_cache("int8-token")))


def test_a_plan_names_the_inputs_that_stay_as_they_are(saved):
    model = qlab.open(saved("llama"))
    data = random_tokens(saved("llama"), 2, 16)
    gptq, cache = qlab.gptq("int8-channel"), qlab.kv_cache(STORED)
    with pytest.warns(UserWarning, match="smoothquant leaves .*o_proj.* write kv_cache behind"):
        qlab.plan(model, qlab.chain(cache, qlab.smoothquant(), gptq), data)
    (row,) = [
        row
        for row in qlab.plan(model, qlab.chain(qlab.awq("int8-channel"), cache), data).schedule
        if row.step == "kv_cache"
    ]
    assert row.when == "all inputs at once"
