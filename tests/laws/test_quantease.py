"""Coordinate descent on codes and least squares on scales: neither ever raises the loss."""

from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_gptq import SEEDS, on_minmax, plain, second_moment

from qlab.algebra.qtensor import QTensor, dense, round_codes
from qlab.algebra.spec import parse_spec
from qlab.algebra.stats import quadratic
from qlab.methods import obs
from qlab.methods.gptq import act_order, paper_order
from qlab.methods.quantease import descend_codes, refit_scales

orders = st.sampled_from([act_order, paper_order])


def rounded(W, spec):
    scales, zeros = on_minmax(W, spec)
    return QTensor(round_codes(W.double(), scales, zeros, spec), scales, zeros, spec)


def loss(W, H, q):
    return float(quadratic(W.double() - dense(q, torch.float64), H).sum())


@given(plain, SEEDS, orders)
def test_descending_on_the_codes_never_raises_the_loss(problem, seed, order):
    W, spec = problem
    H, q = second_moment(W.shape[1], seed), rounded(W, spec)
    after = descend_codes(W.double(), H, q, order(H), block=4)
    assert loss(W, H, after) <= loss(W, H, q) * (1 + 1e-9)
    assert after.codes.min() >= spec.qmin and after.codes.max() <= spec.qmax


def test_descending_on_the_codes_repairs_what_rounding_alone_does():
    H = second_moment(64, 0)
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    q = rounded(W, parse_spec("int4-g16"))
    assert loss(W, H, descend_codes(W.double(), H, q, act_order(H))) < 0.8 * loss(W, H, q)


@given(plain, SEEDS, orders, st.integers(1, 40), st.integers(1, 40))
def test_sizes_of_blocks_and_spans_change_no_codes(problem, seed, order, block, span):
    W, spec = problem
    H, q = second_moment(W.shape[1], seed), rounded(W, spec)
    one = descend_codes(W.double(), H, q, order(H), block=1).codes
    with patch.object(obs, "SPAN", span):
        other = descend_codes(W.double(), H, q, order(H), block=block).codes
    assert torch.equal(one, other)


@given(plain, orders)
def test_on_white_inputs_rounding_is_the_optimum_already(problem, order):
    W, spec = problem
    H, q = torch.eye(W.shape[1], dtype=torch.float64), rounded(W, spec)
    assert torch.equal(descend_codes(W.double(), H, q, order(H)).codes, q.codes)


@given(plain.filter(lambda p: p[1].tile.rows == 1), SEEDS)
def test_refitting_the_scales_never_raises_the_loss(problem, seed):
    W, spec = problem
    H, q = second_moment(W.shape[1], seed), rounded(W, spec)
    after = refit_scales(W.double(), H, q)
    assert loss(W, H, after) <= loss(W, H, q) * (1 + 1e-9) + 1e-12
    assert torch.equal(after.codes, q.codes)
