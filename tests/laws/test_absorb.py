"""Where scales fold is found without names, and folding preserves the function or is refused."""

import re
from dataclasses import replace

import pytest
import torch
from blocks import (
    WAYS,
    BilinearGate,
    Blockwise,
    Counted,
    Factor,
    Halves,
    Interleaved,
    OddBlock,
    SharedBias,
    SharedKeysAndValues,
    SharedNorm,
    Spread,
    Straight,
)
from families import FAMILIES, MIXTURES
from hypothesis import given
from hypothesis import strategies as st
from segments import assert_same, hidden, normal, of, relative, segment

from qlab.algebra.absorb import fold_scales, folds
from qlab.algebra.graph import by_origin
from qlab.algebra.interpret import interpret
from qlab.algebra.online import Multiply, Rotate
from qlab.algebra.reparametrize import reparametrize
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at
from qlab.errors import QlabError
from qlab.methods.rtn import rtn

every_family = pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])

ATTENTION = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
}
LLAMA = ATTENTION | {
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
EXPERTS = {
    "mlp.gate": "post_attention_layernorm",
    "mlp.experts.gate_up_proj": "post_attention_layernorm",
    "mlp.experts.down_proj": "mlp.experts.gate_up_proj",
}
GEMMA = LLAMA | {
    "mlp.gate_proj": "pre_feedforward_layernorm",
    "mlp.up_proj": "pre_feedforward_layernorm",
}
FOLDS = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3"], LLAMA),
    **dict.fromkeys(["gemma2", "gemma3_text"], GEMMA),
    "olmo2": {
        "self_attn.o_proj": "self_attn.v_proj",
        "mlp.down_proj": "mlp.up_proj",
    },  # inputs are post-norm sums
    "phi3": {
        "self_attn.qkv_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.qkv_proj",
        "mlp.gate_up_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.gate_up_proj",
    },
    "opt": {
        "self_attn.q_proj": "self_attn_layer_norm",
        "self_attn.k_proj": "self_attn_layer_norm",
        "self_attn.v_proj": "self_attn_layer_norm",
        "self_attn.out_proj": "self_attn.v_proj",
        "fc1": "final_layer_norm",
        "fc2": "fc1",
    },  # through relu
    "gpt_neox": {
        "attention.query_key_value": "input_layernorm",
        "attention.dense": "attention.query_key_value",
        "mlp.dense_h_to_4h": "post_attention_layernorm",
    },  # not behind gelu
    "gpt2": {"attn.c_attn": "ln_1", "attn.c_proj": "attn.c_attn", "mlp.c_fc": "ln_2"},
    "mixtral": ATTENTION | EXPERTS,
    "qwen3_moe": ATTENTION | EXPERTS,
    "deepseek_v3": {
        "self_attn.q_a_proj": "input_layernorm",
        "self_attn.kv_a_proj_with_mqa": "input_layernorm",
        "self_attn.q_b_proj": "self_attn.q_a_layernorm",
        "self_attn.kv_b_proj": "self_attn.kv_a_layernorm",
        "self_attn.o_proj": "self_attn.kv_b_proj",
        **EXPERTS,
        "mlp.shared_experts.gate_proj": "post_attention_layernorm",
        "mlp.shared_experts.up_proj": "post_attention_layernorm",
        "mlp.shared_experts.down_proj": "mlp.shared_experts.up_proj",
    },
}


def table(graph):
    weights = {origin: place.producer.weight for origin, place in folds(graph.code).items()}
    return {
        s.path: re.sub(r"\.(weight|gain)$", "", weights[s.origin])
        for s in graph.sites
        if s.origin in weights
    }


def scaled(graph, seed, tied=True):
    """The graph with a random positive scale on every source, tied where one producer channel feeds
    several."""
    places = folds(graph.code)
    for i, (origin, sites) in enumerate(by_origin(graph.sites).items()):
        m_k = normal(graph.weight_ok(sites[0]).shape[-1], seed=seed + i).mul(0.7).exp()
        m_k = places[origin].tie(m_k) if tied and origin in places else m_k
        if all(s.route and not s.gathered_from for s in sites):  # every expert its own
            m_k = m_k * normal(len(graph.params[sites[0].weight]), 1, 1, seed=seed).exp()
        graph, _ = reparametrize(graph, {}, origin, m_k, 1 / m_k)
    return graph


