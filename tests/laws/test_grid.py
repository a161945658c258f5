"""Which scales: every grid that holds RTN's among its candidates is never worse on what it
minimizes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segments import correlated, normal
from weights import problems, weight

import qlab.algebra.grid as grids
from qlab.algebra.grid import encode, encode_rows, fit, minmax, objective
from qlab.algebra.qtensor import QTensor, dense, round_codes
from qlab.algebra.spec import Int, Tile
from qlab.algebra.stats import quadratic
from qlab.errors import QlabError
from qlab.methods.grid import GRIDS

WITH_RTN = [g for g in GRIDS.values() if g.name not in ("minmax", "signed")]
OF_FLOATS = ("four_six", "scale_sweep")
ids = lambda g: g.name


def error(W, q, h_k):
    """sum h (w - w')^2 of every tile, in fp64 and by the plain formula."""
    return q.spec.tile.split(h_k.double() * (dense(q, torch.float64) - W.double()).square()).sum(-1)


def weights_of(grid, H):
    return H.diagonal() if grid.weighted else torch.ones(len(H))


@pytest.mark.parametrize("grid", WITH_RTN, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(data=st.data(), seed=st.integers(0, 99))
def test_no_tile_is_worse_than_under_minmax(grid, dtype, data, seed):
    W, spec = data.draw(problems(scale_dtype=dtype))
    x = correlated(32, W.shape[1], seed)
    H = x.T @ x / 32
    chosen, rtn = encode(grid, W, spec, H.diagonal()), encode(minmax, W, spec)
    h = weights_of(grid, H)
    assert (error(W, chosen, h) <= error(W, rtn, h) * (1 + 1e-5) + 1e-9).all()


@given(seed=st.integers(0, 9999))
def test_weights_on_the_first_grid_stay_there(seed):
    """Where the error is all but zero, the sums that compare candidates are nothing but
    rounding."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (64, 32), generator=draw)
    codes[:, 0], codes[:, 1] = 0, 15
    W = (codes - torch.randint(0, 16, (64, 1), generator=draw)) * (
        torch.rand(64, 1, generator=draw) + 0.01
    )
    spec = Int(4, Tile(1, 32), False, scale_dtype=torch.float32)
    h = torch.rand(32, generator=draw) + 0.01
    left = lambda grid: objective(
        spec.tile.split(W), *fit(grid, W, spec, h), spec, h.expand(64, 1, -1)
    )
    assert (left(GRIDS["weighted"]) <= left(minmax)).all()


@given(data=st.data(), seed=st.integers(0, 99), mean=st.sampled_from([0.0, 3.0]))
def test_no_rows_cost_more_output_than_under_minmax(data, seed, mean):
    W, spec = data.draw(problems(scale_dtype=torch.float32))
    x = correlated(32, W.shape[1], seed) + mean
    H = x.T @ x / 32
    q, e_o = encode_rows(GRIDS["weighted"], W, spec, H.diagonal(), lambda D_ok: quadratic(D_ok, H))
    rows = spec.tile.sizes(W.shape)[0]  # that share scales
    exact = lambda leaf: ((dense(leaf, torch.float64) - W.double()) @ x.double().T).square().mean(1)
    for mine, other in zip(exact(q).split(rows), exact(encode(minmax, W, spec)).split(rows)):
        assert mine.sum() <= other.sum() * (1 + 1e-3) + 1e-6
    torch.testing.assert_close(e_o.double(), exact(q), rtol=1e-3, atol=1e-5)


def test_rows_leave_the_weighted_grid_where_inputs_share_a_direction():
    W = weight(64, 64, 0)
    spec = Int(4, Tile(1, 64), scale_dtype=torch.float32)
    weighted = GRIDS["weighted"]
    for mean, share in ((0.0, (0.0, 0.2)), (3.0, (0.3, 0.8))):
        x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)) + mean
        H = x.T @ x / 256
        q, _ = encode_rows(weighted, W, spec, H.diagonal(), lambda D_ok, H=H: quadratic(D_ok, H))
        moved = (q.scales != encode(weighted, W, spec, H.diagonal()).scales).any(1)
        plain = encode(minmax, W, spec)
        assert share[0] <= moved.float().mean() <= share[1]
        assert torch.equal(q.scales[moved], plain.scales[moved]) and torch.equal(
            q.codes[moved], plain.codes[moved]
        )


@pytest.mark.parametrize("grid", [g for g in WITH_RTN if g.name not in OF_FLOATS], ids=ids)
def test_searching_pays(grid):
    x = correlated(256, 64, 3)
    H, W = x.T @ x / 256, weight(64, 64, 0)
    for spec in (Int(3, Tile(1, 64)), Int(3, Tile(1, 64), False)):
        h = weights_of(grid, H)
        gain = (
            error(W, encode(grid, W, spec, H.diagonal()), h).sum()
            / error(W, encode(minmax, W, spec), h).sum()
        )
        assert gain < 0.9


@given(problems(), st.integers(0, 99))
def test_the_objective_is_the_squared_error_of_what_is_stored(problem, seed):
    W, spec = problem
    h = normal(W.shape[1], seed=seed).abs()
    q = encode(minmax, W, spec)
    split = spec.tile.split
    value = objective(split(W), q.scales, q.zeros, spec, split(h.expand_as(W)))
    assert torch.allclose(value.double(), error(W, q, h), rtol=1e-4, atol=1e-5)


@given(problems(kinds=("normal", "outlier", "offset")), st.integers(0, 99))
def test_refitting_takes_the_least_squares_scale_where_it_pays(problem, seed):
    W, spec = problem
    h_k = normal(W.shape[1], seed=seed).square() + 0.01
    rtn = encode(minmax, W, spec)
    q = encode(replace(minmax, weighted=True, refit=True), W, spec, h_k)
    h, x = spec.tile.split(h_k.double().expand_as(W)), spec.tile.split(W.double())

    def least_squares(codes):
        c = spec.tile.split(codes.double()) - (
            0 if spec.symmetric else rtn.zeros.double()[..., None]
        )
        return (h * x * c).sum(-1) / (h * c * c).sum(-1), (h * c * c).sum(-1)

    once, curvature = least_squares(rtn.codes)
    again = round_codes(W, once.float(), rtn.zeros, spec)
    twice, _ = least_squares(again)
    refit = [(q.scales - best).abs() <= 1e-5 * best.abs() for best in (once, twice)]
    gain = curvature * (rtn.scales - once).square()
    # A gain below this is rounding in fp32.
    kept = (q.scales == rtn.scales) & (gain <= 1e-5 * (h * x * x).sum(-1))
    assert (refit[0] | refit[1] | kept).all()
    bound = error(W, QTensor(again, twice, rtn.zeros, spec), h_k)
    unseen = 2e-6 * (h * x * x).sum(-1)  # the search subtracts numbers of this size
    assert (kept | (error(W, q, h_k) <= bound + unseen)).all()


@given(problems(), st.integers(0, 99))
def test_refitting_is_never_worse_than_not(problem, seed):
    W, spec = problem
    h_k = normal(W.shape[1], seed=seed).square() + 0.01
    refit, plain = GRIDS["weighted"], replace(GRIDS["weighted"], refit=False)
    ours, theirs = (error(W, encode(g, W, spec, h_k), h_k) for g in (refit, plain))
    assert (ours <= theirs * (1 + 1e-5) + 1e-9).all()


@given(st.integers(2, 8), st.integers(0, 99))
def test_the_signed_range_gives_the_larger_extreme_the_lowest_code_and_no_error(bits, seed):
    W = weight(4, 16, seed)
    q = encode(GRIDS["signed"], W, Int(bits, Tile(1, 8)))
    x, codes = q.spec.tile.split(W), q.spec.tile.split(q.codes)
    at = x.abs().argmax(-1, keepdim=True)
    assert (codes.gather(-1, at) == q.spec.qmin).all()
    assert torch.allclose(q.spec.tile.split(dense(q)).gather(-1, at), x.gather(-1, at), rtol=1e-6)
    assert ((q.scales < 0) == (x.gather(-1, at)[..., 0] > 0)).all()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=ids)
@given(problem=problems())
def test_grids_do_not_depend_on_how_rows_are_chunked(grid, problem):
    W, spec = problem
    h_k, chunk = torch.ones(W.shape[1]), grids.CHUNK
    try:
        whole = fit(grid, W, spec, h_k)
        grids.CHUNK = 1
        rows = fit(grid, W, spec, h_k)
    finally:
        grids.CHUNK = chunk
    assert torch.equal(whole[0], rows[0]) and (
        whole[1] is rows[1] is None or torch.equal(whole[1], rows[1])
    )


@given(problems(symmetric=False))
def test_zero_is_on_every_grid_with_a_zero_point(problem):
    W, spec = problem
    q = encode(minmax, W, spec)
    assert (q.zeros >= spec.qmin).all() and (q.zeros <= spec.qmax).all()
    with_zero = W.clone()
    with_zero[:, 0] = 0
    q = encode(minmax, with_zero, spec)
    assert not dense(q)[:, 0].any()


def test_weighing_needs_the_second_moment():
    with pytest.raises(
        QlabError, match="'weighted_mse' weighs errors by the second moment, which was not observed"
    ):
        fit(GRIDS["weighted_mse"], torch.ones(2, 4), Int(4, Tile(1, None)))


def test_scales_come_in_their_stored_dtype():
    for grid in GRIDS.values():
        q = encode(
            grid, weight(4, 16, 0), Int(4, Tile(1, 8), False, torch.bfloat16), torch.ones(16)
        )
        assert (
            isinstance(q, QTensor)
            and q.scales.dtype == torch.bfloat16
            and q.zeros.dtype == torch.int8
        )
