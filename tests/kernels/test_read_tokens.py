"""Codes in slots as numbers by the kernel of a CPU: bit for bit those of torch, on every path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_code_tokens import cases, same_bits
from torch import nn

from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import Float, Int
from qlab.algebra.tile import Tile
from qlab.lowering.around import coded_tokens
from qlab.lowering.around.coded_tokens import Coder
from qlab.lowering.around.inputs import RoundedInput
from qlab_kernels import read_tokens as kernel

pytestmark = pytest.mark.processor

if kernel.why_not():
    pytest.skip(f"the kernel is not compiled here: {kernel.why_not()}", allow_module_level=True)

CPU = torch.device("cpu")
dtypes = st.sampled_from(kernel.DTYPES)


def coder_of(rounding, channels):
    return Coder(nn.ModuleList([RoundedInput(rounding, CPU)]), channels)


def by_torch(coder, slots, at_bl, dtype):
    return coder.read([part[at_bl] for part in slots], dtype)


def by_path(coder, slots, at_bl, dtype, path):
    parts = coder._parts(slots, (1, -1, 1))
    form = {"channels": coder.of_head, "is_float": coder.is_float, "path": path}
    return kernel.read(*parts, at_bl, dtype, **form).transpose(1, 2)


@settings(max_examples=200)
@given(cases(), dtypes, st.integers(0, 2**16))
def test_numbers_are_those_of_torch_on_every_path(case, dtype, seed):
    x, rounding = case
    coder = coder_of(rounding, x.shape[-1])
    slots = coder.written(x)
    drawn = torch.Generator().manual_seed(seed)
    at_bl = torch.randint(0, len(slots[0]), (2, 5), generator=drawn, dtype=torch.int64)
    expected = by_torch(coder, slots, at_bl, dtype)
    for path in kernel.supported():
        made = by_path(coder, slots, at_bl, dtype, path)
        assert same_bits(made, expected) and made.stride() == expected.stride(), path


@pytest.mark.parametrize("path", kernel.supported())
def test_every_byte_is_the_number_that_torch_reads(path):
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(1, 1, 256)
    at, scale = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), 0.3, dtype=torch.float32)
    for spec, codes in ((Float(4, 3, Tile(None, None)), every), (Int(8, Tile(None, None)), every)):
        coder = coder_of(QuantizeInput(spec, scale), 256)
        codes = codes if coder.is_float else codes.view(torch.int8)
        for dtype in kernel.DTYPES:
            made, expected = (
                by_path(coder, [codes], at, dtype, path),
                by_torch(coder, [codes], at, dtype),
            )
            torch.testing.assert_close(made, expected, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(made.signbit()[~made.isnan()], expected.signbit()[~made.isnan()])


def test_the_kernel_is_what_reads(monkeypatch):
    coder = coder_of(QuantizeInput(Int(4, Tile(1, 8), symmetric=False)), 8)
    slots = coder.written(torch.ones(1, 2, 3, 8, dtype=torch.bfloat16))
    at = torch.tensor([[2, 0]])
    expected = {dtype: by_torch(coder, slots, at, dtype) for dtype in (*kernel.DTYPES, torch.half)}

    def torchs(*args):
        raise AssertionError("read by torch")

    monkeypatch.setattr(coded_tokens, "decoded", torchs)
    for dtype in kernel.DTYPES:
        assert torch.equal(coder.read_at(slots, at, dtype), expected[dtype])
    with pytest.raises(AssertionError, match="by torch"):  # a dtype that it does not write
        coder.read_at(slots, at, torch.half)


def test_numbers_do_not_depend_on_threads():
    x = torch.randn(1, 4, 300, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    coder = coder_of(QuantizeInput(Int(4, Tile(1, 32))), 64)
    slots, at = coder.written(x), torch.arange(300, dtype=torch.int64).flip(0)[None]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(coder.read_at(slots, at, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert same_bits(*results)


@pytest.mark.parametrize("is_half", [0, 1])
@pytest.mark.parametrize("zeros", [0, 1])
def test_its_fake_has_the_same_shapes(is_half, zeros):
    codes, at = torch.zeros(3, 2, 4, dtype=torch.uint8), torch.tensor([[0, 2, 1]])
    scales = torch.ones(3, 2, 1, dtype=torch.float16)
    none = torch.zeros(3 * zeros, 2, 1, dtype=torch.int8)
    args = (codes, scales, none, at, 7, 0, is_half, 0)
    torch.library.opcheck(kernel.OPERATOR, args, test_utils="test_faketensor")