def out(graph, seg, i=0):
    return hidden(interpret(graph, *seg.batches[i]))


@every_family
def test_the_sources_that_fold(family):
    assert table(segment(family).graph) == FOLDS[family]


@every_family
def test_folding_preserves_the_function_and_leaves_what_has_no_place(family):
    seg = segment(family)
    for seed in range(3):
        online = scaled(seg.graph, 10 * seed)
        folded = fold_scales(online)
        assert set(folded.online) == {s.path for s in seg.graph.sites} - set(FOLDS[family])
        for i in range(2):
            assert relative(out(online, seg, i), out(seg.graph, seg, i)) < 1e-5
            assert relative(out(folded, seg, i), out(seg.graph, seg, i)) < 1e-5
        moved = [
            s.path
            for s in seg.graph.sites
            if not torch.equal(folded.params[s.weight], seg.graph.params[s.weight])
        ]
        assert moved  # it did something


@every_family
@pytest.mark.parametrize("rotates", [False, True])
def test_reparametrizing_online_preserves_the_function(family, rotates):
    seg = segment(family)
    graph = seg.graph
    for i, (source, sites) in enumerate(by_origin(graph.sites).items()):
        k = graph.weight_ok(sites[0]).shape[-1]
        M = (
            torch.linalg.qr(normal(k, k, seed=i))[0]
            if rotates
            else normal(k, seed=i).sign() * normal(k, seed=i).exp()
        )
        before = {s.path: graph.params[s.weight] for s in sites}
        graph, _ = reparametrize(graph, {}, source, M, M.T if rotates else 1 / M)
        assert all(not torch.equal(before[s.path], graph.params[s.weight]) for s in sites)
    assert {type(op) for ops in graph.online.values() for op in ops} == {
        Rotate if rotates else Multiply
    }
    assert relative(out(graph, seg), out(seg.graph, seg)) < 1e-5
    without = replace(graph, online={})
    assert relative(out(without, seg), out(seg.graph, seg)) > 1e-2


