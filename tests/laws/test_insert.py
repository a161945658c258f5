"""What happens to a value at run time: an insert on its wire, observed, run and refused."""

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, MIXTURES, OTHERS
from segments import batches_of, hidden, relative, segment, tensors

import qlab
import qlab.algebra.transform
from qlab.algebra.insert import insert
from qlab.algebra.interpret import Walk, inputs_of, interpret
from qlab.algebra.online import MatMul
from qlab.algebra.spec import parse_spec
from qlab.algebra.statistic import Stat
from qlab.algebra.stats import STATS
from qlab.algebra.transform import Stage
from qlab.algebra.views import OnWires
from qlab.algebra.wires import wires
from qlab.driver.observe import observe
from qlab.driver.solve import in_order, solve_in_order
from qlab.errors import QlabError
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn

SOME = ("llama", "gemma2", "gemma3_text", "phi3", "gpt2", "falcon", "qwen3_moe", "deepseek_v3")
INT8 = parse_spec("int8-channel")


def attended(seg):
    """What the block's own attention is given: query, key and value."""
    seen = []
    plain = F.scaled_dot_product_attention

    def watched(query, key, value, *args, **kwargs):
        seen.extend((query, key, value))
        return plain(query, key, value, *args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", watched):
        args, kwargs = seg.batches[0]
        seg.block(*args, **kwargs)
    return seen


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES, *OTHERS])
def test_wires_of_an_attention_bring_what_it_is_given(family):
    seg = segment(family)
    given = attended(seg)
    if not given:
        assert family == "gemma2"
        return
    found = [w for w in wires(seg.graph.code).values() if w.of_attention]
    rows = inputs_of(seg.graph, [w.name for w in found], *seg.batches[0])
    for wire, value in zip(found, given):
        x = wire.value(rows[wire.name].x, value[:, : wire.heads])
        assert torch.equal(x.repeat_interleave(value.shape[1] // wire.heads, 1), value)


@pytest.mark.parametrize("family", SOME)
def test_what_stands_on_a_value_is_observed_and_reaches_the_output(family):
    seg = segment(family)
    names = list(wires(seg.graph.code))
    rows = inputs_of(seg.graph, names, *seg.batches[0])
    before = hidden(interpret(seg.graph, *seg.batches[0]))
    # beside the tokens that it routes, a rank among experts is not seen
    silent = {"mlp.gate:topk"} if family == "deepseek_v3" else set()
    for name in names:
        if rows[name].x.numel() == 0:  # the channels that no rotary embedding leaves over
            continue
        graph = seg.graph.inserting(name, moved)
        assert graph.inserts.keys() == {name} and not seg.graph.inserts
        after = hidden(interpret(graph, *seg.batches[0]))
        assert torch.equal(after, before) == (name in silent), name
    for name in names[::4]:
        graph = seg.graph.inserting(name, moved)
        observed = inputs_of(graph, [name], *seg.batches[0])[name].x
        assert torch.equal(observed, moved(rows[name].x))
        assert torch.equal(Walk(graph.code).to(graph, name, *seg.batches[0]).x, observed)


def moved(x):
    """Twice x and more, of which no norm takes the change back."""
    return 2 * x.clamp(-2, 2) + torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_queries_and_keys_that_are_rotated_alike_attend_alike(family):
    seg = segment(family)
    Q = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    turned = seg.graph.inserting("self_attn:query", MatMul(Q))
    before = hidden(interpret(seg.graph, *seg.batches[0]))
    assert relative(hidden(interpret(turned, *seg.batches[0])), before) > 1e-2
    both = turned.inserting("self_attn:key", MatMul(Q))
    assert relative(hidden(interpret(both, *seg.batches[0])), before) < 1e-5


def test_inserts_on_sites_are_the_online_operations():
    graph = segment("llama").graph
    op, other, third = torch.neg, torch.abs, torch.relu
    graph = graph.inserting("mlp.up_proj:in", op, other).inserting("self_attn.o_proj:out", op)
    graph = graph.inserting("self_attn:key", third)
    assert graph.online == {"mlp.up_proj": (op, other)}
    assert graph.online_outputs == {"self_attn.o_proj": (op,)}
    assert graph.online_values == {"self_attn:key": (third,)}
    assert graph.with_inserts(graph.inserts).inserts == graph.inserts
    assert replace(graph, online={}).inserts.keys() == {"self_attn.o_proj:out", "self_attn:key"}


# ------------------------------------------------------------------ observed
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_statistic_is_observed_at_any_wire(family):
    seg = segment(family)
    names = ["self_attn:key", "enter", "leave", "self_attn.o_proj:out"]
    stats = observe(seg.graph, {(n, "absmax") for n in names}, batches_of(seg))
    for name in names:
        rows = [inputs_of(seg.graph, [name], *batch)[name].x for batch in seg.batches]
        peaks = torch.cat([x.flatten(0, -2) for x in rows]).abs().amax(0)
        assert torch.equal(stats[name, "absmax"], peaks)


def test_a_statistic_of_ones_own_is_an_argument():
    seg = segment("llama")
    peak = Stat(lambda o: o.x_nk.abs().amax(), torch.maximum, name="peak")
    seen = []

    def make(wire, stats):
        seen.append((wire.where, stats.keys(), float(stats["peak"])))
        return lambda x: x

    graph, stats = seg.solve(insert("look", "*:key", make, needs=("absmax", peak)))
    absmax = stats["self_attn:key", "absmax"]
    assert seen == [("model.layers.0.self_attn:key", {"absmax", "peak"}, float(absmax.max()))]
    assert graph.inserts.keys() == {"self_attn:key"} and "peak" not in STATS


def test_a_statistic_of_ones_own_reaches_weights_and_experts():
    count = Stat(lambda o: len(o.keys), lambda a, b: a + b, name="count")
    seg, seen = segment("qwen3_moe"), []

    def fn(W_ok, stats, spec):
        seen.append(stats["count"])
        return W_ok, {}

    seg.solve(qlab.at("*.experts.down_proj", qlab.each_weight("look", fn, None, {count})))
    assert sum(filter(None, seen)) == 3 * 24 * 2 and len(seen) == 4


@pytest.mark.parametrize("needs", [(Stat(len, max),), (Stat(len, max, name="absmax"),)])
def test_statistics_without_names_of_their_own_are_refused(needs):
    with pytest.raises(QlabError, match=r"has no name|have the name 'absmax'"):
        insert("look", "*:key", lambda wire, stats: torch.neg, needs)


# ------------------------------------------------------------------ in running order
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_weights_behind_a_wire_are_solved_on_what_its_insert_makes(family):
    seg, spec = segment(family), parse_spec("int3-g16")
    recipe = qlab.chain(gptq(spec), insert("cap", "*:value", lambda w, s: torch.tanh))
    assert in_order(seg.graph.code, recipe, "quantized")
    graph, leaving = solve_in_order(seg.graph, recipe, batches_of(seg))
    assert graph.inserts.keys() == {"self_attn:value"}
    for (out,), batch in zip(map(partial(map, torch.Tensor.clone), leaving[0]), seg.batches):
        assert torch.equal(out, hidden(interpret(graph, *batch)))
    plain, _ = solve_in_order(seg.graph, gptq(spec), batches_of(seg))
    for path in ("self_attn.q_proj", "self_attn.v_proj"):
        assert torch.equal(*(g.params[f"{path}.weight"].codes for g in (graph, plain)))
    assert not torch.equal(*(g.params["self_attn.o_proj.weight"].codes for g in (graph, plain)))


def test_weights_are_solved_on_what_stands_on_all_that_they_read():
    seg, recipe, wire = segment("llama"), gptq(parse_spec("int3-g16")), "input_layernorm:out"
    capped = qlab.chain(recipe, insert("cap", f"*.{wire}", lambda wire, stats: torch.tanh))
    ours, _ = solve_in_order(seg.graph, capped, batches_of(seg))
    theirs, _ = solve_in_order(seg.graph.inserting(wire, torch.tanh), recipe, batches_of(seg))
    assert ours.inserts == theirs.inserts == {wire: (torch.tanh,)}
    for path in (f"self_attn.{name}_proj.weight" for name in "qkvo"):
        assert torch.equal(*(graph.params[path].codes for graph in (ours, theirs)))


def test_a_wire_is_observed_behind_the_quantized_weights_before_it():
    seg, seen = segment("llama"), []

    def make(wire, stats):
        seen.append(stats["absmax"])
        return lambda x: x

    recipe = qlab.chain(rtn(parse_spec("int3-g16")), insert("look", "*:key", make, {"absmax"}))
    graph, leaving = solve_in_order(seg.graph, recipe, batches_of(seg))
    rows = [inputs_of(graph, ["self_attn:key"], *batch)["self_attn:key"].x for batch in seg.batches]
    (peak,) = seen
    assert torch.equal(peak, torch.cat(rows).flatten(0, -2).abs().amax(0))
    assert len(tensors(list(map(list, leaving)))) == 3


# ------------------------------------------------------------------ refused
def test_an_insert_on_a_wire_that_is_not_there_is_refused_with_the_nearest():
    seg = segment("llama")
    stray = replace(seg.graph, online_values={"self_attn:keys": (torch.neg,)})
    with pytest.raises(QlabError, match=r"'self_attn:keys' is no wire.*self_attn:key"):
        interpret(stray, *seg.batches[0])
    stage = Stage("stray", frozenset(), lambda g, s: (stray, s))
    with pytest.raises(QlabError, match=r"'stray' puts an operation on 'self_attn:keys'"):
        seg.solve((stage,))
    with pytest.raises(QlabError, match=r"the stage 'look' made a NoneType for .*self_attn:key"):
        seg.solve(insert("look", "*:key", lambda wire, stats: None))


def test_a_statistic_nobody_defined_is_refused_with_those_that_exist():
    seg = segment("llama")
    with pytest.raises(QlabError, match=r"a statistic 'kurtosis'; there are absmax, absmean"):
        observe(seg.graph, {("self_attn:key", "kurtosis")}, batches_of(seg))


def test_scopes_restrict_inserts_to_the_modules_that_they_name():
    seg = segment("llama")
    halve = insert("halve", "*:in", lambda wire, stats: torch.neg)
    graph, _ = seg.solve(qlab.at("*.mlp.*", halve))
    assert graph.inserts.keys() == {f"mlp.{n}_proj:in" for n in ("gate", "up", "down")}
    values = insert("halve", "re:.*:(key|value)", lambda wire, stats: torch.neg)
    graph, _ = seg.solve(qlab.at("*.self_attn", values))
    assert graph.inserts.keys() == {"self_attn:key", "self_attn:value"}
    graph, _ = seg.solve(qlab.at("*.layers.7.*", values))
    assert not graph.inserts
    routers, _ = segment("qwen3_moe").solve(halve)
    assert "mlp.gate:in" not in routers.inserts and "mlp.experts.down_proj:in" in routers.inserts


def test_a_step_on_wires_changes_no_weight():
    seg = segment("llama")
    name = "self_attn.q_proj.weight"
    double = lambda graph, stats: (graph.update({name: 2 * graph.params[name]}), stats)
    stage = Stage("double", frozenset(), double, OnWires("*.q_proj:in"))
    with pytest.raises(QlabError, match=r"'double' .*changes model\.layers\.0\.self_attn\.q_proj"):
        seg.solve((stage,))
