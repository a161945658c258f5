"""A low rank beside codes: EoRA loses least of the outputs for its rank, more rank loses less, and
all of it gives the weight back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segments import correlated, moment, normal, segment

import qlab
from qlab.algebra.cell import Cell, Feasible
from qlab.algebra.grid import encode, minmax
from qlab.algebra.leaf import LowRank, Sum, dense
from qlab.algebra.spec import parse_spec, with_scale_dtype
from qlab.algebra.transform import chain
from qlab.driver.report import site_rows
from qlab.errors import QlabError
from qlab.methods.eora import eora, root
from qlab.methods.gptq import gptq
from qlab.methods.lqer import beside, l2qer, leading, lqer, scaling
from qlab.methods.magnitude import magnitude
from qlab.methods.rtn import rtn

INT3 = parse_spec("int3-g16")
LOW_RANKS = {"lqer": lqer, "l2qer": l2qer, "eora": eora}
every = pytest.mark.parametrize("name", LOW_RANKS)


def leaves(graph):
    for site in graph.sites:
        for e in [None] if site.route is None else range(graph.params[site.weight].shape[0]):
            if not site.router:
                yield site, e, graph.leaf_ok(site, e)


def losses(seg, graph):
    """tr(D H D^T) of every weight, from the second moments of the unquantized inputs."""
    stats = seg.stats_for(gptq(INT3))
    of_weights = {}
    for site, e, leaf in leaves(graph):
        state = stats[site.source, "second_moment"]
        H = (state if e is None else state.states[e]).mean_kk.double()
        D = (seg.graph.weight_ok(site, e) - dense(leaf)).double()
        of_weights[site.path, e] = float((D @ H * D).sum())
    return of_weights


@given(st.integers(0, 999), st.sampled_from([(6, 12), (12, 6), (8, 8)]), st.integers(1, 5))
@settings(max_examples=20)
def test_no_product_of_the_rank_loses_less_than_eoras(seed, shape, rank):
    """It is that of the singular values of E M that are left out, and at most a plain
    decomposition's."""
    E_ok, H = normal(*shape, seed=seed), moment(correlated(40, shape[1], seed)).mean_kk.double()
    M = root(H)
    torch.testing.assert_close(M @ M.T, H, rtol=1e-5, atol=1e-5 * float(H.abs().max()))
    U = leading(E_ok.double() @ M, rank)
    torch.testing.assert_close(U.T @ U, torch.eye(rank, dtype=torch.float64))
    loss = lambda D: float((D @ H * D).sum())
    rest = E_ok.double() - U @ (U.T @ E_ok.double())
    least = torch.linalg.svdvals(E_ok.double() @ M)[rank:].square().sum()
    noise = 1e-5 * loss(E_ok.double())
    assert loss(rest) == pytest.approx(float(least), rel=1e-4, abs=noise)
    plain = leading(E_ok, rank)
    assert loss(rest) <= loss(E_ok.double() - plain @ (plain.T @ E_ok.double())) + noise


@every
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_errors_fall_with_the_rank_and_all_of_it_gives_the_weight_back(name, family):
    seg = segment(family)
    runs = [seg.solve(chain(rtn(INT3), LOW_RANKS[name](rank)))[0] for rank in (1, 4, 16, 1 << 20)]
    base = seg.solve(rtn(INT3))[0]
    for site, e, leaf in leaves(runs[-1]):
        assert isinstance(leaf, Sum) and isinstance(leaf.parts[1], LowRank)
        assert leaf.parts[1].B_or.shape[-1] == min(leaf.shape)
        W = seg.graph.weight_ok(site, e)
        torch.testing.assert_close(dense(leaf), W, rtol=1e-4, atol=1e-4 * float(W.abs().max()))
        codes = base.leaf_ok(site, e)
        assert torch.equal(leaf.parts[0].codes, codes.codes)
        if name == "lqer":  # in the norm in which each is the best of its rank
            errors = [dense(codes), *(dense(run.leaf_ok(site, e)) for run in runs)]
            sizes = [float((W - W_rounded).norm()) for W_rounded in errors]
            assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.2 * sizes[3]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_eora_loses_less_of_the_outputs_than_a_plain_decomposition(family):
    seg = segment(family)
    # Rounded to nearest, so that both stand beside the same codes.
    plain, weighted = (
        losses(seg, seg.solve(chain(rtn(INT3), step(4)))[0]) for step in (lqer, eora)
    )
    assert all(weighted[name] <= plain[name] * (1 + 1e-4) + 1e-9 for name in plain)
    assert sum(weighted.values()) < 0.99 * sum(plain.values())
    ranks = [losses(seg, seg.solve(chain(rtn(INT3), eora(rank)))[0]) for rank in (1, 4, 16)]
    assert all(ranks[0][n] > ranks[1][n] > ranks[2][n] for n in plain if ranks[0][n] > 1e-9)