def test_grouped_queries_tie_the_channels_that_one_value_channel_feeds():
    seg = segment("llama")  # 4 query heads on 2 key-value heads of 16 channels
    source = next(s.source for s in seg.graph.sites if s.path == "self_attn.o_proj")
    fold = folds(seg.graph.code)[source]
    heads = torch.arange(32).view(2, 1, 16).expand(2, 2, 16).flatten()
    assert torch.equal(fold.index_k, heads)
    m_k = normal(64, seed=0).exp()
    tied = fold.tie(m_k)
    assert torch.allclose(
        tied.view(2, 2, 16), m_k.view(2, 2, 16).mean(1, keepdim=True).expand(2, 2, 16)
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_block_never_seen_before_folds_all_but_what_leaks(seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 6, 24)
    seg = of(OddBlock(), x)
    assert table(seg.graph) == {
        "zeta": "alpha",
        "whisper": "alpha",
        "kiwi": "alpha",
        "omega": "zeta",
        "left": "beta",
        "right": "beta",
        "close": "left",
    }
    graph = scaled(seg.graph, seed)
    folded = fold_scales(graph)
    assert not folded.online
    assert relative(out(folded, seg), seg.block(x)) < 1e-5
    assert folds(seg.graph.code)[seg.graph.sites[0].source].producer.offset == 2.5


@pytest.mark.parametrize("way, einsum", [*((way, False) for way in WAYS), ("repeat", True)])
def test_values_fold_however_a_block_spreads_them_over_grouped_queries(way, einsum):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    seg = of(Spread(way, einsum), x)
    assert table(seg.graph) == {"sum": "tell"}
    folded = fold_scales(scaled(seg.graph, 1))
    assert set(folded.online) == {"ask", "key", "tell"}
    assert relative(out(folded, seg), seg.block(x)) < 1e-5


def test_inputs_keep_their_channels_where_a_block_spreads_them():
    torch.manual_seed(0)
    x, angles = torch.randn(2, 5, 12), torch.rand(1, 5, 12)
    seg = of(Interleaved(), x, angles)
    assert table(seg.graph) == {"one": "norm", "two": "one"}
    assert relative(out(fold_scales(scaled(seg.graph, 1)), seg), seg.block(x, angles)) < 1e-5


LEAKS = {
    "norm output on the residual stream too": (Straight("residual"), {"two": "one"}),
    "norm output into an unknown operation too": (Straight("tanh"), {"two": "one"}),
    "norm output returned too": (Straight("return"), {"two": "one"}),
    "hidden layer read by two": (Straight("both"), {"one": "norm"}),
    "nothing leaks": (Straight(""), {"one": "norm", "two": "one"}),
    "halves of a hidden layer, each read by one": (Halves(), {"two": "one", "three": "one"}),
    "through gelu": (Straight("gelu"), {"one": "norm"}),
    "one norm for two places": (SharedNorm(), {}),
    "one bias for two linears": (SharedBias(), {}),
    "keys that are the values": (SharedKeysAndValues(), {}),
    "a product of two halves of one projection": (BilinearGate(), {"one": "norm"}),
    "a norm whose gain is 1 and a weight": (Straight("offset"), {"one": "norm", "two": "one"}),
    "a norm output whose dtype is asked for": (Straight("dtype"), {"one": "norm", "two": "one"}),
    "a parameter of one number": (Factor(1), {}),
    "a parameter behind a multiplied constant": (Factor(12, alpha=3), {"two": "factor"}),
}


@pytest.mark.parametrize("block, expected", LEAKS.values(), ids=LEAKS)
def test_a_scale_that_would_leak_does_not_fold(block, expected):
    torch.manual_seed(0)
    seg = of(block, torch.randn(2, 5, 12))
    assert table(seg.graph) == expected
    graph = scaled(seg.graph, 3)
    assert relative(out(fold_scales(graph), seg), out(seg.graph, seg)) < 1e-5
    assert set(fold_scales(graph).online) == {s.path for s in seg.graph.sites} - set(expected)


def test_a_program_that_holds_for_some_lengths_only_is_labelled_at_the_one_it_was_traced_with():
    """Unrolled over blocks of tokens, as lightning attention is: at a smaller length its second
    block is empty."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 12)
    seg = of(Blockwise(), x)
    assert table(seg.graph) == {"one": "norm", "two": "one"}
    assert relative(out(fold_scales(scaled(seg.graph, 1)), seg), seg.block(x)) < 1e-5


def test_of_a_program_whose_sizes_are_numbers_that_it_computes_no_scale_folds():
    torch.manual_seed(0)
    seg = of(Counted(), torch.randn(2, 5, 12))
    assert table(seg.graph) == {}
    assert relative(out(fold_scales(scaled(seg.graph, 1)), seg), out(seg.graph, seg)) < 1e-5


def test_negative_scales_and_rotations_stay_online():
    seg = of(Straight(""), torch.randn(2, 5, 12))
    sign = torch.tensor([1.0, -1.0] * 6)
    for M, inverse in ((sign, sign), (torch.eye(12).flip(0), torch.eye(12).flip(0))):
        graph, _ = reparametrize(seg.graph, {}, seg.graph.sites[1].source, M, inverse)
        folded = fold_scales(graph)
        assert set(folded.online) == {"two"}
        assert relative(out(folded, seg), out(seg.graph, seg)) < 1e-5


def test_only_the_leading_scale_folds_and_the_rest_stays_in_order():
    seg = of(Straight(""), torch.randn(2, 5, 12))
    source = seg.graph.sites[1].source
    m_k = normal(12, seed=0).exp()
    R = torch.linalg.qr(normal(12, 12, seed=1))[0]
    graph, _ = reparametrize(seg.graph, {}, source, m_k, 1 / m_k)
    graph, _ = reparametrize(graph, {}, source, R, R.T)
    graph, _ = reparametrize(graph, {}, source, m_k, 1 / m_k)
    folded = fold_scales(graph)
    assert [type(op) for op in folded.online["two"]] == [Rotate, Multiply]
    assert relative(out(folded, seg), out(seg.graph, seg)) < 1e-5


def with_rounded_values(spec, dtype=torch.float32):
    """llama's block with v_proj rounded, the source of o_proj, and a scale on it that v_proj's rows
    can carry."""
    seg = segment("llama")
    graph, _ = seg.solve(at("*.v_proj", rtn(parse_spec(spec))), replace(seg.graph, dtype=dtype))
    source = next(s.source for s in graph.sites if s.path == "self_attn.o_proj")
    return seg, graph, source, folds(graph.code)[source].tie(normal(64, seed=0).mul(0.3).exp())


@pytest.mark.parametrize("spec", ["int4-g16", "int4-channel", "int3-g16-asym"])
def test_rounded_rows_move_with_their_scales(spec):
    seg, graph, source, m_k = with_rounded_values(spec)
    assert torch.equal(folds(graph.code)[source].stored(graph, m_k), m_k)
    scaled, _ = reparametrize(graph, {}, source, m_k, 1 / m_k)
    folded = fold_scales(scaled)
    before, after = (g.params["self_attn.v_proj.weight"] for g in (graph, folded))
    assert torch.equal(before.codes, after.codes) and not torch.equal(before.scales, after.scales)
    assert not folded.online
    assert relative(out(folded, seg), out(graph, seg)) < 1e-5


@pytest.mark.parametrize(
    "spec, dtype, m",
    [
        ("int4-tensor", torch.float32, 1.5),
        ("fp8-b16x16", torch.float32, 1.5),
        ("nvfp4", torch.float32, 1.3),
        ("int4-g16", torch.float16, 1e-4),  # scales that fp16 cannot hold
    ],
)
def test_rounded_rows_whose_scales_cannot_take_another_stay_and_are_refused_by_name(spec, dtype, m):
    _, graph, source, m_k = with_rounded_values(spec, dtype)
    m_k = torch.full_like(m_k, m)
    assert torch.equal(folds(graph.code)[source].stored(graph, m_k), torch.ones(64))
    graph, _ = reparametrize(graph, {}, source, m_k, 1 / m_k)
    with pytest.raises(
        QlabError, match=r"model\.layers\.0\.self_attn\.v_proj\.weight is rounded already"
    ):
        fold_scales(graph)


def test_a_scale_of_ones_leaves_rounded_rows_that_cannot_take_another():
    """What a search of rows that cannot move comes to: `stored` says 1."""
    _, graph, source, m_k = with_rounded_values("int8-tensor")
    moved, _ = reparametrize(graph, {}, source, torch.ones_like(m_k), torch.ones_like(m_k))
    assert moved.online and not fold_scales(moved).online
    assert_same(fold_scales(moved), graph)


def test_of_rounded_rows_those_stay_whose_scales_would_be_lost():
    _, graph, source, _ = with_rounded_values("int4-g16", torch.float16)
    q, fold = graph.params["self_attn.v_proj.weight"], folds(graph.code)[source]
    tiny = replace(q, scales=torch.where(torch.arange(32)[:, None] < 4, q.scales * 1e-3, q.scales))
    kept = (
        fold.stored(graph.update({"self_attn.v_proj.weight": tiny}), torch.full((64,), 1.37e-2))
        == 1
    )
    assert torch.equal(kept, fold.index_k < 4)


@given(st.integers(0, 99))
def test_the_scale_reported_as_stored_is_the_one_that_is_applied(seed):
    for family in ("llama", "gemma2", "opt"):  # w, 1 + w, and a bias
        graph = replace(segment(family).graph, dtype=torch.bfloat16)
        for fold in folds(graph.code).values():
            if not fold.producer.rows:
                m_k = normal(64, seed=seed).mul(0.3).exp()
                w, offset = graph.params[fold.producer.weight], fold.producer.offset
                after = fold.apply(graph, m_k)[fold.producer.weight]
                assert torch.equal(after, after.bfloat16().float())
                expected = (after + offset)[fold.index_k]
                assert torch.allclose(
                    fold.stored(graph, m_k) * (w + offset)[fold.index_k],
                    expected,
                    rtol=1e-5,
                    atol=1e-6,
                )


def test_places_are_found_once_per_program():
    graph = segment("llama").graph
    assert folds(graph.code) is folds(graph.code)
    assert_same(fold_scales(graph), graph)  # nothing online, nothing to fold
