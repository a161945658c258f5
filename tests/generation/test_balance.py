"""A basis for rounded keys changes no score, and costs what no other basis costs less than."""

import pytest
import torch

from qlab.generation.balance import SHARE, balance


def rows(seed, n=200, d=12):
    """Of channels that are unlike and go together."""
    seeded = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=seeded, dtype=torch.float32)
    scales = torch.logspace(-1.5, 1, d, dtype=torch.float32)
    return torch.randn(n, d, generator=seeded, dtype=torch.float32) @ mix * scales


def shrunk(x):
    S = x.double().mT @ x.double()
    S /= S.diagonal().mean()
    return (1 - SHARE) * S + SHARE * torch.eye(len(S), dtype=S.dtype)


@pytest.mark.parametrize("seed", range(5))
def test_scores_stay_and_their_error_is_the_least(seed):
    k, q = rows(seed), rows(seed + 100)
    M, inverse = balance(k, q)
    scores = q @ k.mT
    assert ((q @ inverse) @ (k @ M).mT - scores).norm() < 1e-5 * scores.norm()
    K, Q = shrunk(k), shrunk(q)
    cost = lambda M: (M.mT @ K @ M).trace() * (M.inverse() @ Q @ M.inverse().mT).trace()
    bound = torch.linalg.eigvals(K @ Q).real.clamp(min=0).sqrt().sum().square()
    best = cost(M.double())
    torch.testing.assert_close(best, bound, rtol=1e-4, atol=0.0)
    assert best < K.trace() * Q.trace()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_rows_that_say_nothing_leave_the_basis_as_it_is(value):
    M, inverse = balance(*[torch.full((4, 6), value, dtype=torch.float32)] * 2)
    eye = torch.eye(6, dtype=torch.float32)
    assert torch.allclose(M, eye) and torch.allclose(inverse, eye)
