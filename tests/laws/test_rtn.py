"""Round to nearest: error bounds, projections, equivariance, and the same numbers as
compressed-tensors."""

import hashlib

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st
from weights import KINDS, problems, weight

from qlab.algebra.grid import encode, minmax
from qlab.algebra.qtensor import QTensor, dense, round_codes
from qlab.algebra.spec import Int, Tile, parse_spec, with_scale_dtype
from qlab.methods.grid import GRIDS

HALVES = [torch.bfloat16, torch.float16]


def per_weight(spec, W, s_ag):
    """The scale of every single weight [o, k]."""
    return spec.tile.join(
        s_ag.float()[..., None].expand_as(spec.tile.split(W)).contiguous(), W.shape
    )


def span(spec, W):
    """max|w| of a tile (symmetric), or the length of its range through zero, for every single
    weight."""
    x = spec.tile.split(W)
    lo, hi = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    return per_weight(spec, W, torch.maximum(-lo, hi) if spec.symmetric else hi - lo)


@given(problems())
def test_errors_are_at_most_half_a_step_in_fp32(problem):
    W, spec = problem
    q = encode(minmax, W, spec)
    error, s = (dense(q) - W).abs(), per_weight(spec, W, q.scales).abs()
    assert (error <= s * 0.5 * (1 + 1e-4)).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@given(data=st.data())
def test_rounded_scales_add_at_most_their_own_error_over_the_range(dtype, data):
    """|w - w'| <= s/2 + u R, u the unit roundoff of the scale's dtype, R = max|w| (symmetric) or hi
    - lo.

    Exact scales s0 clip nothing by more than s0/2: the grid ends half a step inside the range. A
    stored scale s >= s0 / (1 + u) shortens the grid at the end of the range by (qmax + 1/2) (s0 -
    s) <= u R (symmetric) or by (qmax - qmin) (s0 - s) <= u R (a zero point, itself rounded by at
    most half a step), and what lies beyond its last half step is clipped by that much more.
    """
    W, spec = data.draw(problems(scale_dtype=dtype))
    q = encode(minmax, W, spec)
    assert q.scales.dtype == dtype
    bound = per_weight(spec, W, q.scales).abs() / 2 + torch.finfo(dtype).eps / 2 * span(spec, W)
    assert ((dense(q, torch.float32) - W).abs() <= bound * (1 + 1e-4)).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@given(data=st.data())
def test_codes_are_the_nearest_for_the_scale_that_is_stored(dtype, data):
    W, spec = data.draw(problems(scale_dtype=dtype))
    q = encode(minmax, W, spec)
    z = 0 if q.zeros is None else per_weight(spec, W, q.zeros)
    s = per_weight(spec, W, q.scales)
    here = (W - (q.codes - z) * s).abs()
    for step in (-1, 1):
        beside = q.codes.short() + step
        legal = (beside >= spec.qmin) & (beside <= spec.qmax)
        assert (here <= (W - (beside - z) * s).abs() * (1 + 1e-4) + 1e-7)[legal].all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@given(data=st.data())
def test_zero_points_belong_to_the_scale_that_is_stored(dtype, data):
    """Then the low end of a range is at most half a step off, unless the zero point itself was
    clamped."""
    W, spec = data.draw(problems(symmetric=False, scale_dtype=dtype, kinds=KINDS[:4] + KINDS[-1:]))
    q = encode(minmax, W, spec)
    lo, s = spec.tile.split(W).amin(-1).clamp(max=0).double(), q.scales.double()
    off = ((spec.qmin - q.zeros.double()) * s - lo).abs()
    assert (off <= s / 2 * (1 + 1e-5))[q.zeros < spec.qmax].all()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@given(problem=problems())
def test_projecting_onto_a_fixed_grid_is_idempotent(grid, problem):
    W, spec = problem
    q = encode(grid, W, spec, torch.ones(W.shape[1]))
    again = round_codes(dense(q), q.scales, q.zeros, spec)
    assert torch.equal(again, q.codes)
    assert q.codes.min() >= spec.qmin and q.codes.max() <= spec.qmax


@given(problems(kinds=("normal", "offset", "outlier")), st.integers(-12, 12))
def test_powers_of_two_scale_scales_and_leave_codes(problem, j):
    W, spec = problem
    ours, scaled = encode(minmax, W, spec), encode(minmax, W * 2.0**j, spec)
    assert torch.equal(ours.codes, scaled.codes) and torch.equal(
        ours.scales * 2.0**j, scaled.scales
    )
    assert ours.zeros is scaled.zeros is None or torch.equal(ours.zeros, scaled.zeros)


