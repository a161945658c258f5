"""A basis in which rounded keys cost scores least.

    q k^T = (q M^-T)(k M)^T  for every invertible M

Rounding k M with steps that follow its range errs by e with E e^T e ~ tr(M^T K M) I, so that scores
err by E (q M^-T e^T)^2 ~ tr(M^T K M) tr(M^-1 Q M^-T), with K and Q the second moments of keys and
queries. The least that this can be is (tr (K^1/2 Q K^1/2)^1/2)^2, reached by

    M = K^-1/2 (K^1/2 Q K^1/2)^1/4

A Hadamard matrix behind it makes channels alike.
"""

import math

import torch
from torch import Tensor

SHARE = 0.2  # of a second moment that is shrunk to a multiple of I, for it comes of few tokens


def balance(k_nd: Tensor, q_nd: Tensor) -> tuple[Tensor, Tensor]:
    """(M, M^-T) [d, d] in fp32. The rows are keys and queries of heads that are multiplied."""
    K, Q = _moment(k_nd), _moment(q_nd)
    root, inverse = _power(K, 0.5), _power(K, -0.5)
    A = root @ Q @ root
    return (inverse @ _power(A, 0.25)).float(), (root @ _power(A, -0.25)).float()


def _moment(x_nd: Tensor) -> Tensor:
    """The second moment [d, d] in fp64, divided by the mean of its diagonal and shrunk to I; I
    where that mean is 0 or not finite."""
    S = x_nd.double().mT @ x_nd.double() / len(x_nd)
    mean = S.diagonal().mean()
    eye = torch.eye(len(S), dtype=S.dtype, device=S.device)
    return (1 - SHARE) * S / mean + SHARE * eye if 0 < mean < math.inf else eye


def _power(S: Tensor, exponent: float) -> Tensor:
    """S^exponent of a positive definite S."""
    w, V = torch.linalg.eigh(S)
    return (V * w**exponent) @ V.mT
