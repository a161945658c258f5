"""Gauges: what may act on a wire is read off the program, and acting keeps the function."""

import pytest
import torch
from families import FAMILIES, MIXTURES, OTHERS
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import refused
from segments import hidden, normal, relative, run_checked, segment

import qlab
from qlab.algebra.absorb import fold_scales
from qlab.algebra.gauge import Element
from qlab.algebra.graph import by_origin
from qlab.algebra.groups import Diagonal, General, Nothing, groups, made_of
from qlab.algebra.interpret import interpret
from qlab.algebra.online import MatMul, rotate
from qlab.algebra.reparametrize import reparametrize
from qlab.algebra.spec import parse_spec
from qlab.algebra.stats import STATS
from qlab.algebra.wires import wires
from qlab.errors import QlabError

ALL = [*FAMILIES, *MIXTURES, *OTHERS]
every_family = pytest.mark.parametrize("family", ALL)
INT8 = parse_spec("int8-channel")
ROUNDED = qlab.rtn(INT8)


def kept(graph, seg):
    for batch in seg.batches[:2]:
        out, before = (hidden(interpret(g, *batch)) for g in (graph, seg.graph))
        assert relative(out, before) < 1e-4


def attention_input(graph):
    """The origin of the projection behind attention, and its group."""
    return next(((o, g) for o, g in groups(graph.code).items() if isinstance(g, General)), None)


def turn_of(*shape, seed=0):
    return torch.linalg.qr(normal(*shape, seed=seed))[0]


# ------------------------------------------------------------------ groups
@every_family
def test_every_wire_has_a_group_and_heads_are_those_of_the_values(family):
    graph = segment(family).graph
    found = groups(graph.code)
    assert found.keys() == by_origin(graph.code.sites).keys()
    values = [w for w in wires(graph.code).values() if w.kind == "value"]
    heads = [g for g in found.values() if isinstance(g, General)]
    # falcon's fused projection adds its bias by itself, which no label passes
    assert len(heads) == (0 if family == "falcon" else len(values))
    for group, wire in zip(heads, values):
        (node,) = (n for n in graph.code.graph.nodes if n.name == wire.node)
        assert group.size == node.meta["val"].shape[-1] == 16
        assert len(group.heads_hd) == node.meta["val"].shape[-3]
        assert torch.equal(group.heads_hd[group.copies_b].flatten(), group.fold.index_k)


@pytest.mark.parametrize(
    "family, site, reason",
    [
        ("gpt_neox", "mlp.dense_4h_to_h", "the operation gelu stands before it"),
        ("olmo2", "mlp.up_proj", "the operation add stands before it"),
        ("olmo2", "self_attn.q_proj", "it is what enters the segment"),
    ],
)
def test_nothing_has_a_reason_that_names_the_operation(family, site, reason):
    graph = segment(family).graph
    (origin,) = (s.origin for s in graph.code.sites if s.path == site)
    assert groups(graph.code)[origin] == Nothing(reason)


def test_an_activation_lets_scales_through_and_no_matrix():
    graph = segment("opt").graph
    (origin,) = (s.origin for s in graph.code.sites if s.path == "fc2")
    assert isinstance(groups(graph.code)[origin], Diagonal)


# ------------------------------------------------------------------ acting
@every_family
def test_a_matrix_per_head_folds_into_values_and_their_readers(family):
    seg = segment(family)
    if attention_input(seg.graph) is None:
        pytest.skip("no input of this family takes matrices")

    def choose(turn):
        if not isinstance(turn.group, General):
            return None
        h, d = turn.group.heads_hd.shape
        return turn_of(h, d, d) + 0.3 * torch.eye(d)  # invertible, and no rotation

    graph, _ = run_checked(seg, qlab.gauge("heads", "*:in", choose))
    kept(graph, seg)
    assert not graph.online
    changed = {n for n in graph.params if graph.params[n] is not seg.graph.params[n]}
    _, group = attention_input(seg.graph)
    producer, readers = group.fold.producer, {s.weight for s in graph.sites}
    assert producer.weight in changed and len(changed & readers) == 2
    assert changed <= readers | {producer.bias}


