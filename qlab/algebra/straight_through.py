"""A weight rounded by offsets that are learned, with straight-through gradients, a few rows at a
time: what lies between the weight and its codes stays in a cache.

    codes = clamp(round(x))    x = W / s + z + V u    W' = (codes - z) s

    dW'/dV = s u inside        dW'/ds = codes - z - inside W / s        dW'/dz = s (inside - 1)

Legend: W_ok the weight, V_ok its offsets, s, z scales and zero points [a, g] of its tiles, u the
step from one code to the next around W / s + z, which is 1 for integers; inside is 1 where x lies
within the ends of the grid, and else 0.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.spec import Float, Int, Spec
from qlab.algebra.tile import Tile

IN_CACHE = 1 << 16  # numbers of a weight that are worked on at once
NEAREST = 0.499  # how far, in steps, a weight may lie from its code and still be rounded to it


def round_with_offsets(
    W_ok: Tensor, V_ok: Tensor, s_ag: Tensor, z_ag: Tensor | None, spec: Spec
) -> tuple[Tensor, Tensor]:
    """W' in fp32, differentiable in V, s and z, and its codes in the dtype of the spec's.

    A weight of 0, as a mask leaves it, has no offset.

    Args:
        W_ok: [..., o, k] in fp32.
        V_ok: of the same shape.
        s_ag: [..., a, g] in fp32.
        z_ag: the same, or None where there is no zero point.
        spec: the grid.
    """
    return _Rounded.apply(W_ok, V_ok, s_ag, z_ag, spec)


def nearest_rounding_to(
    codes_ok: Tensor,
    W_ok: Tensor,
    s_ag: Tensor,
    z_ag: Tensor | None,
    spec: Spec,
    reach: float = NEAREST,
) -> Tensor:
    """The weight nearest to W within reach of these codes, in steps, in fp32. It rounds to them."""
    W_agn, codes_agn = _split(spec.tile, W_ok), _split(spec.tile, codes_ok)
    near = torch.empty_like(W_agn)
    for part, s, z in _parts(W_agn, s_ag, z_ag):
        codes = codes_agn[part].float()
        room = reach * unit(codes, spec) / 2 if isinstance(spec, Float) else reach
        x = (W_agn[part] / s).add_(z).clamp_(codes - room, codes + room)
        torch.mul(x.sub_(z), s, out=near[part])
    return _joined(spec.tile, near, W_ok.shape)


def unit(x: Tensor, spec: Spec) -> Tensor | float:
    """From one code to the next around x: 1 for integers, for floats by their exponent."""
    if not isinstance(spec, Float):
        return 1.0
    least = 1 - (2 ** (spec.exponent - 1) - 1)  # the exponent of subnormal numbers
    exponent = (x.abs().clamp_max(spec.max).frexp().exponent - 1).clamp_min(least)
    return torch.exp2((exponent - spec.mantissa).float())


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, W_ok: Tensor, V_ok: Tensor, s_ag: Tensor, z_ag: Tensor | None, spec: Spec
    ) -> tuple[Tensor, Tensor]:
        ctx.spec = spec
        ctx.save_for_backward(W_ok, V_ok, s_ag, z_ag)
        W_agn, V_agn = _split(spec.tile, W_ok), _split(spec.tile, V_ok)
        made = torch.empty_like(W_agn)
        codes = torch.empty_like(W_agn, dtype=spec.code_dtype)
        for part, s, z in _parts(W_agn, s_ag, z_ag):
            x, _ = _among_codes(W_agn[part], V_agn[part], s, z, spec)
            codes[part] = spec.nearest_(x)
            torch.mul(x.sub_(z), s, out=made[part])
        codes_ok = _joined(spec.tile, codes, W_ok.shape)
        ctx.mark_non_differentiable(codes_ok)
        return _joined(spec.tile, made, W_ok.shape), codes_ok

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        W_ok, V_ok, s_ag, z_ag = ctx.saved_tensors
        spec, beyond = ctx.spec, _beyond(ctx.spec)
        W_agn, V_agn, G_agn = (_split(spec.tile, t) for t in (W_ok, V_ok, gradients[0]))
        of_V = torch.empty_like(W_agn)
        of_s, of_z = [], []
        for part, s, z in _parts(W_agn, s_ag, z_ag):
            x, u = _among_codes(W_agn[part], V_agn[part], s, z, spec)
            through = G_agn[part] * s
            inside = torch.ops.aten.hardtanh_backward(through, x, *beyond)
            of_z.append(inside.sum(-1) - through.sum(-1))
            in_steps = spec.nearest_(x).sub_(z).mul_(G_agn[part])
            of_s.append(in_steps.sum(-1) - (W_agn[part] / s).mul_(inside).sum(-1) / s[..., 0])
            torch.mul(_but_zeros(inside, W_agn[part]), u, out=of_V[part])
        return (
            None,
            _joined(spec.tile, of_V, W_ok.shape),
            torch.cat(of_s).view_as(s_ag),
            None if z_ag is None else torch.cat(of_z).view_as(z_ag),
            None,
        )


def _among_codes(
    W_agn: Tensor, V_agn: Tensor, s: Tensor, z: Tensor | float, spec: Spec
) -> tuple[Tensor, Tensor | float]:
    """x, and u."""
    x = (W_agn / s).add_(z)
    u = unit(x, spec)
    return x.add_(_but_zeros(V_agn, W_agn).mul_(u)), u


def _but_zeros(x: Tensor, W: Tensor) -> Tensor:
    """x, and 0 where W is."""
    # masked_fill takes numbers one by one, this many at once
    return torch.ops.aten.threshold_backward(x, W.abs(), 0)


def _beyond(spec: Spec) -> list[float]:
    """The numbers of fp32 next to the ends of a grid, beyond them."""
    ends = (spec.qmin, spec.qmax) if isinstance(spec, Int) else (-spec.max, spec.max)
    ways = torch.tensor([-math.inf, math.inf], dtype=torch.float32)
    return torch.tensor(ends, dtype=torch.float32).nextafter(ways).tolist()


# ------------------------------------------------------------------ a few rows at a time
def _parts(
    x_agn: Tensor, s_ag: Tensor, z_ag: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | float]]:
    """Rows of tiles [a, g, n] in parts of about `IN_CACHE` numbers, with their scales and zero
    points [a, g, 1]."""
    a, g, n = x_agn.shape
    s = s_ag.reshape(a, g, 1)
    z = None if z_ag is None else z_ag.reshape(a, g, 1)
    count = max(1, IN_CACHE // (g * n))
    for first in range(0, a, count):
        part = slice(first, first + count)
        yield part, s[part], 0.0 if z is None else z[part]


def _split(tile: Tile, x_ok: Tensor) -> Tensor:
    """The tiles [a, g, n] of a weight, those of all experts one below the other."""
    return tile.split(x_ok).flatten(0, -3)


def _joined(tile: Tile, x_agn: Tensor, shape: torch.Size) -> Tensor:
    rows, cols = tile.scales_shape(shape)[-2:]
    return tile.join(x_agn.view(*shape[:-2], rows, cols, x_agn.shape[-1]), shape)
