"""The solver's stages: none raises J = tr((W* - W') M (W* - W')^T), and each is what it says."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segments import correlated
from weights import problems, weight

from qlab.algebra.qtensor import dense, shared_outer
from qlab.algebra.spec import parse_spec, with_scale_dtype
from qlab.errors import QlabError
from qlab.methods.babai import babai, sampled_codes
from qlab.methods.grid import encode, minmax
from qlab.methods.quadratic import Quadratic, accept, start
from qlab.methods.refit import refit
from qlab.methods.stages import (
    ALTERNATED,
    Problem,
    compensated,
    diagonal,
    nearest,
    obs,
    scales_refitted,
    solve,
    solver,
)

SEEDS = st.integers(0, 99)
FORMATS = st.sampled_from(["nvfp4", "mxfp4", "fp8-channel", "int4-g16", "int3-g32-asym"])


def moment(k, seed, n=64):
    x = correlated(n, k, seed)
    return x.T @ x / n


def problem_of(W, spec, seed, damp=0.01):
    H = moment(W.shape[1], seed)
    return Problem(target_ok=W, H_kk=H, damp=damp, spec=spec, outer=shared_outer([W], spec))


@st.composite
def any_problem(draw):
    """Of every tile and dtype of scales."""
    seed = draw(SEEDS)
    if draw(st.booleans()):
        W, spec = draw(problems(scale_dtype=draw(st.sampled_from([torch.float32, torch.bfloat16]))))
        return problem_of(W, spec, seed)
    spec = with_scale_dtype(parse_spec(draw(FORMATS)), torch.bfloat16)
    return problem_of(weight(6, 64, seed), spec, seed)


def exact_rows(problem, leaf):
    D_ok = (problem.target_ok - dense(leaf, torch.float32)).double()
    return torch.linalg.vecdot(D_ok @ problem.M_kk.double(), D_ok)


@given(any_problem(), st.sampled_from([compensated, diagonal]))
def test_no_stage_raises_j(problem, grid):
    solved = solve(problem, grid, obs, ALTERNATED)
    values = list(solved.certificate.values())
    assert list(solved.certificate)[:2] == ["nearest", "obs"] and len(values) == 6
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(values))


@given(any_problem())
def test_the_certificate_is_j_of_the_leaf_and_no_row_is_above_rounding_to_nearest(problem):
    scales, zeros = compensated(problem)
    first = exact_rows(problem, nearest(problem, scales, zeros))
    solved = solve(problem, compensated, obs, ALTERNATED)
    last = exact_rows(problem, solved.leaf)
    size = (problem.target_ok.double().square() @ problem.M_kk.diagonal().double()).sum()
    assert float(last.sum()) == pytest.approx(
        list(solved.certificate.values())[-1], rel=1e-3, abs=1e-6 * float(size)
    )
    rows = problem.spec.tile.sizes(problem.target_ok.shape)[0]
    for before, after in zip(first.split(rows), last.split(rows)):
        assert after.sum() <= before.sum() * (1 + 1e-4) + 1e-6 * size


@given(any_problem())
def test_a_candidate_that_is_worse_changes_nothing(problem):
    q = encode(minmax, problem.target_ok, problem.spec, outer=problem.outer)
    before = start(problem.quadratic, q, "first")
    worse = encode(minmax, problem.target_ok + 3, problem.spec, outer=problem.outer)
    after = accept(problem.quadratic, before, worse, "second")
    assert (after.J_o <= before.J_o).all() or problem.spec.tile.rows != 1
    assert after.J_o.sum() <= before.J_o.sum() * (1 + 1e-6)
    assert torch.equal(accept(problem.quadratic, before, q, "same").leaf.codes, q.codes)


@given(any_problem(), SEEDS)
def test_what_is_accepted_is_the_leaf_of_its_objective(problem, seed):
    """With its scales and zero points, of which the leaf before it had others."""
    moved = problem.target_ok + 0.5 * weight(*problem.target_ok.shape, seed)
    first, second = (
        encode(minmax, W, problem.spec, outer=problem.outer) for W in (moved, problem.target_ok)
    )
    before = start(problem.quadratic, first, "first")
    after = accept(problem.quadratic, before, second, "second")
    noise = 1e-5 * float(before.J_o.sum())
    torch.testing.assert_close(
        exact_rows(problem, after.leaf), after.J_o.double(), rtol=1e-3, atol=noise
    )


@given(problems(scale_dtype=torch.float32, kinds=("normal", "offset")), SEEDS)
def test_refitted_scales_are_the_least_squares_solution(problem, seed):
    W, spec = problem
    M = moment(W.shape[1], seed, n=256) + 0.1 * torch.eye(W.shape[1])
    q = encode(minmax, W, spec)
    root = torch.linalg.cholesky(M.double())
    optimum = 0.0
    for W_rk, c_rk, owner in rows_of_scales(W, q):
        # columns of the system: what each scale of these rows adds to their outputs
        system = torch.stack([(c_rk * (owner == g)) @ root for g in range(int(owner.max()) + 1)])
        A, b = system.flatten(1).T, (W_rk @ root).flatten()
        best = torch.linalg.lstsq(A, b, driver="gelsd").solution
        optimum += float((b - A @ best).square().sum())
    J = float(Quadratic(W.double(), M.double()).rows(refit(W, M, q)).sum())
    assert optimum * (1 + 1e-3) + 1e-5 * float((W.double() @ root).square().sum()) >= J


def rows_of_scales(W, q):
    """(weights, codes - zeros, which scale) of the rows under each row of scales."""
    rows, cols = q.spec.tile.sizes(q.shape)
    zeros = torch.zeros(q.scales.shape) if q.zeros is None else q.zeros.float()
    owner = torch.arange(q.shape[1]) // cols
    for a in range(len(q.scales)):
        at = slice(a * rows, (a + 1) * rows)
        yield W[at].double(), (q.codes[at].float() - zeros[a, owner]).double(), owner


@given(SEEDS)
def test_scales_of_eight_bits_are_refitted_to_what_they_can_hold(seed):
    for name in ("nvfp4", "mxfp4"):
        problem = problem_of(weight(6, 64, seed), parse_spec(name), seed)
        q = encode(minmax, problem.target_ok, problem.spec, outer=problem.outer)
        refitted = scales_refitted(problem, q)
        assert refitted.scales.dtype == problem.spec.scale_dtype
        before, after = (exact_rows(problem, leaf).sum() for leaf in (q, refitted))
        if name == "nvfp4":
            assert after < before
        # no single scale has a better neighbour
        s_ag = refitted.scales.float()
        for other in (s_ag * 1.13, s_ag / 1.13) if name == "nvfp4" else (s_ag * 2, s_ag / 2):
            for g in range(s_ag.shape[1]):
                moved = s_ag.clone()
                moved[:, g] = other[:, g]
                leaf = problem.leaf(q.codes, moved.to(refitted.scales.dtype), None)
                kept = exact_rows(problem, refitted)
                assert (exact_rows(problem, leaf) >= kept * (1 - 1e-3) - 1e-9).float().mean() > 0.6


@given(problems(blocks=True), SEEDS)
def test_more_paths_are_never_worse_and_the_first_is_gptqs(problem, seed):
    W, spec = problem
    problem = problem_of(W, spec, seed)
    scales, zeros = compensated(problem)
    one, few, more = (babai(paths, 7)(problem, scales, zeros) for paths in (1, 3, 6))
    assert torch.equal(one.codes, obs(problem, scales, zeros).codes)
    J = [float(problem.quadratic.rows(q).sum()) for q in (one, few, more)]
    assert J[0] >= J[1] * (1 - 1e-6) and J[1] >= J[2] * (1 - 1e-6)
    again = babai(6, 7)(problem, scales, zeros)
    assert torch.equal(again.codes, more.codes) and torch.equal(again.scales, scales)


def test_random_paths_and_the_compensated_grid_pay():
    problem = problem_of(
        weight(64, 128, 0), with_scale_dtype(parse_spec("int3-g32"), torch.float32), 1
    )
    J = lambda grid, round_: float(problem.quadratic.rows(round_(problem, *grid(problem))).sum())
    plain = J(diagonal, obs)
    assert J(compensated, obs) < 0.97 * plain
    assert J(diagonal, babai(8)) < 0.97 * plain
    grid = diagonal(problem)
    one, other = (babai(8, seed)(problem, *grid) for seed in (0, 1))
    assert not torch.equal(one.codes, other.codes)


@given(problems(), SEEDS)
def test_on_white_inputs_the_rounding_is_to_nearest(problem, seed):
    W, spec = problem
    white = Problem(target_ok=W, H_kk=torch.eye(W.shape[1]), damp=0.01, spec=spec)
    scales, zeros = compensated(white)
    expected = nearest(white, scales, zeros)
    assert torch.equal(solve(white, compensated, obs, ()).leaf.codes, expected.codes)


def test_bad_settings_are_refused():
    with pytest.raises(QlabError, match="damp is 2; give a fraction"):
        solver(parse_spec("int4-g64"), damp=2)
    with pytest.raises(QlabError, match="paths is 0; give at least 1"):
        babai(0)
    nvfp4 = problem_of(weight(2, 32, 0), parse_spec("nvfp4"), 0)
    with pytest.raises(QlabError, match="step from code to code, which nvfp4 has not; use obs"):
        babai(2)(nvfp4, *diagonal(nvfp4))


@given(SEEDS, st.sampled_from([nearest, obs, babai(3)]))
def test_zeros_of_a_mask_stay_and_are_made_up_for(seed, round_):
    spec = with_scale_dtype(parse_spec("int4-g16"), torch.float32)
    whole = problem_of(weight(16, 64, seed), spec, seed)
    support = whole.target_ok.abs() >= whole.target_ok.abs().median(1, keepdim=True).values
    masked = replace(whole, support=support, masked_ok=whole.target_ok * support)
    scales, zeros = diagonal(masked)
    leaf = round_(masked, scales, zeros)
    assert not dense(leaf)[~support].any()
    if round_ is not nearest:  # which makes up for nothing
        cut = masked.leaf(obs(whole, scales, zeros).codes, scales, zeros)
        assert exact_rows(masked, leaf).sum() < exact_rows(masked, cut).sum()


@pytest.mark.parametrize("masked", [False, True])
def test_a_path_that_never_takes_the_second_nearest_is_gptqs(masked, monkeypatch):
    spec = with_scale_dtype(parse_spec("int3-g32"), torch.float32)
    problem = problem_of(weight(64, 128, 0), spec, 1)
    if masked:
        size = problem.target_ok.abs()
        support = size >= size.median(1, keepdim=True).values
        problem = replace(problem, support=support, masked_ok=problem.target_ok * support)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.ones(*shape))
    scales, zeros = diagonal(problem)
    (codes,) = sampled_codes(problem, scales, zeros, 1, 0)
    same = problem.leaf(codes, scales, zeros).codes == obs(problem, scales, zeros).codes
    assert same.float().mean() > 0.999
