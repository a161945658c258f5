"""Laws of the draw: what the filters keep, that seeds decide, and that a rounding does not."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import refused

from qlab.generation.drawing import change, draw, is_outside, keep, likeliest, noise
from qlab.generation.sampling import Drawing, Sampling

few = settings(max_examples=40)
LOGITS = st.lists(st.integers(-60, 60), min_size=2, max_size=12, unique=True).map(
    lambda row: torch.tensor(row, dtype=torch.float32) / 10
)


def drawing(sampling, prompt=(0,), new=(), seed=0):
    return Drawing(sampling=sampling, prompt=list(prompt), new=list(new), seed=seed)


def kept(logits, sampling):
    """Which tokens the filters keep."""
    e = (logits - logits.max()).exp()[None].clone()
    mass = keep(e, [sampling])[0]
    if sampling.top_p == 1:
        return e[0] > 0
    tokens = range(len(logits))
    inside = torch.tensor([not is_outside(e[0].clone(), torch.tensor(t), mass) for t in tokens])
    return inside & (e[0] > 0)


def one(logits, sampling, **more):
    return draw(logits[None], [drawing(sampling, **more)])[0].token


@few
@given(logits=LOGITS, k=st.integers(1, 12))
def test_top_k_keeps_the_k_likeliest(logits, k):
    tokens = kept(logits, Sampling(top_k=k)).nonzero().flatten().tolist()
    assert {*tokens} == {*logits.topk(min(k, len(logits))).indices.tolist()}


@few
@given(logits=LOGITS, p=st.floats(0.01, 1), k=st.integers(0, 12))
def test_top_p_keeps_the_fewest_that_reach_it_of_what_top_k_keeps(logits, p, k):
    left_out = ~kept(logits, Sampling(top_k=k))
    probabilities = logits.masked_fill(left_out, -math.inf).softmax(-1)
    inside = probabilities[kept(logits, Sampling(top_k=k, top_p=p))]
    assert inside.sum() >= p - 1e-6
    assert len(inside) == 1 or inside.sum() - inside.min() < p + 1e-6
    assert inside.min() >= probabilities.sort(descending=True).values[len(inside) - 1]


def test_a_nucleus_that_fp32_rounds_to_nothing_holds_the_likeliest():
    x = torch.tensor([1, 3, 2], dtype=torch.float32)
    assert kept(x, Sampling(top_p=5e-324)).tolist() == [False, True, False]


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 4.0])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999999, 1.0])
def test_the_nucleus_is_found_in_a_large_vocabulary(scale, p):
    x = scale * torch.randn(5003, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    probabilities = x.bfloat16().double().softmax(-1)
    inside = kept(x.bfloat16().float(), Sampling(top_p=p))
    least = probabilities[inside].min()
    above = probabilities[probabilities > least].sum()
    assert torch.equal(inside, probabilities >= least)
    assert above < p + 1e-6 and probabilities[inside].sum() >= p - 1e-6


@few
@given(logits=LOGITS, share=st.floats(0.001, 1))
def test_min_p_keeps_what_is_likely_beside_the_likeliest(logits, share):
    e = (logits - logits.max()).exp()
    assert torch.equal(kept(logits, Sampling(min_p=share)), e >= share)


def test_rows_keep_what_they_ask_for():
    x = torch.randn(6, 3000, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    asked = [{}, {"top_k": 7}, {"top_p": 0.3}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.5}]
    samplings = [Sampling(**fields) for fields in [*asked, {"top_k": 200, "min_p": 0.01}]]
    e = (x - x.amax(1, True)).exp()
    keep(e, samplings)
    for row, logits, sampling in zip(e, x, samplings):
        assert torch.equal(row > 0, kept(logits, replace(sampling, top_p=1.0)))
    assert (e > 0).sum(1).tolist()[:2] == [3000, 7]
    inside = [kept(logits, sampling) for logits, sampling in zip(x, samplings)]
    for first in range(0, 600, 6):
        drawn = draw(x, [drawing(s, seed=first + i) for i, s in enumerate(samplings)])
        assert all(row[one.token] for row, one in zip(inside, drawn))


@few
@given(size=st.integers(1, 3000), count=st.integers(1, 100), steps=st.integers(1, 40))
def test_the_likeliest_are_the_greatest(size, count, steps):
    x = torch.randint(steps, (2, size), generator=torch.Generator().manual_seed(size)).float()
    assert torch.equal(likeliest(x, count), x.topk(min(count, size)).values)


@few
@given(logits=LOGITS, seed=st.integers(0, 2**40), temperature=st.floats(0.1, 3))
def test_a_draw_is_of_its_seed_alone_and_no_rounding_moves_it(logits, seed, temperature):
    sampling = Sampling(temperature=temperature)
    expected = one(logits, sampling, seed=seed, new=[1])
    others = [drawing(Sampling(temperature=0.7), seed=i) for i in range(3)]
    rows = torch.stack([*logits.flip(0).expand(3, -1), logits])
    drawn = draw(rows, [*others, drawing(sampling, seed=seed, new=[1])])[-1].token
    assert drawn == expected
    of_tokens = noise(1 + 512, [seed], ["token 1"])[0, 1 : 1 + len(logits)]  # of one block
    x = logits / temperature + of_tokens
    assert expected == x.argmax()
    margin = x.topk(2).values.diff().abs().item()
    moved = logits * (1 + 1e-6)
    assert one(moved, sampling, seed=seed, new=[1]) == expected or margin < 1e-4


def test_tokens_come_as_often_as_they_are_likely():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    counts = torch.zeros(4)
    for seed in range(2000):
        counts[one(logits, Sampling(temperature=2), seed=seed)] += 1
    expected = 2000 * (logits / 2).softmax(-1)
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_squared < 16.3  # three degrees of freedom, one in a thousand


def test_blocks_come_as_often_as_they_are_likely():
    logits = torch.full((1500,), -9.0)  # of three blocks
    logits[[0, 600, 601, 1499]] = torch.tensor([1.0, 0.0, 1.0, 2.0])
    counts = dict.fromkeys((0, 600, 601, 1499, "other"), 0)
    for first in range(0, 2000, 100):
        rows = [drawing(Sampling(), seed=seed) for seed in range(first, first + 100)]
        for drawn in draw(logits.expand(100, -1), rows):
            counts[drawn.token if drawn.token in counts else "other"] += 1
    p = logits.softmax(-1)
    expected = {token: 2000 * p[token].item() for token in (0, 600, 601, 1499)}
    expected["other"] = 2000 - sum(expected.values())
    chi_squared = sum((counts[t] - e) ** 2 / e for t, e in expected.items())
    assert chi_squared < 18.5  # four degrees of freedom, one in a thousand


def test_tokens_of_a_nucleus_come_as_often_as_they_are_likely_in_it():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.5])
    sampling = Sampling(top_p=0.75)  # holds three of them
    counts = torch.zeros(5)
    for seed in range(2000):
        counts[one(logits, sampling, seed=seed)] += 1
    inside = torch.tensor([False, True, True, False, True])
    expected = 2000 * logits.masked_fill(~inside, -math.inf).softmax(-1)
    assert torch.equal(counts > 0, inside)
    chi_squared = ((counts - expected) ** 2 / expected)[inside].sum().item()
    assert chi_squared < 13.8  # two degrees of freedom, one in a thousand


def test_penalties_and_biases_are_the_formula():
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5])
    sampling = Sampling(
        temperature=0, repetition_penalty=2, presence_penalty=0.25, frequency_penalty=0.5
    )
    x = logits.repeat(3, 1)
    biased = Sampling(temperature=0, logit_bias={3: 2.0, 1: -1.0})
    penalized = drawing(sampling, prompt=[1], new=[2, 2])
    change(x, [penalized, drawing(Sampling()), drawing(biased)])
    assert x[0].tolist() == [2.0, -4.0, 1.0 / 2 - 0.25 - 2 * 0.5, 0.5]
    assert x[1].equal(logits) and x[2].tolist() == [2.0, -3.0, 1.0, 2.5]
    assert one(logits, Sampling(temperature=0, logit_bias={3: 2.0})) == 3
    early = Sampling(temperature=0, stop_ids=(0,), min_tokens=1)
    assert (one(logits, early), one(logits, early, new=[3])) == (2, 0)


def test_the_first_of_the_greatest_is_taken_at_temperature_0():
    seeded = torch.Generator().manual_seed(4)
    # many are equal, or one alone is the greatest
    x = torch.cat([torch.randint(n, (4, 2000), generator=seeded).float() for n in (5, 10**6)])
    drawn = draw(x, [drawing(Sampling(temperature=0))] * 8)
    assert [one.token for one in drawn] == x.argmax(1).tolist()


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_tokens", 0),
        ("min_tokens", 300),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", math.nan),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("logprobs", -1),
        ("logit_bias", {1: math.nan}),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(name, value):
    shown = next(iter(value.values())) if isinstance(value, dict) else value
    refused(lambda: Sampling(**{name: value}), name, str(shown))


def test_every_token_of_a_seed_has_noise_of_its_own():
    once, again, later, other = noise(
        50, [3, 3, 3, 4], ["token 1", "token 1", "token 2", "token 1"]
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, later) and not torch.equal(once, other)
