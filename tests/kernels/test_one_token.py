"""Attention of one token on a CPU: the formula, and bits of a row's own tokens alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.lowering.around.attention import attention, in_torch
from qlab_kernels.one_token import DTYPES, PATHS, attend, takes, why_not

few = settings(max_examples=25)
SHAPES = st.tuples(
    st.integers(1, 3), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3, 4, 7, 8])
)
CHANNELS = st.sampled_from([1, 8, 16, 33, 48, 64])
LENGTHS = st.integers(1, 70)


@pytest.fixture(autouse=True, scope="module")
def loaded():
    assert why_not() is None


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def case(shape, d, e, length, dtype, seed):
    """q, keys and values that lie as a cache gives them, and a mask in which every row reads its
    first position."""
    b, h, g = shape
    k, v = (
        normal(b, length, h, n, seed=seed + i).to(dtype).transpose(1, 2)
        for i, n in enumerate((d, e))
    )
    mask = normal(b, 1, 1, length, seed=seed + 2) > -0.5
    mask[..., 0] = True
    return normal(b, h, g, d, seed=seed + 3) / math.sqrt(d), k, v, mask


@few
@given(shape=SHAPES, d=CHANNELS, e=CHANNELS, length=LENGTHS, dtype=st.sampled_from(DTYPES))
def test_it_is_the_formula_on_every_path(shape, d, e, length, dtype):
    q, k, v, mask = case(shape, d, e, length, dtype, seed=length)
    exact = in_torch(q.double(), k.double(), v.double(), mask)
    results = [attend(q, k, v, mask, path) for path in PATHS]
    torch.testing.assert_close(results[0].double(), exact.double(), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(result, results[0]) for result in results)
    everywhere = torch.ones_like(mask)
    assert torch.equal(attend(q, k, v, None), attend(q, k, v, everywhere))


@few
@given(
    shape=SHAPES, d=CHANNELS, length=LENGTHS, dtype=st.sampled_from(DTYPES), at=st.integers(0, 2)
)
def test_the_bits_of_a_row_are_those_of_the_positions_that_it_reads(shape, d, length, dtype, at):
    """Whatever lies at the others, behind the last one and in other rows."""
    q, k, v, mask = case(shape, d, d, length, dtype, seed=d)
    row = slice(at % shape[0], at % shape[0] + 1)
    together = attend(q, k, v, mask)[row]
    unread = ~mask[:, 0, 0, None, :, None]
    k, v = (t.masked_fill(unread, math.nan) for t in (k, v))
    assert torch.equal(attend(q, k, v, mask)[row], together)
    end = int(mask[row].nonzero()[:, -1].max()) + 1
    alone = attend(q[row], k[row, :, :end], v[row, :, :end], mask[row, ..., :end])
    assert torch.equal(alone, together)


def test_the_bits_do_not_depend_on_threads():
    q, k, v, mask = case((4, 8, 4), 64, 64, 600, torch.bfloat16, seed=0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(attend(q, k, v, mask))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v, mask = case((1, 1, 2), 16, 16, 40, torch.float32, seed=1)
    exact = in_torch(300 * q.double(), k.double(), v.double(), mask)
    torch.testing.assert_close(attend(300 * q, k, v, mask).double(), exact, rtol=1e-4, atol=1e-4)
    nothing = torch.zeros_like(mask)
    assert not attend(q, k, v, nothing).any()


def test_what_it_does_not_read_is_left_to_torch():
    _, k, v, mask = case((2, 2, 1), 16, 16, 12, torch.float32, seed=3)
    assert takes(k, v, mask) and takes(k, v, None)
    assert not takes(k.half(), v.half(), mask)
    assert not takes(k.mT.contiguous().mT, v, mask)
    assert not takes(k, v, torch.zeros(2, 1, 1, 12, dtype=torch.float32))
    assert not takes(k, v, mask.expand(-1, 2, -1, -1))
    assert not takes(k.to("meta"), v.to("meta"), None)


@pytest.mark.parametrize("mask", ["bool", "added", None])
def test_a_model_gets_what_torch_computes(mask, monkeypatch):
    q, k, v, read = case((2, 2, 3), 16, 16, 12, torch.float32, seed=4)
    given = {"bool": read, "added": torch.where(read, 0.0, -1e30), None: None}[mask]
    query = q.flatten(1, 2)[:, :, None]
    y, _ = attention(torch.nn.Identity(), query, k, v, given, scaling=0.5)
    expected = in_torch(0.5 * q, k, v, given).flatten(1, 2)[:, None]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    learning = query.clone().requires_grad_()
    attention(torch.nn.Identity(), learning, k, v, given)[0].sum().backward()
    assert learning.grad.abs().sum() > 0


@few
@given(shape=SHAPES, d=CHANNELS, length=LENGTHS, dtype=st.sampled_from(DTYPES))
def test_keys_in_slots_give_the_bits_of_keys_in_rows(shape, d, length, dtype):
    b, h, _ = shape
    q, _, _, mask = case(shape, d, d, length, dtype, seed=5)
    slots = [normal(2 * length + 1, h, d, seed=i).to(dtype) for i in (6, 7)]
    at = torch.stack(
        [
            torch.randperm(2 * length + 1, generator=torch.Generator().manual_seed(i))
            for i in range(b)
        ]
    )
    at = at[:, :length].contiguous()
    rows = [t[at].transpose(1, 2) for t in slots]
    for path in range(len(PATHS)):
        in_place = torch.ops.qlab.one_token(q, *slots, at, mask, path)
        assert torch.equal(in_place, attend(q, *rows, mask, PATHS[path]))


def test_the_operator_is_torchs():
    assert why_not() is None
    q, k, v, mask = case((2, 2, 3), 16, 8, 12, torch.bfloat16, seed=4)
    arguments = q, k, v, torch.empty(0, dtype=torch.int64), mask, 0
    torch.library.opcheck(torch.ops.qlab.one_token, arguments)