def test_l2qer_loses_least_where_inputs_are_large():
    seg = segment("llama")
    means = seg.observe(seg.graph, {(site.source, "absmean") for site in seg.graph.sites})
    graphs = [seg.solve(chain(rtn(INT3), step(4)))[0] for step in (lqer, l2qer)]
    sizes = []
    for site in seg.graph.sites:
        total_k, tokens = means[site.source, "absmean"]
        W, s_k = seg.graph.weight_ok(site), scaling(total_k / tokens)
        sizes.append([float(((W - dense(g.leaf_ok(site))) * s_k).norm()) for g in graphs])
    assert all(weighted <= plain * (1 + 1e-4) for plain, weighted in sizes)
    assert sum(weighted for _, weighted in sizes) < 0.999 * sum(plain for plain, _ in sizes)


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (with_scale_dtype(INT3, torch.float16), torch.float16),
        (parse_spec("mxfp4"), torch.bfloat16),
        (None, torch.bfloat16),
    ],
)
def test_factors_have_the_dtype_of_scales_where_that_is_wide(spec, dtype):
    W = normal(8, 32, seed=0)
    leaf = W.relu() if spec is None else encode(minmax, W, spec)
    cell = Cell(target=W, leaf=leaf, feasible=Feasible(spec))
    E_ok = W - dense(leaf, torch.float32)
    _, thin = beside(cell, E_ok, leading(E_ok, 2)).leaf.parts
    assert thin.B_or.dtype == thin.A_rk.dtype == dtype


def test_it_makes_up_for_zeros_of_a_mask_too():
    seg = segment("llama")
    graph = seg.solve(chain(magnitude("2:4"), eora(8)))[0]
    bare = seg.solve(magnitude("2:4"))[0]
    for site, e, leaf in leaves(graph):
        W = seg.graph.weight_ok(site, e)
        zeros = bare.leaf_ok(site, e) == 0
        assert not dense(leaf.parts[0])[zeros].any()
        assert (W - dense(leaf)).norm() < (W - dense(leaf.parts[0])).norm()


def test_inputs_that_are_always_0_count_as_the_least_that_are_not():
    assert scaling(torch.tensor([0.0, 1.0, 4.0])).tolist() == [0.5, 0.5, 2.0]
    assert scaling(torch.zeros(2)).tolist() == [1.0, 1.0]


@every
def test_what_was_not_rounded_and_ranks_that_are_none_are_refused(name):
    with pytest.raises(QlabError, match=f"{name} makes up for what a step before it lost"):
        segment("llama").solve(LOW_RANKS[name](4))
    for rank in (0, -1, True):
        with pytest.raises(QlabError, match=f"{name}'s rank is {rank}"):
            LOW_RANKS[name](rank)


@every
def test_a_plan_refuses_to_write_it_and_evaluating_it_does_not(name, saved):
    model = qlab.open(saved("llama"))
    data = qlab.from_ids(model, torch.arange(3, 99).reshape(4, 24))
    recipe = chain(rtn(parse_spec("int3-g16")), LOW_RANKS[name](4))
    with pytest.raises(QlabError, match=f"{name}' makes of model.layers.0.self_attn.q_proj.* and"):
        qlab.plan(model, recipe, data)
    bare, beside = (
        qlab.evaluate(qlab.apply(model, each, data), model, data) for each in (recipe[:1], recipe)
    )
    assert beside.kl < bare.kl


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("spec, rank", [("int4-g16", 3), ("nvfp4", 3), ("int8-channel", 500)])
def test_a_plan_counts_the_bits_of_low_ranks_as_the_run_does(saved, family, spec, rank):
    model = qlab.open(saved(family))
    beside = qlab.at("*.0.*", qlab.lqer(rank))
    quantized = qlab.apply(model, qlab.chain(qlab.rtn(spec), beside), None)
    planned = {name: row["bits_per_weight"] for name, row in quantized.plan.sites.items()}
    made = {}
    for _, graph in quantized.segments():
        made |= {name: row["bits_per_weight"] for name, row in site_rows(graph).items()}
    assert planned == pytest.approx(made)
    plain = qlab.apply(model, qlab.rtn(spec), None).plan.sites
    more = {name for name, bits in planned.items() if bits > plain[name]["bits_per_weight"]}
    assert more == {name for name, row in plain.items() if ".0." in name and row["spec"]}
