"""Packing is exact: what goes in comes out, nibbles lie where the layouts say, and what does not
fit is refused by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab_kernels import reference
from qlab_kernels.capability import KernelError
from qlab_kernels.layout import LAYOUTS, pack, unpack

GROUP = st.sampled_from([32, 64, 128, 256, 10_000])


def weights(n, k, group, zeros, seed=0, lead=()):
    """Random codes -8..7 with scales and zero points."""
    rng = torch.Generator().manual_seed(seed)
    groups = -(-k // group)
    codes = torch.randint(-8, 8, (*lead, n, k), generator=rng, dtype=torch.int8)
    scales = torch.rand(*lead, n, groups, generator=rng) * 0.1 + 0.01
    return (
        codes,
        scales,
        torch.randint(-8, 8, scales.shape, generator=rng).float() if zeros else None,
    )


@settings(max_examples=60)
@given(
    n=st.integers(1, 200),
    k=st.integers(1, 400),
    group=GROUP,
    zeros=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    experts=st.sampled_from([(), (3,)]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_unpack_inverts_pack(n, k, group, zeros, layout, experts, dtype):
    codes, scales, zero_points = weights(n, k, group, zeros, lead=experts)
    packed = pack(codes, scales, zero_points, group, layout, dtype)
    got_codes, got_scales, got_zeros = unpack(packed)
    assert torch.equal(got_codes, codes) and torch.equal(got_scales, scales.to(dtype))
    assert (got_zeros is None) is (zero_points is None) and (
        zero_points is None or torch.equal(got_zeros, zero_points.to(dtype))
    )
    assert packed.padded_n % 64 == packed.padded_k % packed.group == 0
    assert packed.scales.shape[-2:] == (packed.padded_k // packed.group, packed.padded_n)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_holds_zero_weights(layout):
    packed = pack(
        torch.full((5, 70), 7, dtype=torch.int8), torch.ones(5, 1), None, 70, layout, torch.float16
    )
    # The same bytes, with the padding in sight.
    whole = type(packed)(packed.words, packed.scales, None, 64, 128, 128, layout)
    codes = unpack(whole)[0]
    assert codes[:5, :70].eq(7).all() and codes[5:].eq(0).all() and codes[:, 70:].eq(0).all()


@pytest.mark.parametrize(
    "layout, n, k, byte, high",
    [
        ("rows", 3, 5, 3 * 32 + 2, True),
        # warp 1, r 1, g 2: n = 16 + 8 + 2; k = j*16 + h*8 + t*2 + p with j 3, h 1, t 2, p 1; e =
        # h*4 + r*2 + p = 7, at bit 28
        ("wgmma", 26, 61, ((1 * 8 + 2) * 4 + 2) * 16 + 3 * 4 + 3, True),
        # k = j*32 + t*8 + e with j 1, t 3, e 2; word r*2 + j = 3; e = 2 lies at bit 4
        ("mma2", 26, 58, ((1 * 8 + 2) * 4 + 3) * 16 + 3 * 4 + 0, True),
    ],
)
def test_a_nibble_lies_where_the_layout_says(layout, n, k, byte, high):
    codes = torch.full((64, 64), -8, dtype=torch.int8)
    codes[n, k] = 3
    words = pack(codes, torch.ones(64, 1), None, 64, layout, torch.float16).words.flatten()
    assert words.nonzero().flatten().tolist() == [byte]
    assert words[byte] == (11 << 4 if high else 11)


def test_reference_is_the_formula():
    codes, scales, zeros = weights(7, 96, 32, True)
    packed = pack(codes, scales, zeros, 32, "mma2", torch.float16)
    w = (codes.double().view(7, 3, 32) - zeros[..., None]) * scales.half().double()[..., None]
    assert torch.equal(reference.dequantize(packed, torch.float64), w.view(7, 96))
    x = torch.randn(4, 96, dtype=torch.float64)
    torch.testing.assert_close(reference.int4_mm(x, packed), x @ w.view(7, 96).T)


def test_refusals_name_what_would_work():
    codes, scales, zeros = weights(64, 96, 48, True)
    with pytest.raises(
        KernelError, match=r"groups of 32, 64, 128, 256 or whole rows, not groups of 48"
    ):
        pack(codes, scales, zeros, 48, "mma2", torch.float16)
    with pytest.raises(KernelError, match=r"hold codes -8..7, not .*keep wider codes as int8"):
        pack(codes * 4, scales, None, 48, "mma2", torch.float16)
    with pytest.raises(
        KernelError, match=r"no weight layout 'marlin': there are wgmma, mma2, rows"
    ):
        pack(codes, scales, zeros, 48, "marlin", torch.float16)
    with pytest.raises(KernelError, match=r"need zeros \(64, 2\)"):
        pack(codes, scales, zeros[:1], 48, "mma2", torch.float16)
