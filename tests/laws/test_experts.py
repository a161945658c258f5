"""Experts are solved one by one on the tokens routed to them, and one function stands for every
fused mixture."""

import pytest
import torch
import torch.nn.functional as F
from families import MIXTURES
from hypothesis import given
from hypothesis import strategies as st
from methods import LAW_METHODS
from segments import calls, model_of, normal, relative, segment, tokens
from torch import nn

from qlab.algebra.absorb import folds
from qlab.algebra.experts import experts_forward, per_row, rows_of
from qlab.algebra.graph import by_origin
from qlab.algebra.grid import encode, weighted
from qlab.algebra.interpret import inputs_of
from qlab.algebra.measured import Errors, errors_in_notes, merged
from qlab.algebra.qtensor import dense
from qlab.algebra.running import apply
from qlab.algebra.spec import parse_spec, with_scale_dtype
from qlab.algebra.stats import Moment, gram, quadratic
from qlab.driver.observe import observe
from qlab.methods.awq import awq_scale
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn
from qlab.model.paper import run_experts_here

SPEC = with_scale_dtype(parse_spec("int4-g16"), torch.float32)
every_mixture = pytest.mark.parametrize("family", MIXTURES)


def site(graph, path):
    return next(s for s in graph.sites if s.path == path)


@every_mixture
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_one_function_stands_for_transformers_own(implementation, family):
    model, ids = model_of(family), tokens(2, 12)
    ours = model(ids).logits
    try:
        model.set_experts_implementation(implementation)
        assert relative(ours, model(ids).logits) < 1e-6
    finally:
        run_experts_here(model)


class Experts(nn.Module):
    """What experts_forward reads of a module, in every form that transformers has."""

    def __init__(self, e, k, i, transposed, bias, gate, seed):
        super().__init__()
        self.is_transposed, self.has_bias, self.has_gate, self.has_post_expert_norm = (
            transposed,
            bias,
            gate,
            False,
        )
        wide, name = (2 * i, "gate_up_proj") if gate else (i, "up_proj")
        for n, (o, j) in {name: (wide, k), "down_proj": (k, i)}.items():
            W = normal(e, o, j, seed=seed)
            setattr(self, n, nn.Parameter(W.mT.contiguous() if transposed else W))
            setattr(self, f"{n}_bias", nn.Parameter(normal(e, o, seed=seed + 1)))
        self.act_fn = torch.tanh

    def _apply_gate(self, x):
        gate, up = x.chunk(2, -1)
        return self.act_fn(gate) * up

    def one(self, e, x):
        """Expert e on rows x."""

        def product(name, x):
            W = getattr(self, name)[e]
            return F.linear(
                x,
                W.mT if self.is_transposed else W,
                getattr(self, f"{name}_bias")[e] if self.has_bias else None,
            )

        x = (
            self._apply_gate(product("gate_up_proj", x))
            if self.has_gate
            else self.act_fn(product("up_proj", x))
        )
        return product("down_proj", x)


@given(
    n=st.integers(1, 9),
    e=st.integers(1, 5),
    t=st.integers(1, 3),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_a_mixture_is_the_weighted_sum_of_its_chosen_experts(n, e, t, flags, seed):
    module, x = Experts(e, 6, 4, *flags, seed), normal(n, 6, seed=seed)
    g = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(e, generator=g)[: min(t, e)] for _ in range(n)])
    weights = torch.rand(chosen.shape, generator=g)
    expected = torch.stack(
        [
            sum(weights[i, j] * module.one(chosen[i, j], x[i]) for j in range(chosen.shape[1]))
            for i in range(n)
        ]
    )
    assert torch.allclose(experts_forward(module, x, chosen, weights), expected, atol=1e-5)
    if chosen.shape[1] < e:
        # Routers of transformers 5.0.0 give weights of all experts.
        of_all = torch.rand(n, e, generator=g).scatter(1, chosen, weights)
        assert torch.allclose(experts_forward(module, x, chosen, of_all), expected, atol=1e-5)


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_rows_are_cut_where_experts_end(counts):
    ends, x = torch.tensor(counts).cumsum(0), torch.arange(sum(counts))
    assert [len(x[rows]) for rows in rows_of(ends)] == counts
    m = torch.arange(float(len(counts)))[:, None]
    assert per_row(m, ends, sum(counts)).flatten().tolist() == [
        float(e) for e, count in enumerate(counts) for _ in range(count)
    ]


