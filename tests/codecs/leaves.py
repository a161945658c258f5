"""What every codec's tests share: leaves of all codes, bitwise comparison, words as people write
them."""

import torch

from qlab.algebra.grid import encode, minmax
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Float


def hexes(words):
    return " ".join(f"{word & 0xFFFFFFFF:08x}" for word in words.flatten().tolist())


def random_qtensor(spec, o, k, seed=0):
    """Every code of the grid, scales of both signs (floats: as a rounding finds them), in the
    spec's scale dtype."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(spec, Float):
        return encode(
            minmax,
            torch.randn(o, k, generator=generator) * torch.rand(o, k, generator=generator) ** 3,
            spec,
        )
    grid = spec.tile.scales_shape((o, k))
    codes = lambda *shape: torch.randint(
        spec.qmin, spec.qmax + 1, shape, generator=generator, dtype=torch.int8
    )
    scales = torch.randn(grid, generator=generator).to(spec.scale_dtype)
    return QTensor(codes(o, k), scales, None if spec.symmetric else codes(*grid), spec)


def assert_same(a, b):
    assert a.spec == b.spec
    for field in ("codes", "scales", "zeros", "outer", "perm"):
        x, y = getattr(a, field), getattr(b, field)
        assert x is y is None or (
            (x.dtype, x.shape) == (y.dtype, y.shape) and torch.equal(bits(x), bits(y))
        ), field


def bits(x):
    """A tensor whose equality is that of bytes: torch compares no 8-bit floats."""
    return (
        x.reshape(x.shape or 1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
        if x.is_floating_point()
        else x
    )
