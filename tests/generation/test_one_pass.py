"""The kernel of draws gives the reference's tokens, or says that it cannot."""

import math
from array import array

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import qlab_kernels.draw as kernel
from qlab.generation import one_pass
from qlab.generation.drawing import draw, in_torch, prepare
from qlab.generation.noise import BLOCK, noise
from qlab.generation.sampling import Drawing, Sampling

VALUES = {
    "temperature": st.sampled_from([0.0, 1e-3, 0.3, 0.7, 1.0, 5.0, 100.0]),
    "top_k": st.sampled_from([0, 1, 2, 7, 50, 300, 600, 2500, 5000]),
    "top_p": st.sampled_from([1.0, 1.0, 0.95, 0.5, 1e-3, 1e-300, 1 - 1e-9]),
    "min_p": st.sampled_from([0.0, 0.0, 1e-30, 0.01, 0.3, 1.0]),
    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.5]),
    "presence_penalty": st.sampled_from([0.0, 0.7, -3.0]),
    "frequency_penalty": st.sampled_from([0.0, 0.1, 2.0]),
    "logit_bias": st.sampled_from([{}, {0: 3.3, 1: -100.0}]),
    "min_tokens": st.sampled_from([0, 9]),
}
SAMPLINGS = st.builds(Sampling, stop_ids=st.just((0, 1)), **VALUES)


def logits(size, scale, step, dtype, seed, rows=1):
    """Of which many are equal, where they are multiples of a step."""
    x = scale * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).float()
    return ((x / step).round() * step if step else x).to(dtype)


def drawings(samplings, size, first=0):
    """Requests of tokens of which some come twice."""
    return [
        Drawing(
            sampling=sampling,
            prompt=[1 % size, size - 1],
            new=array("q", [i % size for i in (2, 5, 2)]),
            seed=first + i,
        )
        for i, sampling in enumerate(samplings)
    ]


@settings(max_examples=150)
@given(
    samplings=st.lists(SAMPLINGS, min_size=1, max_size=4),
    size=st.sampled_from([2, 17, 512, 513, 3000, 5003]),
    scale=st.sampled_from([1e-3, 1.0, 4.0, 1e3]),
    step=st.sampled_from([0, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**40),
)
@example([Sampling()] * 3, 2, 1e-3, 0.5, torch.float32, 0)
def test_the_token_is_the_references(samplings, size, scale, step, dtype, seed):
    x = logits(size, scale, step, dtype, seed, len(samplings))
    asked = drawings(samplings, size, seed)
    expected = in_torch(x, asked)
    assert [drawn.token for drawn in draw(x, asked)] == expected
    assert one_pass.takes(x) == (dtype != torch.float16)
    for path in kernel.supported() if one_pass.takes(x) else ():
        pairs = zip(one_pass.tokens(x, asked, path), expected)
        assert all(token in (None, reference) for token, reference in pairs)


def test_many_tokens_that_are_unlikely_come_as_often_as_one_that_is_likely():
    size, bits = 2**18, 18
    x = torch.full((1, size), -bits * math.log(2), dtype=torch.float32)
    x[0, 0] = 0
    asked = drawings([Sampling()] * 12, size)
    found = one_pass.tokens(x.expand(12, -1), asked)
    assert found == in_torch(x.expand(12, -1), asked) and 3 < found.count(0) < 9


@pytest.mark.parametrize("path", kernel.supported())
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 40},
        {"top_k": 2000},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"top_p": 0.5, "top_k": 600},
        {"top_p": 0.9, "min_p": 0.3},
    ],
)
def test_the_reference_is_hardly_ever_asked(path, fields):
    x = logits(5003, 3.0, 0, torch.float32, 1, rows=50)
    asked = [drawings([Sampling(**fields)] * 50, 5003, first) for first in range(0, 500, 50)]
    found = [token for of_rows in asked for token in one_pass.tokens(x, of_rows, path)]
    expected = [token for of_rows in asked for token in in_torch(x, of_rows)]
    assert sum(token != other for token, other in zip(found, expected)) == found.count(None) <= 5


@pytest.mark.parametrize(
    "fields, x",
    [
        ({}, [math.nan, 1, 2]),
        ({"temperature": 0}, [1, math.nan, 2]),
        ({}, [math.inf, 1, 2]),
        ({}, [-math.inf] * 3),
        ({"top_k": 2}, [2, 1 + 2**-23, 1]),
        ({"min_p": 0.5}, [math.log(2), 0, 2**-30]),
        ({"top_p": 0.5}, [1e-7, 0, 0]),
        ({"temperature": 1e-40}, [1, 2, 3]),
    ],
)
def test_where_a_token_hangs_on_a_rounding_the_reference_says(fields, x):
    asked = drawings([Sampling(**fields)], 3)
    rows = torch.tensor([x], dtype=torch.float32)
    assert one_pass.tokens(rows, asked) == [None]
    assert [drawn.token for drawn in draw(rows, asked)] == in_torch(rows, asked)


def test_of_scores_that_are_equal_but_for_a_rounding_the_reference_takes_one():
    asked = drawings([Sampling()], 3, first=1)
    x = -noise(1 + BLOCK, [1], [asked[0].noise_name(0)])[:, 1:4]
    assert one_pass.tokens(x, asked) == [None]


@pytest.mark.parametrize("fields", [{"presence_penalty": 1}, {"logit_bias": {9: 1.0}}])
def test_a_token_outside_the_logits_is_not_written_to(fields):
    asked = [Drawing(sampling=Sampling(**fields), prompt=[9], new=[-1], seed=0)]
    assert one_pass.tokens(torch.zeros(1, 4, dtype=torch.float32), asked) == [None]


def test_where_the_kernel_is_not_there_torch_draws_and_a_warning_says_so(monkeypatch):
    x, asked = logits(600, 1.0, 0, torch.float32, 2), drawings([Sampling()], 600)
    expected = draw(x, asked)
    monkeypatch.setattr(kernel, "why_not", lambda: "there is no compiler")
    with pytest.warns(UserWarning, match=r"draws of tokens are slow: there is no compiler"):
        prepare(x.device)
    assert not one_pass.takes(x) and draw(x, asked) == expected