@every_family
def test_scales_of_every_wire_that_takes_them(family):
    seg = segment(family)

    def choose(turn):
        if turn.fold is None:
            return None
        experts = len(turn.sources()) if turn.apart else None
        m = normal(turn.size, seed=1).mul(0.3).exp()
        return turn.stored(m if experts is None else m.repeat(experts, 1, 1))

    graph, _ = run_checked(seg, qlab.gauge("scales", "*:in", choose))
    kept(graph, seg)
    assert not graph.online


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("n", [4, 32, None])
def test_what_no_producer_takes_stays_at_run_time(family, n):
    seg = segment(family)
    turned = lambda turn: turn_of(n or turn.size, n or turn.size)
    graph, stats = run_checked(seg, qlab.gauge("turn", "*:in", turned, online=True), seg.stats)
    kept(graph, seg)
    assert graph.online.keys() == {s.path for s in graph.sites}
    again = seg.all_stats(graph)
    for (source, name), state in stats.items():
        if name == "second_moment" and not hasattr(state, "states"):
            assert relative(state.sum_kk, again[source, name].sum_kk) < 1e-4


def test_every_reader_of_a_wire_turns_routers_too():
    seg = segment("qwen3_moe")
    graph, _ = run_checked(
        seg, qlab.gauge("turn", "*mlp*:in", lambda t: turn_of(t.size, t.size), online=True)
    )
    kept(graph, seg)
    assert "mlp.gate" in graph.online


def test_a_sources_statistics_come_with_its_weights():
    seg, seen = segment("mixtral"), []

    def choose(turn):
        seen.extend((turn.name, len(s.weights), s.stats["absmax"]) for s in turn.sources())

    run_checked(seg, qlab.gauge("look", "*:in", choose, needs=frozenset({"absmax"})), seg.stats)
    path = seg.graph.path
    assert seen[0][:2] == (f"{path}.self_attn.q_proj:in", 3) and seen[0][2].shape == (64,)
    assert len(seen) == 2 + 4 + 4  # q k v, o, and the two inputs of four experts
    (down,) = (s for s in seg.graph.sites if s.path.endswith("experts.down_proj"))
    of_experts = seg.stats[down.source, "absmax"].states
    own = [absmax for name, _, absmax in seen if name.endswith("experts.down_proj:in")]
    assert len(own) == 4 and all(map(torch.equal, own, of_experts))
    assert not torch.equal(own[0], own[1])


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 99))
def test_blocks_are_the_matrix_that_they_are_together(blocks, n, seed):
    M, x = normal(blocks, n, n, seed=seed), normal(3, blocks * n, seed=seed)
    assert torch.allclose(MatMul(M)(x), x @ torch.block_diag(*M), atol=1e-5)
    assert torch.allclose(rotate(x, M[0]), x @ torch.block_diag(*[M[0]] * blocks), atol=1e-5)


