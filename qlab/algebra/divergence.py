"""How far predictions of tokens are from a reference's, differentiable, a few rows at a time: what
a row needs stays in a cache, and of all rows logits alone are held.

    KL = mean over l of sum over v of p log(p / q)      dKL / dx = (q - p) / l

Legend: x, y the logits [l, v] of the model and of the reference, q = softmax(x), p = softmax(y).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

IN_CACHE = 1 << 18  # logits that are worked on at once


def kl_divergence(x_lv: Tensor, y_lv: Tensor) -> Tensor:
    """KL(reference || model) in nats per row, computed in fp32.

    Args:
        x_lv: logits of the model, of at least l rows, of which the first l count.
        y_lv: logits of the reference [l, v], to which no gradient goes.
    """
    return _Divergence.apply(x_lv, y_lv.detach())


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_lv: Tensor, y_lv: Tensor) -> Tensor:
        ctx.save_for_backward(x_lv, y_lv)
        sums = []
        for rows in _few_rows(y_lv):
            log_p, log_q = (t[rows].float().log_softmax(-1) for t in (y_lv, x_lv))
            p = log_p.exp()
            sums.append(log_p.sub_(log_q).mul_(p).sum())
        return torch.stack(sums).sum() / len(y_lv)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x_lv, y_lv = ctx.saved_tensors
        gradient = torch.empty_like(x_lv)
        gradient[len(y_lv) :] = 0
        for rows in _few_rows(y_lv):
            q, p = (t[rows].float().softmax(-1) for t in (x_lv, y_lv))
            gradient[rows] = q.sub_(p).mul_(gradients[0] / len(y_lv))
        return gradient, None


def _few_rows(y_lv: Tensor) -> Iterator[slice]:
    """The rows in parts of about `IN_CACHE` numbers."""
    rows, v = y_lv.shape
    count = max(1, IN_CACHE // v)
    for first in range(0, rows, count):
        yield slice(first, min(first + count, rows))
