"""Rounding by offsets that are learned: codes, weight and straight-through gradients are those of
the formula, written out, however few rows are worked on at once."""

import pytest
import torch

from qlab.algebra import straight_through
from qlab.algebra.spec import Int, parse_spec
from qlab.algebra.straight_through import nearest_rounding_to, round_with_offsets, unit


def high(spec):
    return spec.qmax if isinstance(spec, Int) else spec.max


def low(spec):
    return spec.qmin if isinstance(spec, Int) else -spec.max


class Through(torch.autograd.Function):
    """Codes, with the gradient of x within the ends of the grid."""

    @staticmethod
    def forward(ctx, x, spec):
        ctx.save_for_backward((x >= low(spec)) & (x <= high(spec)))
        return spec.nearest_(x.clone())

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None


@pytest.fixture(params=[1, 1 << 16])
def at_once(request, monkeypatch):
    monkeypatch.setattr(straight_through, "IN_CACHE", request.param)


def drawn(*shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source, dtype=torch.float32)


@pytest.mark.parametrize("shape", [(6, 16), (2, 6, 16)])
@pytest.mark.parametrize("text", ["int3-g8-asym", "int2-channel", "int4-tensor", "fp8-channel"])
def test_it_is_the_formula(text, shape, at_once):
    spec = parse_spec(text)
    W = drawn(*shape)
    W[..., 3] = 0
    end = high(spec) / 2
    W[..., 0, 0] = end  # lies at an end, through which gradients pass
    s, z = torch.full(spec.tile.scales_shape(W.shape), 0.5), None
    z = None if spec.symmetric else torch.zeros_like(s)
    V = drawn(*shape, seed=1).masked_fill(W.eq(end), 0)
    learned = [t.requires_grad_() for t in (V, s, z) if t is not None]
    made, codes = round_with_offsets(W, V, s, z, spec)
    z_ag1 = 0 if z is None else z[..., None]
    x = spec.tile.split(W) / s[..., None] + z_ag1
    offsets = spec.tile.split(V * (W != 0)) * unit(x.detach(), spec)
    expected_codes = Through.apply(x + offsets, spec)
    expected = spec.tile.join((expected_codes - z_ag1) * s[..., None], W.shape)
    assert torch.equal(made, expected) and codes.dtype == spec.code_dtype
    assert torch.equal(codes.float(), spec.tile.join(expected_codes, W.shape))
    G = drawn(*shape, seed=2)
    pairs = zip(torch.autograd.grad(made, learned, G), torch.autograd.grad(expected, learned, G))
    for gradient, of_formula in pairs:
        torch.testing.assert_close(gradient, of_formula)


@pytest.mark.parametrize("text", ["int3-g8-asym", "nvfp4", "fp8-channel"])
def test_what_is_nearest_to_a_weight_rounds_to_the_codes(text, at_once):
    spec = parse_spec(text)
    W, s = drawn(6, 16), torch.full(spec.tile.scales_shape(torch.Size([6, 16])), 0.5)
    z = None if spec.symmetric else torch.zeros_like(s)
    codes = spec.nearest_(3 * drawn(6, 16, seed=1)).to(spec.code_dtype)
    near = nearest_rounding_to(codes, W, s, z, spec)
    _, again = round_with_offsets(near, torch.zeros_like(W), s, z, spec)
    assert torch.equal(again.float(), codes.float())
    own = nearest_rounding_to(codes, 0.5 * codes.float(), s, z, spec)
    assert torch.equal(own, 0.5 * codes.float())
    assert ((near - W).abs() <= (own - W).abs() + 1e-6).all()
