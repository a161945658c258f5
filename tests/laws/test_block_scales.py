"""Scales that are searched: the best integer zero point of a scale, and the best block scale of
NVFP4 and MXFP4, against all there are."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from segments import correlated, normal
from weights import KINDS, weight

from qlab.algebra.grid import encode, minmax, objective
from qlab.algebra.qtensor import steps
from qlab.algebra.spec import Int, Tile, parse_spec, with_scale_dtype
from qlab.methods.grid import GRIDS
from qlab.methods.neuqi import best_zeros
from qlab.methods.scale_sweep import LOWEST

SEEDS = st.integers(0, 999)


@given(st.integers(1, 6), SEEDS, st.floats(0.3, 12.0), st.floats(-20, 20))
def test_no_integer_zero_point_is_better_than_the_best(bits, seed, spread, offset):
    spec = Int(bits, Tile(1, 8), symmetric=False)
    u = normal(3, 2, 8, seed=seed) * spread + offset
    h = normal(3, 2, 8, seed=seed + 1).square()

    def cost(z_ag):
        return objective(u, torch.ones(3, 2), z_ag, spec, h)

    tried = [cost(torch.full((3, 2), z)) for z in range(spec.qmin, spec.qmax + 1)]
    best = torch.stack(tried).amin(0)
    size = (h * u.square()).sum(-1)
    assert (cost(best_zeros(u, h, spec)) <= best + 1e-5 * size + 1e-6).all()


def test_scale_and_zero_point_together_are_better_than_one_after_the_other():
    x = correlated(256, 64, 3)
    h, W = (x.T @ x / 256).diagonal(), weight(64, 64, 0, "outlier")
    spec = with_scale_dtype(parse_spec("int3-g32-asym"), torch.float32)

    def error(grid):
        q = encode(GRIDS[grid], W, spec, h)
        h_agn = spec.tile.split(h.expand_as(W))
        return objective(spec.tile.split(W), q.scales, q.zeros, spec, h_agn).sum()

    assert error("neuqi") < 0.97 * error("weighted_mse")


def every_block_scale(spec, W, outer):
    """All positive scales that the format holds, from LOWEST of the plain one on."""
    plain = steps(encode(minmax, W, spec).scales, outer, torch.float32)
    codes = torch.arange(1, 255, dtype=torch.uint8).view(spec.scale_dtype)
    held = codes[(codes.float() > 0) & codes.float().isfinite()]
    for scale in held:
        s_ag = steps(scale.expand(plain.shape), outer, torch.float32)
        yield torch.where(s_ag >= LOWEST * plain * 0.999, s_ag, plain)


@given(st.sampled_from(["nvfp4", "mxfp4"]), SEEDS, st.sampled_from(KINDS))
def test_the_sweep_sees_every_scale_that_may_be_best(name, seed, kind):
    spec, W = parse_spec(name), weight(4, 32, seed, kind)
    h_k = normal(32, seed=seed).square() + 0.01
    q = encode(GRIDS["scale_sweep"], W, spec, h_k)
    x_agn, h_agn = spec.tile.split(W), spec.tile.split(h_k.expand_as(W))
    error = lambda s_ag: objective(x_agn, s_ag, None, spec, h_agn)
    swept = error(steps(q.scales, q.outer, torch.float32))
    for s_ag in every_block_scale(spec, W, q.outer):
        assert (swept <= error(s_ag) * (1 + 1e-5) + 1e-9).all()


@given(SEEDS)
def test_the_largest_number_of_a_block_becomes_four_or_six(seed):
    spec, W = parse_spec("nvfp4"), weight(4, 64, seed)
    four, plain = (encode(grid, W, spec) for grid in (GRIDS["four_six"], minmax))
    ratio, moved = four.scales.float() / plain.scales.float(), four.scales != plain.scales
    # The largest scale of a weight is the largest that e4m3 holds, and cannot grow.
    free = moved & (four.scales.float() < 448)
    assert ((ratio[free] / 1.5 - 1).abs() < 0.13).all()
    largest = spec.tile.split(four.codes.float()).abs().amax(-1)
    assert set(largest[free].tolist()) <= {4.0}
    errors = [
        objective(spec.tile.split(W), steps(q.scales, q.outer, torch.float32), None, spec)
        for q in (four, plain)
    ]
    assert (errors[0] <= errors[1]).all() and (moved == (errors[0] < errors[1])).all()


def test_integers_keep_their_plain_scale_under_grids_of_floats():
    W, spec = weight(4, 32, 0), with_scale_dtype(parse_spec("int4-g16-asym"), torch.float32)
    plain = encode(minmax, W, spec)
    for name in ("four_six", "scale_sweep"):
        q = encode(GRIDS[name], W, spec, torch.ones(32))
        assert torch.equal(q.scales, plain.scales) and torch.equal(q.zeros, plain.zeros)
