"""Every value of a traced block has a name: the program alone gives it, for all families."""

import pytest
import torch
from blocks import OddBlock, SharedKeysAndValues, Spread
from families import FAMILIES, MIXTURES, OTHERS, UNLIKE, WRITTEN_OUT, tiny
from segments import normal, of, segment

from qlab.algebra.attention import ATTENTION, leaves_of
from qlab.algebra.graph import lone_weight
from qlab.algebra.wires import full_name, wire_named, wires
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


def test_names_in_the_model_and_of_a_weight_by_itself():
    assert full_name("model.layers.0", "mlp.up_proj:in") == "model.layers.0.mlp.up_proj:in"
    assert full_name("model.layers.0", "enter") == "model.layers.0:enter"
    assert full_name("", "enter") == "enter"
    assert list(wires(lone_weight("proj", torch.ones(4, 8)).code)) == ["proj:in"]
