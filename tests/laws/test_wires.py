"""Every value of a traced block has a name: the program alone gives it, for all families."""

import pytest
import torch
from blocks import OddBlock, SharedKeysAndValues, Spread
from families import FAMILIES, MIXTURES, OTHERS, RECURRENT, UNLIKE, WRITTEN_OUT, tiny
from segments import hidden, normal, of, relative, segment
from torch import nn

from qlab.algebra.attention import ATTENTION, leaves_of
from qlab.algebra.graph import behind_casts, lone_weight
from qlab.algebra.interpret import Walk, inputs_of, interpret, values_at
from qlab.algebra.values import is_value
from qlab.algebra.wires import full_name, nearest, stops, wire_named, wires
from qlab.errors import QlabError

ALL = (*FAMILIES, *MIXTURES, *OTHERS, *WRITTEN_OUT, *UNLIKE)
families = pytest.mark.parametrize("family", ALL)


@families
def test_every_site_has_an_input_and_an_output(family):
    graph = segment(family).graph
    found = wires(graph.code)
    nodes = {node.name: node for node in graph.code.graph.nodes}
    for site in graph.sites:
        entering, leaving = found[f"{site.path}:in"], found[f"{site.path}:out"]
        assert entering.key == entering.node == site.source
        ((reader, place),) = entering.edges
        assert leaving.node == reader
        assert (
            leaves_of(nodes[reader])[place].meta["val"].shape[-1:]
            == (nodes[site.source].meta["val"].shape[-1:])
        )
        assert {user.name for user in nodes[leaving.node].users} == {n for n, _ in leaving.edges}


def values_of(code):
    """The nodes of a program whose numbers come to what it gives, without weights."""
    known = {**code.params, **code.constants}
    reached, waiting = set(), [n for n in code.graph.nodes if n.op == "output" or writes(n)]
    while waiting:
        node = waiting.pop()
        reached.add(node)
        sizes = (torch.SymInt, torch.SymBool)
        waiting += [
            ahead
            for ahead in {*node.all_input_nodes} - reached
            if not isinstance(ahead.meta.get("val"), sizes)
        ]
    return [n for n in reached if is_value(n) and behind_casts(n).name not in known]


def writes(node):
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


@pytest.mark.parametrize("family", [*ALL, *RECURRENT])
def test_every_value_has_a_name_which_finds_it_and_nothing_else(family):
    seg = segment(family)
    graph, batch, found = seg.graph, seg.batches[0], wires(seg.graph.code)
    names = [name for wire in found.values() for name in (wire.name, *wire.also)]
    assert len({*names}) == len(names)
    places = {node.name: i for i, node in enumerate(graph.code.graph.nodes)}
    readers = [min((n for n, _ in wire.edges), key=places.__getitem__) for wire in found.values()]
    there = values_at(graph, [(wire.node, by) for wire, by in zip(found.values(), readers)], *batch)
    seen, walk = inputs_of(graph, list(found), *batch), Walk(graph.code)
    for wire, value in zip(found.values(), there):
        assert torch.equal(wire.value(seen[wire.name].x, value), value), wire.name
    for stop in stops(graph.code, names):
        assert torch.equal(walk.to(graph, stop.source, *batch).x, seen[min(stop.wires)].x), stop
    named = {wire.node for wire in found.values()}
    # a part of a tensor that is made to be written to is read as the whole
    unnamed = [n for n in values_of(graph.code) if n.name not in named and not writes(n)]
    assert all(any(map(writes, n.users)) for n in unnamed), unnamed


@pytest.mark.parametrize("family", [*ALL, *RECURRENT])
def test_an_identity_on_every_value_changes_nothing(family):
    seg = segment(family)
    before = hidden(interpret(seg.graph, *seg.batches[0]))
    for identity, off in (lambda x: x, 0.0), (torch.clone, 1e-6):  # a copy may lie otherwise
        graph = seg.graph
        for name in wires(graph.code):
            graph = graph.inserting(name, identity)
        after = hidden(interpret(graph, *seg.batches[0]))
        assert relative(after, before) <= off


def test_a_tensor_that_is_filled_in_parts_is_a_value_once_it_is_full():
    class Filled(nn.Module):
        def forward(self, x):
            y = torch.empty_like(x)
            y[..., :3] = 2 * x[..., :3]
            y[..., 3:] = x[..., 3:]
            return y.tanh() + x

    seg = of(Filled(), normal(2, 5, 6, seed=0))
    (name,) = [n for n, w in wires(seg.graph.code).items() if n == ":empty_like"]
    x = seg.batches[0][0][0]
    full = torch.cat([2 * x[..., :3], x[..., 3:]], -1)
    assert torch.equal(inputs_of(seg.graph, [name], *seg.batches[0])[name].x, full)
    doubled = seg.graph.inserting(name, lambda y: 2 * y)
    assert torch.equal(interpret(doubled, *seg.batches[0]), (2 * full).tanh() + x)


