"""HQQ: never worse than RTN on its objective, better where there are outliers, and free of data."""

import pytest
import torch
from hypothesis import given
from segments import segment
from weights import problems, weight

from qlab.algebra.grid import encode, minmax
from qlab.algebra.qtensor import dense, steps
from qlab.algebra.spec import NAMED, Int, Tile, parse_spec, with_scale_dtype
from qlab.methods.hqq import P, half_quadratic, hqq, sparse_error
from qlab.methods.rtn import rtn


def solve(W, spec):
    """What hqq makes of RTN's grid: (scales, zeros) and the objectives of both, tile by tile."""
    q, x = encode(minmax, W, spec), spec.tile.split(W)
    s, z = half_quadratic(x, q.scales, q.zeros, spec, q.outer)
    wide = lambda scales: steps(scales, q.outer, torch.float32)
    return s, z, sparse_error(x, wide(s), z, spec), sparse_error(x, wide(q.scales), q.zeros, spec)


@given(problems())
def test_no_tile_is_worse_than_under_rtn(problem):
    W, spec = problem
    s, z, ours, theirs = solve(W, spec)
    assert (
        (ours <= theirs).all()
        and s.dtype == spec.scale_dtype
        and (z is None or z.dtype == torch.int8)
    )


@pytest.mark.parametrize("text", [*NAMED, "fp8-channel", "fp8-b48x48"])
def test_floats_are_not_worse_either(text):
    _, _, ours, theirs = solve(
        weight(50, 96, 1, "outlier"), with_scale_dtype(parse_spec(text), torch.float32)
    )
    assert (ours <= theirs).all()


@given(problems())
def test_the_objective_is_that_of_what_is_stored(problem):
    W, spec = problem
    q = encode(minmax, W, spec)
    error = spec.tile.split((W - dense(q, torch.float32)).abs().pow(P)).sum(-1)
    assert torch.allclose(
        sparse_error(spec.tile.split(W), q.scales, q.zeros, spec), error, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("kind", ["normal", "outlier", "offset"])
@pytest.mark.parametrize("zeros", [None, torch.int8, torch.float32], ids=str)
def test_it_pays_and_moves_zero_points_where_they_may_lie_between_codes(kind, zeros):
    spec = Int(3, Tile(1, 64), zeros is None, torch.float32, zeros or torch.int8)
    W = weight(32, 64, 3, kind)
    s, z, ours, theirs = solve(W, spec)
    q = encode(minmax, W, spec)
    assert ours.sum() < 0.99 * theirs.sum()
    assert torch.equal(s, q.scales) == (zeros == torch.float32)
    assert z is None or (z.dtype == zeros and torch.equal(z, q.zeros) == (zeros == torch.int8))


# Sizes of the errors, next to the threshold |d|^(2 - p) = 1 / beta.
@pytest.mark.parametrize("size, fitted", [(1e-3, True), (1e4, False)])
def test_small_errors_are_fitted_and_large_ones_let_be(size, fitted, monkeypatch):
    monkeypatch.setitem(half_quadratic.__globals__, "STEPS", 1)
    spec = Int(3, Tile(1, 64), True, torch.float32)
    W = size * weight(32, 64, 3)
    q = encode(minmax, W, spec)
    x, codes = spec.tile.split(W), spec.tile.split(q.codes).float()
    s, _ = half_quadratic(x, q.scales, None, spec, None)
    least_squares = torch.linalg.vecdot(x, codes) / torch.linalg.vecdot(codes, codes)
    moved = (s / q.scales - 1).abs() > 1e-4
    assert bool(moved.any()) == fitted and torch.allclose(s[moved], least_squares[moved], rtol=1e-5)


def test_every_tile_of_a_model_is_at_least_as_good_as_rtns():
    seg, spec = segment("llama"), parse_spec("int3-g32-asym")
    ours, theirs = seg.solve(hqq(spec))[0], seg.solve(rtn(spec))[0]
    for site in seg.graph.sites:
        W = seg.graph.weight_ok(site)
        a, b = (
            (W - dense(g.params[site.weight], torch.float32)).abs().pow(P) for g in (ours, theirs)
        )
        assert (
            spec.tile.split(a).sum(-1) <= spec.tile.split(b).sum(-1) * (1 + 1e-4)
        ).all() and a.sum() < b.sum()
    assert all(not stage.needs for stage in hqq(spec))
