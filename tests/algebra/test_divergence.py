"""The divergence from a reference: torch's own value and gradient, a few rows at a time."""

import pytest
import torch
import torch.nn.functional as F

from qlab.algebra import divergence
from qlab.algebra.divergence import kl_divergence


@pytest.mark.parametrize("at_once", [1, 20, 1 << 18])
def test_its_value_and_gradient_are_those_of_torch(at_once, monkeypatch):
    monkeypatch.setattr(divergence, "IN_CACHE", at_once)
    source = torch.Generator().manual_seed(0)
    x, y = (3 * torch.randn(6, 7, generator=source, dtype=torch.float32) for _ in range(2))
    x, wide = x.requires_grad_(), x.detach().double().requires_grad_()
    y = y[:5].bfloat16()
    log_p, log_q = y.double().log_softmax(-1), wide[:5].log_softmax(-1)
    expected = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    value = kl_divergence(x, y)
    (2 * value).backward()
    (2 * expected).backward()
    torch.testing.assert_close(value.double(), expected)
    torch.testing.assert_close(x.grad.double(), wide.grad)
