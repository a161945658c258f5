"""What a few windows of text say of all text: intervals, and tests of differences.

Legend: n windows or tokens.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.random import generator

RESAMPLES = 2000
DRAWS = 500  # of documents, where a figure is no mean of them


def bootstrap(
    values: Tensor, through: Callable[[Tensor], Tensor] = lambda t: t
) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean over windows, seen through a monotone function. Two
    calls of as many windows draw the same ones."""
    shape, seeded = (RESAMPLES, len(values)), generator(0, "bootstrap")
    picks = torch.randint(len(values), shape, generator=seeded)
    means = through(values[picks].mean(1))
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype))
    return float(low), float(high)


def mcnemar(lost: int, gained: int) -> float:
    """The mid-p value of McNemar's test that as many answers turn wrong as turn right.

    Of n = lost + gained answers that changed, k = min(lost, gained) changed the rarer way. Under
    the hypothesis k is Binomial(n, 1/2), and p = 2 P(X <= k) - P(X = k) (Fagerland et al. 2013). It
    takes answers as independent, which tokens of one text are not quite.
    """
    n, k = lost + gained, min(lost, gained)
    if n == 0:
        return 1.0
    x = torch.arange(k + 1, dtype=torch.float64)
    log_ways = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
    chances = (log_ways - n * math.log(2)).exp()
    return min(1.0, float(2 * chances.sum() - chances[-1]))


def quantiles(values: Tensor, shares: Sequence[float]) -> tuple[float, ...]:
    """The smallest values that at least these shares of all values do not exceed."""
    ordered = values.sort().values
    return tuple(float(ordered[max(0, math.ceil(q * len(ordered)) - 1)]) for q in shares)


def holds(interval: Sequence[float], value: float) -> bool:
    """Whether a value lies within an interval, its ends included."""
    return interval[0] <= value <= interval[1]


def resampled(
    aggregate: Callable[[Sequence[Any]], float],
    ours: Sequence[Any],
    theirs: Sequence[Any] | None = None,
) -> tuple[float, float]:
    """95 % percentile bootstrap of aggregate(ours) - aggregate(theirs), documents drawn for both
    alike; without `theirs`, of aggregate(ours)."""
    shape, seeded = (DRAWS, len(ours)), generator(0, "bootstrap")
    picks = torch.randint(len(ours), shape, generator=seeded).tolist()
    drawn = [aggregate([ours[i] for i in pick]) for pick in picks]
    if theirs is not None:
        drawn = [ours - aggregate([theirs[i] for i in pick]) for ours, pick in zip(drawn, picks)]
    low, high = quantiles(torch.tensor(drawn, dtype=torch.float64), (0.025, 0.975))
    return low, high


def paired_shares(lost: int, gained: int, n: int) -> tuple[float, float]:
    """95 % interval of (gained - lost) / n, the difference of two shares of right answers to the
    same n questions.

    Wald's interval with one pseudo-answer that turned wrong and one that turned right (Bonett and
    Price 2012), which holds its level for few questions too (Fagerland et al. 2014) and, unlike a
    bootstrap, does not shrink to a point where no answer changed.
    """
    p_lost, p_gained = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    difference = p_gained - p_lost
    half = 1.959964 * math.sqrt((p_gained + p_lost - difference**2) / (n + 2))
    return max(-1.0, difference - half), min(1.0, difference + half)