def test_modules_name_what_they_return():
    found = wires(segment("llama").graph.code)
    assert found["mlp.act_fn:out"].also == ("mlp.act_fn:silu",)
    for name, wire in {
        "input_layernorm:out": "input_layernorm:out",
        "self_attn:out": "self_attn.o_proj:out",
        "mlp:out": "mlp.down_proj:out",
        "mlp:mul": "mlp.down_proj:in",
        "self_attn:scaled_dot_product_attention": "self_attn:scaled_dot_product_attention",
        ":add": ":add",
    }.items():
        assert [w.name for w in found.values() if w.is_called(name)] == [wire]
    reads_it = {name.removesuffix(":in") for name, w in found.items() if w.kind == "in"}
    assert {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"} <= reads_it
    assert len(found["input_layernorm:out"].edges) == 3  # of those three


@families
def test_hidden_states_enter_and_leave(family):
    seg = segment(family)
    found, values = wires(seg.graph.code), seg.graph.code.graph
    entering, leaving = found["enter"], found["leave"]
    given = [n.name for n in values.nodes if n.op == "placeholder"]
    assert entering.node in given
    assert leaving.edges == (("output", 0),)
    nodes = {node.name: node.meta["val"] for node in values.nodes if node.op != "output"}
    assert nodes[entering.node].shape[-1] == nodes[leaving.node].shape[-1] == 64


@families
def test_an_attention_has_queries_keys_and_values_before_they_are_repeated(family):
    block, graph = segment(family).block, segment(family).graph
    found = wires(graph.code)
    nodes = {node.name: node for node in graph.code.graph.nodes}
    attentions = [node for node in nodes.values() if node.target is ATTENTION]
    written_out = family == "gemma2" or family in WRITTEN_OUT
    kinds = [wire.kind for wire in found.values() if wire.of_attention]
    if not attentions and not written_out:
        assert not kinds
        return
    assert kinds == ["query", "key", "value"]
    (owner,) = {wire.owner for wire in found.values() if wire.of_attention}
    attention = block.get_submodule(owner)
    config = getattr(attention, "config", None) or tiny(family).config
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False):
        shared = 1
    shapes = {kind: nodes[found[f"{owner}:{kind}"].node].meta["val"].shape for kind in kinds}
    assert [shapes[kind][-3] for kind in kinds] == [heads, shared, shared]
    assert [found[f"{owner}:{kind}"].heads for kind in kinds] == [heads, shared, shared]


def test_attention_that_a_block_writes_itself_is_named():
    torch.manual_seed(0)
    odd = of(OddBlock(), normal(2, 5, 24, seed=0)).graph
    found = wires(odd.code)
    assert [name for name in found if found[name].of_attention] == [":query", ":key", ":value"]
    assert full_name("block", ":key") == "block:key"
    repeated = wires(of(Spread("repeat"), normal(2, 5, 12, seed=0)).graph.code)
    assert repeated[":value"].layout == "h n d"
    shared = wires(of(SharedKeysAndValues(), normal(2, 5, 12, seed=0)).graph.code)
    assert shared[":key"].node == shared[":value"].node
    assert shared[":key"].edges != shared[":value"].edges


def test_rows_of_a_value_are_tokens_and_come_back():
    found = wires(segment("llama").graph.code)
    x = normal(2, 4, 6, 16, seed=0)
    key = found["self_attn:key"]
    rows = key.rows(x)
    assert rows.shape == (2, 6, 64) and torch.equal(rows[1, 3, 16:32], x[1, 1, 3])
    assert torch.equal(key.value(rows, x), x)
    hidden = normal(2, 6, 64, seed=1)
    assert found["enter"].rows(hidden) is hidden and found["enter"].value(hidden, hidden) is hidden


def test_a_wire_that_is_not_there_is_refused_with_the_nearest():
    code = segment("llama").graph.code
    with pytest.raises(QlabError, match=r"'self_attn:keys' is no wire of layer; .*self_attn:key"):
        wire_named(code, "self_attn:keys", "layer")
    assert wire_named(code, "self_attn:key").kind == "key"
    with pytest.raises(QlabError, match=r"the nearest are mlp\.act_fn:out"):
        wire_named(code, "mlp.act_fn:result", "layer")
    near = nearest(
        "*.act_fn:result", [f"model.layers.{i}.{name}" for i in "01" for name in wires(code)]
    )
    assert near.startswith("the nearest are model.layers.0.mlp.act_fn:out")
    assert "layers.1" not in near


def test_names_in_the_model_and_of_a_weight_by_itself():
    assert full_name("model.layers.0", "mlp.up_proj:in") == "model.layers.0.mlp.up_proj:in"
    assert full_name("model.layers.0", "enter") == "model.layers.0:enter"
    assert full_name("", "enter") == "enter"
    assert list(wires(lone_weight("proj", torch.ones(4, 8)).code)) == ["proj:in"]