@pytest.mark.parametrize("n", [8, 64])
def test_the_inputs_of_blocks_are_transported_as_they_are_observed_again(n):
    seg = segment("llama")
    origin = next(iter(by_origin(seg.graph.sites)))
    M = torch.stack([turn_of(n, n, seed=i) for i in range(64 // n)])
    graph, stats = reparametrize(seg.graph, seg.stats, origin, M, M.mT)
    again = seg.observe(graph, {(origin, name) for name in STATS})
    for name in ("second_moment", "sample"):
        assert relative(stats[origin, name][0].float(), again[origin, name][0].float()) < 1e-5
    assert (origin, "absmax") not in stats


def test_copies_of_a_head_that_differ_stay_online():
    seg = segment("llama")  # two queries share a value
    origin, group = attention_input(seg.graph)
    M = torch.stack([turn_of(16, 16, seed=i) for i in range(4)])
    graph, _ = reparametrize(seg.graph, {}, origin, M, M.mT)
    folded = fold_scales(graph)
    assert folded.online and group.of_producer(M) is None
    kept(folded, seg)


# ------------------------------------------------------------------ refusals
WRONG = {
    "behind an activation": (
        "gpt_neox",
        "*.dense_4h_to_h:in",
        lambda t: torch.full((t.size,), 2.0),
        ["dense_4h_to_h:in", "nothing may act there", "gelu", "online=True"],
    ),
    "a matrix where scales fit": (
        "llama",
        "*.down_proj:in",
        lambda t: turn_of(t.size, t.size),
        ["down_proj:in", "a matrix (128, 128)", "positive scales [128] alone"],
    ),
    "heads of another size": (
        "llama",
        "*.o_proj:in",
        lambda t: turn_of(8, 8),
        ["o_proj:in", "invertible matrices [2, 16, 16] or [16, 16] alone"],
    ),
    "scales of one producer channel that differ": (
        "llama",
        "*.o_proj:in",
        lambda t: torch.arange(1.0, 65.0),
        ["o_proj:in", "scales (64,)"],
    ),
    "negative scales": (
        "opt",
        "*.fc2:in",
        lambda t: -torch.ones(t.size),
        ["fc2:in", "positive scales"],
    ),
    "a wrong inverse": (
        "llama",
        "*.o_proj:in",
        lambda t: Element(M=turn_of(16, 16), M_inv=turn_of(16, 16)),
        ["o_proj", "M_inv is not the inverse of M"],
    ),
    "no inverse": (
        "llama",
        "*.o_proj:in",
        lambda t: torch.zeros(16, 16),
        ["o_proj:in", "no inverse"],
    ),
    "NaN": ("llama", "*.o_proj:in", lambda t: torch.full((16, 16), torch.nan), ["NaN or Inf"]),
    "no tensor": ("llama", "*.o_proj:in", lambda t: 2.0, ["a float", "return a finite tensor"]),
    "some of a wire's readers": (
        "llama",
        "*.up_proj:in",
        lambda t: torch.full((t.size,), 2.0),
        ["gate_proj", "shares its input", "one rule for all"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_of_the_group_is_refused_by_name(case):
    family, pattern, choose, words = WRONG[case]
    refused(lambda: run_checked(segment(family), qlab.gauge("mine", pattern, choose)), *words)


def test_a_rounded_neighbour_is_refused():
    seg = segment("llama")
    graph, _ = run_checked(seg, qlab.at("*.v_proj", qlab.rtn(INT8)))
    turn = qlab.gauge("mine", "*.o_proj:in", lambda t: turn_of(16, 16))
    refused(
        lambda: run_checked(seg, turn, graph=graph), "v_proj", "rounded already", "rotate first"
    )
    graph, _ = run_checked(seg, qlab.at("*.o_proj", qlab.rtn(INT8)))
    refused(lambda: run_checked(seg, turn, graph=graph), "o_proj", "quantized already")


def test_a_pattern_that_is_for_no_inputs_is_refused():
    refused(lambda: qlab.gauge("mine", "*.o_proj", lambda t: None), "'*.o_proj'", "'*:in'")


def test_a_rule_that_splits_a_wire_is_refused_before_any_work(saved):
    split = qlab.gauge("mine", "*.up_proj:in", lambda t: None)
    refused(
        lambda: qlab.plan(saved("llama"), qlab.chain(split, qlab.rtn(INT8))),
        "up_proj shares its input with",
        "gate_proj",
        "the rule for mine splits them",
    )


def test_what_stays_at_run_time_is_refused_before_any_work_by_formats_without_a_place(saved):
    left = qlab.gauge("mine", "*.down_proj:in", lambda t: turn_of(32, 32), online=True)
    refused(
        lambda: qlab.plan(
            saved("llama", torch.float16), qlab.chain(left, qlab.rtn("int8-g32")), codec="gptq"
        ),
        "down_proj",
        "holds no run-time operations",
    )


# ------------------------------------------------------------------ names
def turned_by(seg, pattern, choose):
    return run_checked(seg, qlab.gauge("mine", pattern, choose))[0]


@pytest.mark.parametrize(
    "family, reader",
    [
        ("llama", "self_attn.o_proj"),
        ("phi3", "self_attn.o_proj"),
        ("gpt2", "attn.c_proj"),
        ("deepseek_v3", "self_attn.o_proj"),
        ("qwen3_moe", "self_attn.o_proj"),
    ],
)
def test_values_turn_by_their_own_name(family, reader):
    seg, M = segment(family), turn_of(16, 16)
    by_value = turned_by(seg, "*:value", lambda turn: M)
    by_input = turned_by(seg, f"*{reader}:in", lambda turn: M)
    assert not torch.equal(
        by_value.params[f"{reader}.weight"], seg.graph.params[f"{reader}.weight"]
    )
    for name, leaf in by_input.params.items():
        assert torch.equal(by_value.params[name], leaf), name


@pytest.mark.parametrize(
    "family, output, reader",
    [
        ("llama", "mlp.up_proj", "*mlp.down_proj"),
        ("llama", "input_layernorm", "*self_attn.[qkv]_proj"),
        ("opt", "fc1", "*fc2"),
        ("mixtral", "post_attention_layernorm", "re:.*mlp.(gate|experts.gate_up_proj)"),
    ],
)
def test_outputs_turn_by_their_own_name(family, output, reader):
    seg = segment(family)
    choose = lambda turn: torch.full((turn.size,), 0.5)
    by_output = turned_by(seg, f"*{output}:out", choose)
    by_input = turned_by(seg, f"{reader}:in", choose)
    assert any(
        by_input.params[name] is not leaf and not torch.equal(by_input.params[name], leaf)
        for name, leaf in seg.graph.params.items()
    )
    for name, leaf in by_input.params.items():
        assert torch.equal(by_output.params[name], leaf), name


def test_an_output_of_which_others_read_a_part_is_no_name_of_a_value():
    names = set().union(*made_of(segment("phi3").graph.code).values())
    assert "self_attn:value" in names and "self_attn.qkv_proj:out" not in names


def test_names_of_what_cannot_turn_are_refused_with_the_nearest(saved):
    model, half = qlab.open(saved("llama")), lambda turn: torch.full((turn.size,), 0.5)
    recipe = lambda name, **given: qlab.chain(qlab.gauge("mine", name, half, **given), ROUNDED)
    for name, near in [
        ("*.gate_proj:out", "up_proj:out"),
        ("*.self_attn.q_proj:out", "v_proj:out"),
        ("*.attn:value", "self_attn:value"),
    ]:
        with pytest.raises(QlabError, match=f"nothing that can turn .*{near}"):
            qlab.plan(model, recipe(name))
    rows = qlab.plan(model, recipe("*.0.self_attn:value")).schedule
    assert [(row.step, row.weights) for row in rows if row.step == "mine"] == [("mine", 1)]


@pytest.mark.parametrize(
    "family, name, reader",
    [
        ("llama", "*:value", "*.o_proj"),
        ("qwen3_moe", "*:value", "*.o_proj"),
        ("llama", "*.up_proj:out", "*.down_proj"),
        ("gpt2", "*.attn:value", "*.attn.c_proj"),
    ],
)
def test_what_stays_at_run_time_stays_at_the_input_of_that_name(family, name, reader, saved):
    """All channels of an input are turned together, which nothing folds."""
    seg = segment(family)

    def recipe(wires):
        return qlab.gauge("mine", wires, lambda t: turn_of(t.size, t.size), online=True)

    by_name, by_input = (run_checked(seg, recipe(at))[0] for at in (name, f"{reader}:in"))
    kept(by_name, seg)
    assert len(by_name.online) == 1 and by_name.online.keys() == by_input.online.keys()
    for leaf in seg.graph.params:
        assert torch.equal(by_name.params[leaf], by_input.params[leaf]), leaf
    plans = [
        qlab.apply(saved(family), qlab.chain(recipe(wires), qlab.rtn(INT8)), None).asked
        for wires in (name, f"{reader}:in")
    ]
    weights = [{row.step: row.weights for row in plan.schedule}["mine"] for plan in plans]
    assert weights[0] == weights[1] >= 1


def test_an_input_of_another_name_alone_is_refused_by_formats_without_a_place(saved):
    """What a plan asks a format about is at the inputs that turn, and at no others."""
    left = qlab.gauge("mine", "*.1.self_attn:value", lambda t: turn_of(16, 16), online=True)
    recipe = qlab.chain(left, qlab.rtn("int8-g32"))
    with pytest.raises(QlabError, match=r"layers\.1\.self_attn\.o_proj") as refused:
        qlab.plan(saved("llama", torch.float16), recipe, codec="gptq")
    assert "layers.0" not in str(refused.value) and "mlp" not in str(refused.value)