@every_mixture
def test_an_expert_sees_the_tokens_that_its_router_sends(family):
    seg = segment(family)
    experts, router = site(seg.graph, "mlp.experts.gate_up_proj"), site(seg.graph, "mlp.gate")
    for batch in seg.batches:
        inputs, seen = inputs_of(seg.graph, [experts.source, router.source], *batch), {}
        hook = seg.block.mlp.experts.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.update(chosen=args[1])
        )
        seg.block(*batch[0], **batch[1])
        hook.remove()
        rows, x_nk = inputs[experts.source], inputs[router.source].x.flatten(0, -2)
        assert torch.equal(rows.x, x_nk[rows.tokens])
        for e, mine in enumerate(rows_of(rows.ends)):
            assert (
                rows.tokens[mine].tolist()
                == (seen["chosen"] == e).any(-1).nonzero().flatten().tolist()
            )


@every_mixture
def test_the_second_moment_of_an_expert_is_the_dense_one_of_its_tokens(family):
    seg = segment(family)
    experts = site(seg.graph, "mlp.experts.gate_up_proj")
    states = seg.stats[experts.source, "second_moment"].states
    rows = [inputs_of(seg.graph, [experts.source], *batch)[experts.source] for batch in seg.batches]
    for e, state in enumerate(states):
        rows_of_expert = torch.cat([r.x[list(rows_of(r.ends))[e]] for r in rows])
        assert state.tokens == len(rows_of_expert) and torch.allclose(
            state.sum_kk, gram(rows_of_expert), rtol=1e-4, atol=1e-4
        )


@every_mixture
def test_everywhere_every_expert_sees_every_token_and_the_block_stays_as_it_is(family):
    seg = segment(family)
    up, down = (site(seg.graph, f"mlp.experts.{p}_proj") for p in ("gate_up", "down"))
    batch = seg.batches[0]
    inputs = inputs_of(
        seg.graph,
        [up.source, down.source, site(seg.graph, "mlp.gate").source],
        *batch,
        calibrate_all_experts=True,
    )
    x_nk = inputs[site(seg.graph, "mlp.gate").source].x.flatten(0, -2)
    module = seg.block.mlp.experts
    for e, mine in enumerate(rows_of(inputs[up.source].ends)):
        assert torch.equal(inputs[up.source].x[mine], x_nk)
        assert torch.allclose(
            inputs[down.source].x[mine],
            module._apply_gate(F.linear(x_nk, module.gate_up_proj[e])),
            atol=1e-6,
        )
    routed = inputs_of(seg.graph, [up.source], *batch)[up.source]
    assert len(routed.x) < len(inputs[up.source].x)


def test_statistics_everywhere_are_of_all_tokens():
    seg = segment("mixtral")
    up, router = (site(seg.graph, f"mlp.{p}") for p in ("experts.gate_up_proj", "gate"))

    class Plain:  # a call whose arguments are those of the segment
        def __init__(self, batch):
            self.batch = batch

        def inputs(self, hidden):
            return self.batch

    batches = [(Plain(batch), None) for batch in seg.batches]
    keys = {(s.source, name) for s in (up, router) for name in ("second_moment", "sample")}
    stats = observe(seg.graph, keys, lambda: iter(batches), calibrate_all_experts=True)
    for state in stats[up.source, "second_moment"].states:
        assert state.tokens == 72 and torch.allclose(
            state.sum_kk, stats[router.source, "second_moment"].sum_kk, rtol=1e-5, atol=1e-4
        )
    for state in stats[up.source, "sample"].states:
        # A token has one key wherever it goes.
        assert torch.equal(state.order, stats[router.source, "sample"].order)


@every_mixture
@pytest.mark.parametrize("method", ["gptq", "rtn-weighted"])
def test_an_expert_gets_the_codes_that_it_would_get_alone(method, family):
    seg, transform = segment(family), LAW_METHODS[method](SPEC)
    graph, _ = seg.solve(transform)
    for experts in (s for s in seg.graph.sites if s.route):
        q, states = graph.params[experts.weight], seg.stats[experts.source, "second_moment"].states
        for e, moment in enumerate(states):
            alone = _alone(seg, experts, e, moment, transform)
            assert torch.equal(q.codes[e], alone.codes) and torch.equal(q.scales[e], alone.scales)


