"""Keys, values and queries that are rounded where attention reads them, and static input scales."""

import pytest
import torch
from families import FAMILIES, MIXTURES, OTHERS, WRITTEN_OUT
from hypothesis import given
from hypothesis import strategies as st
from segments import batches_of, hidden, normal, relative, segment

import qlab
from qlab.algebra.interpret import inputs_of, interpret
from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import parse_spec
from qlab.algebra.statistic import Observation
from qlab.algebra.stats import STATS
from qlab.algebra.wires import wires
from qlab.driver.observe import observe
from qlab.errors import QlabError
from qlab.methods.inputs import RANGES, quantile, rounding

SPECS = ("fp8-tensor", "int8-tensor", "int8-head", "int8-token", "int4-g16", "int4-head-asym")


def rounded(seg, recipe):
    graph, _ = seg.solve(recipe)
    return graph


def seen(x_nk):
    """Every statistic of these rows."""
    o = Observation(x_nk, torch.arange(len(x_nk)))
    return {name: stat.lift(o) for name, stat in STATS.items()}


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES, *OTHERS, *WRITTEN_OUT])
def test_a_cache_is_rounded_in_every_family(family):
    seg = segment(family)
    graph = rounded(seg, qlab.kv_cache("int8-token"))
    owners = [w.owner for w in wires(seg.graph.code).values() if w.kind == "key"]
    assert list(graph.inserts) == [f"{o}:{kind}" for o in owners for kind in ("key", "value")]
    before, after = (hidden(interpret(g, *seg.batches[0])) for g in (seg.graph, graph))
    assert 0 < relative(after, before) < (0.2 if family in (*MIXTURES, "gpt_oss") else 0.02)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2", "qwen3_moe", "bloom"])
@pytest.mark.parametrize("spec", SPECS)
def test_what_a_scale_covers(family, spec):
    seg = segment(family)
    graph = rounded(seg, qlab.kv_cache(spec))
    (name,) = [n for n in graph.inserts if n.endswith(":key")]
    wire, (op,) = wires(seg.graph.code)[name], graph.inserts[name]
    x = inputs_of(seg.graph, [name], *seg.batches[0])[name].x.flatten(0, -2)
    y = inputs_of(graph, [name], *seg.batches[0])[name].x.flatten(0, -2)
    parts = {
        "tensor": lambda t: t.reshape(1, -1),
        "head": lambda t: t.unflatten(1, (wire.heads, -1)).transpose(0, 1).flatten(1),
        "token": lambda t: t,
        "g16": lambda t: t.reshape(-1, 16),
    }
    of_scale = parts[spec.split("-")[1]](y)
    if "head" in spec:
        assert op.scales.shape == (1, wire.heads)
    codes = 1 << int(spec[(spec.startswith("fp") and 2) or 3])
    assert all(len(row.unique()) <= codes for row in of_scale)
    assert relative(y, x) < (0.2 if "int4" in spec else 0.05)


def test_a_scale_of_each_head_is_no_worse_than_one_and_queries_are_rounded_too():
    seg = segment("llama")
    error = {}
    for spec in ("int4-tensor", "int4-head"):
        graph = rounded(seg, qlab.kv_cache(spec))
        x, y = (inputs_of(g, ["self_attn:key"], *seg.batches[0]) for g in (seg.graph, graph))
        error[spec] = relative(y["self_attn:key"].x, x["self_attn:key"].x)
    assert error["int4-head"] < error["int4-tensor"]
    graph = rounded(seg, qlab.attention_inputs("int8-token"))
    assert list(graph.inserts) == ["self_attn:query", "self_attn:key", "self_attn:value"]


def test_gradients_go_straight_through_a_rounded_cache():
    seg = segment("llama")
    (args, kwargs) = seg.batches[0]
    grads = []
    for graph in (seg.graph, rounded(seg, qlab.kv_cache("int8-token"))):
        with torch.enable_grad():
            x = args[0].clone().requires_grad_()
            hidden(interpret(graph, (x, *args[1:]), kwargs)).square().sum().backward()
        grads.append(x.grad.flatten())
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.999


def test_what_cannot_be_a_cache_is_refused():
    for spec in ("nvfp4", "int4-b2x16"):
        with pytest.raises(QlabError, match="keys and values cannot be"):
            qlab.kv_cache(spec)
    with pytest.raises(QlabError, match=r"groups of 32 do not divide the 16 channels of a head"):
        rounded(segment("llama"), qlab.kv_cache("int4-g32"))
    with pytest.raises(QlabError, match=r"give one of qlab.RANGES: absmax, quantile, least_error"):
        qlab.kv_cache("int8-head", static="median")