@given(problems(blocks=False))
def test_the_default_grid_is_compressed_tensors_own_bit_for_bit(problem):
    W, spec = problem
    strategy = {"tensor": "tensor", "channel": "channel"}.get(str(spec.tile), "group")
    args = QuantizationArgs(
        num_bits=spec.bits,
        symmetric=spec.symmetric,
        strategy=strategy,
        group_size=spec.tile.cols if strategy == "group" else None,
    )
    x = spec.tile.split(W)
    scales, zeros = calculate_qparams(x.amin(-1), x.amax(-1), args)
    q = encode(minmax, W, spec)
    assert torch.equal(q.scales, scales)
    assert spec.symmetric or torch.equal(q.zeros, zeros)
    flat = (scales.flatten(), zeros.flatten()) if strategy == "tensor" else (scales, zeros)
    assert torch.equal(q.codes, quantize(W, *flat, args, dtype=torch.int8))
    assert torch.equal(dense(q), fake_quantize(W, *flat, args))


def test_a_tile_of_zeros_has_a_usable_scale_and_zero_error():
    for symmetric in (True, False):
        for dtype in (torch.float32, *HALVES):
            q = encode(minmax, torch.zeros(2, 8), Int(4, Tile(1, 4), symmetric, dtype))
            assert (q.scales > 0).all() and torch.isfinite(q.scales).all() and not dense(q).any()


def test_fused_experts_are_rounded_one_by_one():
    W = torch.stack([weight(4, 8, seed) for seed in range(3)])
    spec = Int(4, Tile(1, 4))
    scales = torch.stack([encode(minmax, w, spec).scales for w in W])
    codes = torch.stack([encode(minmax, w, spec).codes for w in W])
    assert torch.equal(round_codes(W, scales, None, spec), codes)
    assert torch.equal(
        dense(QTensor(codes, scales, None, spec))[1], dense(encode(minmax, W[1], spec))
    )


GOLDEN = {  # spec/scale dtype -> the start of the sha256 of codes, scales and zeros
    "int2-g16/float32": "8b3bc9e7446ab0e6",
    "int2-g16/bfloat16": "5f185c52a4e777b1",
    "int3-g32-asym/float32": "ba3ab3a0fe323f47",
    "int3-g32-asym/bfloat16": "dfa7222478505f9f",
    "int4-g16/float32": "27f876680dabaf9c",
    "int4-g16/bfloat16": "b7752276df584a3d",
    "int4-g32-asym/float32": "b9e01118082f50ed",
    "int4-g32-asym/bfloat16": "3560aa85ee119415",
    "int4-channel/float32": "80c429b5c01bd112",
    "int4-channel/bfloat16": "56082e75844b819b",
    "int5-tensor/float32": "5fad5ac145798c87",
    "int5-tensor/bfloat16": "b7b7736bdfb2adb8",
    "int6-channel-asym/float32": "e948835cf0387445",
    "int6-channel-asym/bfloat16": "786d33f33115c8bf",
    "int7-g16/float32": "b2bbc665a53893f7",
    "int7-g16/bfloat16": "bf9f8bb1b05ba46b",
    "int8-channel/float32": "3ffa6c6fda20b520",
    "int8-channel/bfloat16": "a7283d681d9d3b1c",
    "int8-tensor-asym/float32": "8a5495c704b29193",
    "int8-tensor-asym/bfloat16": "13524f6f1b7428bf",
}


def exact_weight():
    """[24, 96] of multiples of 2^-12 from a linear congruence: the same numbers on every
    machine."""
    state = torch.arange(24 * 96, dtype=torch.int64)
    for _ in range(4):
        state = (state * 1103515245 + 12345) % 2**31
    return ((state >> 8) % 8191 - 4095).float().reshape(24, 96) / 4096


def fingerprint(q):
    parts = [
        q.codes,
        q.scales.view(torch.int16 if q.scales.itemsize == 2 else torch.int32),
        q.zeros,
    ]
    return hashlib.sha256(
        b"".join(p.numpy().tobytes() for p in parts if p is not None)
    ).hexdigest()[:16]


@pytest.mark.parametrize("name", GOLDEN)
def test_codes_and_scales_are_golden(name):
    text, dtype = name.split("/")
    spec = with_scale_dtype(parse_spec(text), getattr(torch, dtype))
    assert fingerprint(encode(minmax, exact_weight(), spec)) == GOLDEN[name]