def _alone(seg, experts, e, moment, transform):
    """The leaf of one expert's weight as a linear of its own, on its own second moment."""
    linear = nn.Linear(seg.graph.weight_ok(experts, e).shape[1], 1, bias=False)
    linear.weight.data = seg.graph.weight_ok(experts, e)
    from segments import of

    alone = of(linear, torch.randn(2, 3, linear.weight.shape[1]))
    graph, stats = alone.graph, {(alone.graph.sites[0].source, "second_moment"): moment}
    for stage in transform:
        graph, stats = apply(stage, graph, stats)
    return graph.params["weight"]


@every_mixture
def test_awq_is_never_worse_than_rtn_over_all_experts_and_its_notes_are_true(family):
    seg = segment(family)
    graph, stats = seg.graph, seg.stats
    for stage in awq_scale(SPEC):
        graph, stats = apply(stage, graph, stats)
    final, _ = apply(rtn(SPEC, weighted)[0], graph, stats)
    for origin, sharing in by_origin(seg.graph.sites).items():
        sites = [s for s in sharing if s.route]
        if not sites or origin not in folds(seg.graph.code):
            continue
        (one,) = sites
        states = seg.stats[one.source, "second_moment"].states
        ours = rtns = 0.0
        for e, moment in enumerate(states):
            W, H = seg.graph.weight_ok(one, e), moment.mean_kk
            moved = graph.weight_ok(one, e)
            ours += (
                moment.tokens
                * quadratic(
                    dense(final.params[one.weight], torch.float32)[e] * W / moved - W, H
                ).sum()
            )
            rtns += (
                moment.tokens
                * quadratic(dense(encode(weighted, W, SPEC, H.diagonal())) - W, H).sum()
            )
        note = final.notes[one.path]
        assert note["awq_loss"] <= note["awq_rtn_loss"]
        # Nothing folds into the rows of down_proj, so what was scored is what was rounded.
        if one.path.endswith("down_proj"):
            assert ours <= rtns * (1 + 1e-4) and len(note["awq_ratio"]) == len(states)


def test_an_expert_without_tokens_is_rounded_to_nearest_by_every_solver():
    seg = segment("mixtral")
    down = site(seg.graph, "mlp.experts.down_proj")
    key = (site(seg.graph, "mlp.experts.down_proj").source, "second_moment")
    state = seg.stats[key]
    nothing = Moment(torch.zeros_like(state.states[0].sum_kk), 0)
    stats = {**seg.stats, key: type(state)((nothing, *state.states[1:]))}
    for transform in (rtn(SPEC, weighted), gptq(SPEC, sweeps=0)):
        graph, _ = apply(transform[0], seg.graph, stats)
        q, W = graph.params[down.weight], seg.graph.weight_ok(down, 0)
        alone = encode(weighted, W, SPEC, torch.ones(W.shape[1]))
        assert torch.equal(q.codes[0], alone.codes) and torch.equal(q.scales[0], alone.scales)
        assert (
            graph.notes[down.path]["expert_tokens"][0] == 0
            and 0 in graph.notes[down.path]["experts_with_few_tokens"]
        )


def test_the_report_weighs_experts_by_their_tokens():
    parts = [
        Errors(D=3.0, W=4.0, D_H=1.0, W_H=4.0, tokens=30, channels=30),
        Errors(D=4.0, W=3.0, D_H=5.0, W_H=10.0, tokens=10, channels=30),
        Errors(D=0.0, W=0.0, tokens=0, channels=30),
    ]
    notes = errors_in_notes(parts)
    assert notes["weight_error"] == pytest.approx(1)
    assert notes["loss"] == pytest.approx((30 * 1 + 10 * 5) / (30 * 4 + 10 * 10))
    assert notes["expert_tokens"] == [30, 10, 0] and notes["tokens"] == 40
    assert notes["experts_with_few_tokens"] == [1, 2]


def test_what_experts_have_in_common_is_noted_once():
    notes = [{"damp": 0.01, "share": 0.5}, {"damp": 0.01, "share": 0.5}, {"damp": 0.01, "share": 1}]
    assert merged(notes) == {"damp": 0.01, "share": [0.5, 0.5, 1]}


def test_programs_of_a_mixture_hold_for_every_number_of_tokens():
    seg = segment("qwen3_moe")
    for length in (2, 5, 31):
        args, kwargs = calls(model_of("qwen3_moe"), tokens(2, length))["model.layers.1"]
        inputs = inputs_of(
            seg.graph, [site(seg.graph, "mlp.experts.down_proj").source], args, kwargs
        )
        assert next(iter(inputs.values())).ends[-1] == 2 * length * 2
