"""What every codec's tests share: leaves of all codes, bitwise comparison, words as people write them."""

import torch

from qlab.qtensor import QTensor


def hexes(words):
    return " ".join(f"{word & 0xFFFFFFFF:08x}" for word in words.flatten().tolist())


def random_qtensor(spec, o, k, seed=0):
    """Every code of the grid, scales of both signs, in the spec's scale dtype."""
    generator = torch.Generator().manual_seed(seed)
    grid = spec.tile.scales_shape((o, k))
    codes = lambda *shape: torch.randint(spec.qmin, spec.qmax + 1, shape, generator=generator, dtype=torch.int8)
    scales = torch.randn(grid, generator=generator).to(spec.scale_dtype)
    return QTensor(codes(o, k), scales, None if spec.symmetric else codes(*grid), spec)


def assert_same(a, b):
    assert a.spec == b.spec
    for field in ("codes", "scales", "zeros"):
        x, y = getattr(a, field), getattr(b, field)
        assert x is y is None or (x.dtype == y.dtype and torch.equal(x, y)), field