# ------------------------------------------------------------------ static scales
@given(seed=st.integers(0, 99), bits=st.sampled_from([4, 8]), asym=st.booleans())
def test_ranges_cover_what_they_promise(seed, bits, asym):
    x = normal(64, 24, seed=seed) * (1 + 9 * (normal(64, 24, seed=seed + 1) > 2)) + asym
    spec = parse_spec(f"int{bits}-tensor", symmetric=not asym)
    error = {}
    for name, measure in {**RANGES, "all": quantile(1.0)}.items():
        scales, zeros = measure.fit(seen(x), spec)
        assert scales.shape == (1, 1) and (zeros is None) == spec.symmetric
        op = QuantizeInput(spec, scales, zeros)
        error[name] = float((op(x) - x).square().sum())
    covering = QuantizeInput(spec, *RANGES["absmax"].fit(seen(x), spec))
    assert (covering(x) - x).abs().max() <= covering.scales.max() * (0.5001 if not asym else 1.01)
    assert error["least_error"] <= error["absmax"] * 1.0001
    assert error["all"] == pytest.approx(error["absmax"])


@pytest.mark.parametrize("outlier", [-50.0, 50.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantile_leaves_outliers_out_at_either_end(outlier, symmetric):
    x = normal(64, 24, seed=0)
    x[3, 5] = outlier
    spec = parse_spec("int8-tensor", symmetric=symmetric)
    whole, most = (float(each.fit(seen(x), spec)[0]) for each in (quantile(1.0), quantile(0.99)))
    assert most < 0.3 * whole


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("static", [*RANGES])
def test_static_inputs_have_one_stored_scale_from_the_calibration_data(family, static):
    seg = segment(family)
    graph = rounded(seg, qlab.quantize_inputs("int8-tensor", static=static))
    assert graph.online.keys() == {site.path for site in seg.graph.sites}
    for site in seg.graph.sites:
        (op,) = graph.online[site.path]
        assert op.input_spec.static and op.scales.shape == (1, 1)
    first = seg.graph.sites[0]
    peak = observe(seg.graph, {(first.source, "absmax")}, batches_of(seg))
    whole = float(peak[first.source, "absmax"].max()) / 127.5
    scale = float(graph.online[first.path][0].scales)
    assert 0.3 * whole < scale < 1.001 * whole
    assert static != "absmax" or scale == pytest.approx(whole)


def test_the_global_scale_of_nvfp4_inputs_comes_from_any_range():
    seg = segment("llama")
    today = rounded(seg, qlab.quantize_inputs("nvfp4")).online
    same = rounded(seg, qlab.quantize_inputs("nvfp4", static="absmax")).online
    less = rounded(seg, qlab.quantize_inputs("nvfp4", static=quantile(0.9))).online
    for path, (op,) in today.items():
        assert torch.allclose(op.outer, same[path][0].outer)
        assert less[path][0].outer > op.outer


@given(seed=st.integers(0, 99), outlier=st.sampled_from([0.0, 30.0, 1000.0]))
def test_the_global_scale_with_the_least_error_is_no_worse_than_that_of_the_largest(seed, outlier):
    """Also where the sample misses the only row with an outlier."""
    spec, x = parse_spec("nvfp4"), normal(600, 64, seed=seed)
    x[seed, 5] += outlier
    error = {}
    for name in ("absmax", "least_error"):
        op = rounding(spec, RANGES[name], seen(x))
        error[name] = float((op(x) - x).square().sum())
    assert error["least_error"] <= 1.02 * error["absmax"]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("text, static", [("int8-tensor-asym", "absmax"), ("nvfp4", None)])
def test_experts_share_one_static_scale_of_the_rows_of_all(family, text, static):
    """What is stored for the input of a mixture is what is stored of the same rows without experts:
    no expert's rows are left out, and none are clipped by the others' range."""
    seg = segment(family)
    made = rounded(seg, qlab.quantize_inputs(text, static=static))
    routed = [site for site in seg.graph.sites if site.route]
    assert routed
    for site in routed:
        (op,) = made.online[site.path]
        rows = [inputs_of(seg.graph, [site.source], *b)[site.source].x for b in seg.batches]
        x_nk = torch.cat([x.flatten(0, -2) for x in rows])
        if static is None:
            assert torch.equal(op.outer, op.spec.global_scale(x_nk.abs().amax()))
        else:
            scales, zeros = RANGES[static].fit(seen(x_nk), op.spec)
            assert torch.equal(op.scales, scales) and torch.equal(op.zeros, zeros)


def test_static_inputs_with_several_scales_are_refused():
    with pytest.raises(QlabError, match="inputs int8-channel have several scales"):
        qlab.quantize_inputs("int8-channel", static="absmax")
