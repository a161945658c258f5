"""Keys and values as codes by the kernel of a CPU: bit for bit those of torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qlab.algebra.online import QuantizeClipped, QuantizeInput
from qlab.algebra.spec import Float, Int
from qlab.algebra.tile import Tile
from qlab.lowering.around import coded_tokens
from qlab.lowering.around.coded_tokens import Coder
from qlab.lowering.around.inputs import RoundedInput
from qlab_kernels.capability import KernelError
from qlab_kernels.code_tokens import DTYPES, OPERATOR, why_not

SIZES = st.sampled_from([(1, 7), (2, 8), (3, 64), (4, 33), (1, 96)])  # heads, channels of one
CPU = torch.device("cpu")


@st.composite
def specs(draw, channels):
    """What is rounded with scales of the tokens: of all heads, of a head or of half of one."""
    cols = [None, channels, *([channels // 2] if channels % 2 == 0 else [])]
    tile, scale = Tile(1, draw(st.sampled_from(cols))), draw(st.sampled_from([None, *DTYPES]))
    if draw(st.booleans()):
        return Float(4, 3, tile, scale_dtype=scale)
    return Int(draw(st.integers(2, 8)), tile, draw(st.booleans()), scale_dtype=scale)


@st.composite
def roundings(draw, heads, channels):
    if draw(st.booleans()):
        share = draw(st.sampled_from([1.0, 0.95, 0.5]))
        spec = draw(specs(channels))
        return QuantizeInput(spec) if share == 1 else QuantizeClipped(spec, share)
    # fixed beforehand, of all heads or of each
    cols, symmetric = draw(st.sampled_from([None, channels])), draw(st.booleans())
    scales = torch.full((1, heads if cols else 1), 0.01, dtype=torch.float32)
    scales *= torch.arange(1, 1 + scales.shape[1], dtype=torch.float32)
    if draw(st.booleans()):
        return QuantizeInput(Float(4, 3, Tile(None, cols)), scales)
    spec = Int(draw(st.integers(2, 8)), Tile(None, cols), symmetric)
    zeros = None if symmetric else torch.ones(scales.shape, dtype=torch.int8)
    return QuantizeInput(spec, scales, zeros)


@st.composite
def cases(draw):
    """Tokens [b, h, n, d] with rows of zeros, of one sign and of numbers between codes, and how
    they are rounded."""
    heads, channels = draw(SIZES)
    drawn = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(
        draw(st.integers(1, 2)), heads, 4, channels, generator=drawn, dtype=torch.float32
    )
    x[:, :, 1] = 0
    x[:, :, 2] = x[:, :, 2].abs()
    x[:, :, 3] = (2 * x[:, :, 3]).round() / 2
    x *= draw(st.sampled_from([1e-9, 1e-4, 1.0, 300.0]))
    return x.to(draw(st.sampled_from(DTYPES))), draw(roundings(heads, channels))


def written(rounding, x):
    return Coder(nn.ModuleList([RoundedInput(rounding, CPU)]), x.shape[-1]).written(x)


def written_by_torch(rounding, x):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coded_tokens, "why_not", lambda: "there is none")
        return written(rounding, x)


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@settings(max_examples=200)
@given(cases())
def test_codes_scales_and_zero_points_are_those_of_torch(case):
    x, rounding = case
    made, expected = written(rounding, x), written_by_torch(rounding, x)
    assert len(made) == len(expected) and all(map(same_bits, made, expected))


def test_the_kernel_is_what_codes(monkeypatch):
    def torchs(*args):
        raise AssertionError("coded by torch")

    monkeypatch.setattr(coded_tokens, "code_tokens", torchs)
    assert why_not() is None
    x = torch.ones(1, 2, 3, 8, dtype=torch.bfloat16)
    written(QuantizeInput(Int(4, Tile(1, 8), symmetric=False)), x)
    with pytest.raises(AssertionError, match="by torch"):  # what wants a gradient
        written(QuantizeInput(Int(4, Tile(1, 8))), x.requires_grad_())


def test_8_bit_floats_tell_what_is_no_number():
    x = torch.tensor([1, math.nan, 3, math.inf], dtype=torch.float32).view(1, 2, 1, 2)
    scales = torch.tensor([[1, 8], [0.5, 8]], dtype=torch.float32)[:, 0][None]  # not side by side
    rounding = QuantizeInput(Float(4, 3, Tile(None, 2)), scales)
    [made], [expected] = written(rounding, x), written_by_torch(rounding, x)
    assert same_bits(made, expected)
    assert made.view(torch.float8_e4m3fn).isnan().flatten().tolist() == [False, True, False, False]


def test_scales_of_another_number_of_heads_are_refused():
    scales = torch.ones(1, 3, dtype=torch.float32)
    with pytest.raises(KernelError, match="3 scales are neither one nor 2, as heads are"):
        written(
            QuantizeInput(Float(4, 3, Tile(None, 2)), scales),
            torch.ones((1, 2, 1, 2), dtype=torch.float32),
        )


def test_codes_do_not_depend_on_threads():
    x = torch.randn(1, 4, 300, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    rounding, before, results = QuantizeInput(Int(8, Tile(1, 64))), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(written(rounding, x))
    finally:
        torch.set_num_threads(before)
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("bits, in_pairs, is_symmetric", [(4, 1, 0), (8, 0, 1), (0, 0, 1)])
@pytest.mark.parametrize("fixed", [0, 1])
def test_its_fake_has_the_same_shapes(bits, in_pairs, is_symmetric, fixed):
    x = torch.ones(3, 14, dtype=torch.float32)
    scales, none = torch.ones(fixed, dtype=torch.float32), torch.empty(0, dtype=torch.float32)
    args = (x, scales, none, 2, 7, bits, in_pairs, is_symmetric, 1, 1.0)
    torch.library.opcheck(OPERATOR, args, test_utils="test_faketensor")
