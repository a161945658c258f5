"""GPTQ: the textbook elimination, its invariances, and what it is for."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segments import correlated, moment, normal, segment
from weights import problems, weight

from qlab.algebra.grid import fit, minmax
from qlab.algebra.qtensor import QTensor, dense, round_codes
from qlab.algebra.running import apply
from qlab.algebra.spec import Int, Tile, parse_spec
from qlab.algebra.stats import Moment, quadratic
from qlab.algebra.transform import at
from qlab.errors import QlabError
from qlab.methods import obs
from qlab.methods.gptq import act_order, gptq, gptq_codes, paper_order
from qlab.methods.obs import factor_of, factorize, obs_sweep
from qlab.methods.square import permuted_

SEEDS, DAMP = st.integers(0, 999), 0.01
plain = problems(kinds=("normal", "offset", "outlier"))


def second_moment(k, seed):
    x = correlated(4 * k + 8, k, seed).double()
    return x.T @ x / len(x)


def on_minmax(W, spec):
    scales, zeros = fit(minmax, W, spec)
    return scales.double(), zeros


def solve(W, H, spec, order=None, damp=DAMP, block=32):
    scales, zeros = on_minmax(W, spec)
    order = paper_order(H) if order is None else order
    return gptq_codes(W.double(), H.clone, scales, zeros, spec, order, damp, block)


def by_hand(W, H, spec, order, damp=DAMP):
    """Optimal brain surgeon as it is written down: round a column, repair the rest, eliminate it
    from H^-1."""
    scales, zeros = on_minmax(W, spec)
    wide = lambda t: spec.tile.join(
        t[..., None].double().expand_as(spec.tile.split(W)).contiguous(), W.shape
    )
    s, z = wide(scales), 0 * W if zeros is None else wide(zeros)
    W, codes = W.double().clone(), torch.zeros_like(W)
    inverse = torch.linalg.inv(H + damp * H.diagonal().mean() * torch.eye(len(H)))
    rest = order.tolist()
    while rest:
        j = rest.pop(0)
        codes[:, j] = (W[:, j] / s[:, j] + z[:, j]).round().clamp(spec.qmin, spec.qmax)
        error = (W[:, j] - (codes[:, j] - z[:, j]) * s[:, j]) / inverse[j, j]
        W[:, rest] -= error[:, None] * inverse[j, rest]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j] / inverse[j, j]
    return codes.to(torch.int8)


@given(plain, SEEDS, st.sampled_from([act_order, paper_order]))
def test_codes_are_those_of_the_textbook_elimination(problem, seed, order):
    W, spec = problem
    H = second_moment(W.shape[1], seed)
    assert torch.equal(solve(W, H, spec, order(H))[0], by_hand(W, H, spec, order(H)))


@given(problems(), st.floats(0.01, 100), st.sampled_from([act_order, paper_order]))
def test_on_white_inputs_gptq_is_rtn(problem, c, order):
    W, spec = problem
    H = c * torch.eye(W.shape[1], dtype=torch.float64)
    scales, zeros = on_minmax(W, spec)
    assert torch.equal(solve(W, H, spec, order(H))[0], round_codes(W.double(), scales, zeros, spec))


@given(plain, SEEDS, st.integers(1, 40), st.integers(1, 40))
def test_sizes_of_blocks_and_spans_change_no_codes(problem, seed, block, span):
    W, spec = problem
    H = second_moment(W.shape[1], seed)
    with patch.object(obs, "SPAN", span):
        in_spans = solve(W, H, spec, block=block)[0]
    assert torch.equal(in_spans, solve(W, H, spec, block=1 << 20)[0])


@given(plain, SEEDS, st.integers(-8, 8), st.booleans())
def test_the_scale_of_the_inputs_changes_no_codes(problem, seed, j, dead):
    W, spec = problem
    H = second_moment(W.shape[1], seed)
    if dead:
        H[0], H[:, 0] = 0, 0
    assert torch.equal(solve(W, H * 4.0**j, spec)[0], solve(W, H, spec)[0])


@given(plain, SEEDS)
def test_any_order_returns_codes_in_their_own_places(problem, seed):
    W, spec = problem
    k = W.shape[1]
    H = second_moment(k, seed)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    # A permutation of columns keeps scales per row.
    per_row = Int(spec.bits, Tile(1, None), spec.symmetric, torch.float32)
    permuted = solve(W[:, order], H[order][:, order], per_row)[0]
    assert torch.equal(solve(W, H, per_row, order)[0], permuted[:, order.argsort()])


def test_act_order_goes_by_falling_second_moment():
    H = torch.diag(torch.tensor([1.0, 5.0, 3.0, 5.0]))
    assert act_order(H).tolist() == [1, 3, 2, 0] and paper_order(H).tolist() == [0, 1, 2, 3]


@given(SEEDS, st.integers(2, 4), st.booleans(), st.sampled_from([act_order, paper_order]))
def test_gptq_is_worse_on_weights_and_better_on_outputs(seed, bits, symmetric, order):
    W, H = weight(24, 32, seed), second_moment(32, seed)
    spec = Int(bits, Tile(1, 16), symmetric, torch.float32)
    scales, zeros = on_minmax(W, spec)
    gptq_D, rtn_D = (
        dense(QTensor(codes, scales, zeros, spec)) - W.double()
        for codes in (solve(W, H, spec, order(H))[0], round_codes(W.double(), scales, zeros, spec))
    )
    assert gptq_D.norm() >= rtn_D.norm()
    assert quadratic(gptq_D, H).sum() < 0.9 * quadratic(rtn_D, H).sum()


@given(plain, SEEDS, st.sampled_from([0.0, 0.01]))
def test_dead_columns_become_zero_and_leave_the_others_alone(problem, seed, damp):
    W, spec = problem
    W = torch.cat([W, W[:, :2]], 1)
    spec = Int(spec.bits, Tile(1, None), spec.symmetric, torch.float32)
    k = W.shape[1]
    dead = torch.arange(k) % 3 == 1
    H = second_moment(k, seed) * ~dead * ~dead[:, None]
    codes, used, count = solve(W, H, spec, act_order(H), damp=damp)
    assert (used, count) == (damp, int(dead.sum()))
    scales, zeros = on_minmax(W, spec)
    assert not dense(QTensor(codes, scales, zeros, spec))[:, dead].any()
    alive = ~dead
    H = H[alive][:, alive]
    alone = gptq_codes(W.double()[:, alive], H.clone, scales, zeros, spec, act_order(H), damp, 32)[
        0
    ]
    assert torch.equal(codes[:, alive], alone)


@pytest.mark.parametrize("damp, rank, used", [(0.01, 16, 0.01), (0.0, 4, 0.01), (0.0, 16, 0.0)])
def test_damping_grows_until_the_factorization_works_and_is_noted(damp, rank, used):
    x = normal(rank, 16, seed=0).repeat(4, 1) + (0 if rank < 16 else 0.1 * normal(64, 16, seed=1))
    x[0, 0] = 0 if rank == 16 else x[0, 0]
    H = x.T @ x / len(x)
    # Not positive definite, as after rounding.
    H = H if rank == 16 else H - 1e-4 * torch.eye(16)
    factor = factorize(H, damp)
    assert factor.damp == used
    R, spread = factor.R_kk.double(), (H + used * H.diagonal().mean() * torch.eye(16)).double()
    assert torch.equal(R.triu(), R) and torch.equal(R.diagonal(), torch.ones(16).double())
    D = torch.linalg.solve_triangular(
        R, torch.linalg.solve_triangular(R, spread, upper=True).T, upper=True
    )
    pivots = D.diagonal()
    assert (pivots > 0).all() and torch.allclose(D, pivots.diag(), atol=1e-3 * float(pivots.max()))


def with_moment(state):
    """The notes of one site that was solved with this second moment."""
    graph = segment("opt").graph
    (stage,) = at("*.fc1", gptq(parse_spec("int4-g16")))
    stats = {(s.source, "second_moment"): state for s in graph.sites}
    return apply(stage, graph, stats)[0].notes["fc1"]


def test_notes_tell_the_damping_the_dead_columns_and_the_tokens():
    x = correlated(50, 64, 0)
    x[:, :3] = 0
    note = with_moment(moment(x))
    assert (note["damp"], note["dead"], note["tokens"]) == (0.01, 3, 50)
    H = torch.ones(64, 64) - 0.05 * torch.eye(64)
    assert with_moment(Moment(H, 1))["damp"] == 0.1


def test_a_second_moment_beyond_float32_is_refused_by_site():
    with pytest.raises(
        QlabError, match=r"fc1: the second moment is beyond float32; the activations are too large"
    ):
        with_moment(Moment(torch.full((64, 64), torch.inf), 1))


def test_a_second_moment_beyond_repair_is_refused_by_site():
    with pytest.raises(
        QlabError,
        match=r"model\.decoder\.layers\.0\.fc1: the second moment is not positive definite",
    ):
        with_moment(Moment(torch.eye(64) - torch.ones(64, 64), 1))


@given(SEEDS, st.integers(1, 9))
def test_the_sweep_writes_to_none_of_its_inputs(seed, o):
    # A transpose, whose columns lie contiguously already.
    W, H = (weight(12, o, seed).T, second_moment(12, seed).float())
    R, before = factorize(H, DAMP).R_kk, W.clone()
    kept = W._version, R._version, H._version
    out = obs_sweep(W, R, lambda w, j, into: into.copy_(w.round()), block=5)
    assert (
        torch.equal(W, before)
        and (W._version, R._version, H._version) == kept
        and torch.equal(out, out.round())
    )


@given(SEEDS)
def test_a_projection_that_changes_nothing_leaves_the_weight(seed):
    W, H = weight(5, 12, seed), second_moment(12, seed).float()
    assert torch.equal(obs_sweep(W, factorize(H, DAMP).R_kk, lambda w, j, into: into.copy_(w)), W)


@given(plain, SEEDS)
def test_rows_that_are_solved_in_parts_have_the_codes_of_the_whole(problem, seed):
    W, spec = problem
    H = second_moment(W.shape[1], seed)
    whole = solve(W, H, spec, act_order(H))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlab.methods.obs.AT_ONCE", W.shape[1])
        assert torch.equal(solve(W, H, spec, act_order(H))[0], whole)


@given(SEEDS, st.integers(1, 20), st.sampled_from([1, 7, 1 << 22]))
def test_a_matrix_is_factorized_in_its_own_memory(seed, k, strip):
    H, order = second_moment(k, seed), normal(k, 1, seed=seed)[:, 0].argsort()
    own = H.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlab.methods.square.STRIP", strip)
        factor = factor_of(lambda: permuted_(own, order), DAMP)
    R_kk, D_k = factor.R_kk, factor.D_k
    assert R_kk.data_ptr() == own.data_ptr()
    there = H[order][:, order] + DAMP * H.diagonal().mean() * torch.eye(k)
    assert torch.allclose(R_kk @ D_k.diag() @ R_kk.T, there)
