"""What is told of tokens: log-probabilities, rounded once, and the likeliest ones in one order."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import qlab_kernels.draw as kernel
from qlab.generation import one_pass
from qlab.generation.drawing import ROWS, draw, told, told_in_torch
from qlab.generation.sampling import Drawing, Drawn, Sampling

ODD = {
    "NaN": [1, math.nan, 2],
    "infinite": [1, math.inf, 2],
    "nothing": [-math.inf] * 3,
}


def spread(x):
    """Numbers of all sizes that fp32 has."""
    return x.sign() * torch.exp2(60 * x).clamp(2.0**-126, 2.0**127)


SHAPES = {
    "flat": lambda x: 1e-3 * x,
    "logits": lambda x: 4 * x,
    "peaked": lambda x: 1e3 * x,
    "ties": lambda x: (2 * x).round() / 2,
    "equal": torch.zeros_like,
    "left out": lambda x: x.masked_fill(x < 1, -math.inf).index_fill(1, torch.tensor([0]), 3.0),
    "masked": lambda x: x.masked_fill(x < 0, torch.finfo(torch.float32).min),
    "spread": spread,
}


def logits(kind, rows, size, dtype, seed):
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return SHAPES[kind](x).to(dtype).contiguous()


def exact(x_v):
    """Log-probabilities in fp64, to the last digits of those near 0."""
    x = x_v.double()
    first = x.argmax()
    others = (x - x.max()).exp()
    others[first] = 0
    return x - x.max() - others.sum().log1p()


def is_rounded(logprob, value):
    """Whether a number of fp32 is one of the two beside a number of fp64, or so near to the nearest
    that the error of an exponential, 3e-12, decides."""
    nearest = torch.tensor(value, dtype=torch.float64).float().item()
    return logprob == nearest or abs(logprob - value) <= (2**-24 + 1e-11) * abs(value)


def places(x_v, count):
    """The greatest first, of equal ones the first."""
    return sorted(range(len(x_v)), key=lambda i: -x_v[i].item())[:count]


@settings(max_examples=80)
@given(
    kind=st.sampled_from(sorted(SHAPES)),
    size=st.sampled_from([1, 2, 17, 511, 513, 3000]),
    counts=st.lists(st.sampled_from([None, 0, 1, 5, 20, 100, 1024]), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**40),
)
@example("peaked", 3000, [1024], torch.bfloat16, 1)
@example("spread", 3000, [1024, 100], torch.float32, 1)
def test_log_probabilities_are_rounded_once_and_the_likeliest_lie_in_order(
    kind, size, counts, dtype, seed
):
    x = logits(kind, len(counts), size, dtype, seed)
    tokens = [(seed + row) % size for row in range(len(counts))]
    asking = [row for row, count in enumerate(counts) if count is not None]
    expected = told_in_torch(x, asking, tokens, counts) if asking else {}
    assert told(x, tokens, counts) == [
        one_pass.told(x, asking, tokens, counts).get(row, Drawn(token=token))
        for row, token in enumerate(tokens)
    ]
    for path in kernel.supported():
        found = one_pass.told(x, asking, tokens, counts, path)
        assert [*found] == asking
        for row in asking:
            values = exact(x[row]).tolist()
            assert is_rounded(found[row].logprob, values[tokens[row]])
            assert all(is_rounded(logprob, values[i]) for i, logprob in found[row].likeliest)
            order = [place for place, _ in found[row].likeliest]
            assert order == [place for place, _ in expected[row].likeliest]
            assert order == places(x[row], counts[row])
            alone = one_pass.told(x[row : row + 1], [0], [tokens[row]], [counts[row]], path)
            assert alone[0] == found[row]


@settings(max_examples=30)
@given(
    kind=st.sampled_from(["flat", "logits", "ties", "left out"]),
    size=st.sampled_from([2, 512, 3000, 20011]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**40),
)
def test_torch_tells_the_same_but_for_the_rounding_of_a_sum(kind, size, dtype, seed):
    x = logits(kind, 2, size, dtype, seed)
    tokens, counts = [seed % size, 0], [20, 3]
    by_kernel, by_torch = (
        tell(x, [0, 1], tokens, counts) for tell in (one_pass.told, told_in_torch)
    )
    for row in (0, 1):
        one, other = by_kernel[row], by_torch[row]
        pairs = [(one.logprob, other.logprob)]
        pairs += [(ours[1], theirs[1]) for ours, theirs in zip(one.likeliest, other.likeliest)]
        bound = (size + 8) * 2.0**-24  # of a sum
        assert all(math.isclose(*pair, rel_tol=2**-22, abs_tol=bound) for pair in pairs)


def test_only_what_was_asked_for_is_told():
    x = torch.tensor([2.0, -2.0, 1.0, 0.5], dtype=torch.float32)
    expected = exact(x).float().tolist()
    drawn, plain, bare = told(x.repeat(3, 1), [2, 1, 3], [2, None, 0])
    assert drawn == Drawn(
        token=2, logprob=expected[2], likeliest=((0, expected[0]), (2, expected[2]))
    )
    assert plain == Drawn(token=1) and bare == Drawn(token=3, logprob=expected[3])


def test_what_is_told_is_of_the_logits_before_penalties_and_filters():
    x = logits("logits", 1, 600, torch.float32, 5)
    sampling = Sampling(
        temperature=0.7, top_k=2, repetition_penalty=2.0, logit_bias={7: -100.0}, logprobs=600
    )
    [drawn] = draw(x, [Drawing(sampling=sampling, prompt=[3], new=[7], seed=0)])
    assert drawn == told(x, [drawn.token], [600])[0]
    assert len(drawn.likeliest) == 600 and dict(drawn.likeliest)[drawn.token] == drawn.logprob


@pytest.mark.parametrize("kind", sorted(ODD))
def test_of_rows_that_are_not_numbers_torch_tells(kind):
    x = torch.tensor([ODD[kind], [0, 1, 2]], dtype=torch.float32)
    assert [*one_pass.told(x, [0, 1], [0, 0], [3, 3])] == [1]
    odd, even = told(x, [0, 0], [3, 3])
    assert math.isnan(odd.logprob) and all(math.isnan(logprob) for _, logprob in odd.likeliest)
    firsts = {"NaN": [1, 2, 0], "infinite": [1, 2, 0], "nothing": [0, 1, 2]}
    assert [place for place, _ in odd.likeliest] == firsts[kind]
    assert even == told(x[1:], [0], [3])[0]


@pytest.mark.parametrize("token", [-1, 3])
def test_of_a_token_outside_the_logits_nothing_is_read(token):
    x = torch.zeros(1, 3, dtype=torch.float32)
    assert one_pass.told(x, [0], [token], [1]) == {}
    with pytest.raises(RuntimeError, match="out of bounds"):
        told(x, [token], [1])


def test_all_rows_of_a_long_prompt_are_told_by_either_way(monkeypatch):
    size = 2 * ROWS + 3
    x = logits("ties", size, 100, torch.float32, 6)
    by_kernel = told(x, [0] * size, [2] * size)
    monkeypatch.setattr(kernel, "why_not", lambda: "there is no compiler")
    by_torch = told(x, [0] * size, [2] * size)
    for one, other in zip(by_kernel, by_torch):
        assert [place for place, _ in one.likeliest] == [place for place, _ in other.likeliest]
        assert math.isclose(one.logprob, other.logprob, rel_tol=1e-6)
