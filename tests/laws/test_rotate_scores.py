"""R3: queries and keys turn together, so that attention stays and rounded keys lose less."""

import pytest
import torch
from families import FAMILIES, MIXTURES, OTHERS, UNLIKE, WRITTEN_OUT
from model_folders import refused
from segments import batches_of, hidden, normal, relative, segment

import qlab
from qlab.algebra.gauge import Element
from qlab.algebra.insert import insert
from qlab.algebra.interpret import interpret
from qlab.algebra.online import QuantizeInput
from qlab.algebra.running import apply
from qlab.algebra.spec import parse_spec
from qlab.algebra.wires import wires
from qlab.driver.lossless import refuse_changed


def run(seg, transform, graph=None):
    """All stages, each with its claim checked on a batch."""
    graph, stats = graph or seg.graph, {}
    for stage in transform:
        before = graph
        graph, stats = apply(stage, graph, stats)
        refuse_changed(stage, before, graph, None, batches_of(seg))
    return graph


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES, *OTHERS, *WRITTEN_OUT, *UNLIKE])
def test_attention_stays(family):
    seg = segment(family)
    graph = run(seg, qlab.rotate_scores())
    turned = {w.name for w in wires(graph.code).values() if w.kind in ("query", "key")}
    assert graph.inserts.keys() == turned
    for batch in seg.batches[:2]:
        out, before = (hidden(interpret(g, *batch)) for g in (graph, seg.graph))
        assert relative(out, before) < 1e-4
        assert not turned or not torch.equal(out, before)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_four_bit_keys_lose_less(family):
    """Of keys with a large channel in every head."""
    seg = segment(family)
    large = lambda wire, stats: lambda x: _stretched(x, 8.0 if wire.kind == "key" else 1 / 8.0)
    graph = run(seg, insert("outliers", "re:.*:(query|key)", large))
    int4 = parse_spec("int4-g16")
    cache = insert("cache", "*:key", lambda wire, stats: QuantizeInput(int4))
    losses = []
    for recipe in (cache, qlab.chain(qlab.rotate_scores(), cache)):
        rounded = run(seg, recipe, graph)
        out, before = (hidden(interpret(g, *seg.batches[0])) for g in (rounded, seg.graph))
        by_token = (out - before).norm(dim=-1) / before.norm(dim=-1)
        losses.append(float(by_token.median()))
    assert 0 < losses[1] < 0.8 * losses[0]


def _stretched(x, factor):
    scale = torch.ones(16)
    scale[3] = factor
    return (x.unflatten(-1, (-1, 16)) * scale).flatten(-2)


def test_keys_without_their_queries_are_refused():
    seg, keys = segment("llama"), qlab.at("*:key", qlab.rotate_scores())
    refused(lambda: run(seg, keys), "self_attn:query", "self_attn:key", "turn together")


def test_a_draw_that_is_no_rotation_changes_attention_and_is_refused():
    stretch = lambda n, g: 2 * torch.eye(n)
    refused(lambda: run(segment("llama"), qlab.rotate_scores(draw=stretch)), "changes what")


def test_the_seed_decides():
    seg = segment("llama")
    matrix = lambda seed: run(seg, qlab.rotate_scores(seed)).inserts["self_attn:key"][0].M_nn
    assert torch.equal(matrix(0), matrix(0)) and not torch.equal(matrix(0), matrix(1))


SCORES = "re:.*:(query|key)"
GAUGES = {
    "a matrix": lambda turn: normal(turn.group.size, turn.group.size, seed=1),
    "a matrix of each head": lambda turn: normal(
        turn.group.key.heads, turn.group.size, turn.group.size, seed=2
    ),
    "scales": lambda turn: normal(turn.size, seed=3).exp() * normal(turn.size, seed=4).sign(),
}


@pytest.mark.parametrize("choose", GAUGES.values(), ids=list(GAUGES))
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe", "deepseek_v3"])
def test_whatever_turns_keys_is_undone_by_queries(family, choose):
    seg = segment(family)
    graph = run(seg, qlab.gauge("mine", SCORES, choose, online=True))
    out, before = (hidden(interpret(g, *seg.batches[0])) for g in (graph, seg.graph))
    assert graph.inserts and relative(out, before) < 1e-4 and not torch.equal(out, before)


def test_keys_are_turned_by_what_was_seen_of_them():
    seg, seen = segment("llama"), []

    def flat(turn):
        keys, queries = turn.sources()
        seen.append((len(keys.stats["absmax"]), len(queries.stats["absmax"])))
        return 1 / keys.stats["absmax"].clamp_min(1e-3)

    flatten = qlab.gauge("flatten", SCORES, flat, {"absmax"}, online=True)
    look = insert(
        "look", "*:key", lambda wire, stats: seen.append(stats["absmax"]) or abs, {"absmax"}
    )
    seg.solve(qlab.chain(flatten, look))
    assert seen[0] == (32, 64) and torch.allclose(seen[1], torch.ones(32), atol=1e-4)


def test_what_is_no_turn_of_keys_is_refused_by_name(saved):
    seg = segment("llama")
    mine = lambda choose: qlab.gauge("mine", SCORES, choose, online=True)
    refused(
        lambda: run(seg, mine(lambda turn: torch.ones(3))),
        "'mine' chose scales (3,) for model.layers.0.self_attn:key",
        "queries undo matrices [16, 16] or [2, 16, 16] alone, or scales [32]; choose",
    )
    refused(lambda: run(seg, mine(lambda turn: torch.zeros(16, 16))), "has no inverse")
    wrong = lambda turn: Element(M=2 * torch.eye(16), M_inv=torch.eye(16))
    refused(lambda: run(seg, mine(wrong)), "'mine' changes what", "claims to keep it")
    refused(lambda: qlab.gauge("mine", SCORES, GAUGES["scales"]), "online=True")
    refused(lambda: qlab.gauge("mine", "*:key", GAUGES["scales"]), "'re:.*:(query|key)'")
    split = qlab.chain(qlab.at("*:key", mine(GAUGES["scales"])), qlab.rtn("int4-g16"))
    refused(lambda: qlab.plan(saved("llama"), split), "the rule for mine splits them", "layers.0")
