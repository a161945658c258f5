"""Hadamard matrices H [n, n] of +-1 with H H^T = n I, of powers of two and of many other orders.

H_2n = [[H, H], [H, -H]] (Sylvester) doubles an order. Paley's two constructions (1933) give
n = q + 1 for primes q = 3 mod 4, and n = 2 (q + 1) for primes q = 1 mod 4, from which numbers are
squares modulo q.
"""

from functools import lru_cache

import torch
from torch import Tensor

from qlab.errors import QlabError

MOST = 4096  # channels that one matrix turns at run time


def is_order(n: int) -> bool:
    """Whether `hadamard` has a matrix of this size."""
    return _core(n) is not None


def largest_order(k: int, most: int = MOST) -> int:
    """The largest order up to `most` that divides k: blocks of so many channels are turned."""
    return max(n for n in range(1, min(k, most) + 1) if k % n == 0 and is_order(n))


@lru_cache(maxsize=8)
def hadamard(n: int) -> Tensor:
    """A Hadamard matrix [n, n] of +-1 in float64; refuses sizes of which none is known here."""
    core = _core(n)
    if core is None:
        raise QlabError(
            f"there is no Hadamard matrix of size {n} here; use blocks of "
            f"{largest_order(n) if n > 0 else 1}, the largest size that divides it and has one"
        )
    H = _paley(core)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def random_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """diag(s) H / sqrt(n) with random signs s: an orthogonal matrix [n, n] in float32. For sizes
    without a Hadamard matrix, blocks of the largest that divides them."""
    signs = torch.randint(2, (n, 1), generator=generator).double() * 2 - 1
    m = largest_order(n, most=n)
    blocks = torch.block_diag(*[hadamard(m)] * (n // m))
    return (signs * blocks / m**0.5).float()


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [n, n] in float32, drawn evenly from all of them (Haar)."""
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (Q * R.diagonal().sign()).float()


def _core(n: int) -> int | None:
    """The smallest order of which n is a power of two times, 1 or one of Paley's; None for no
    order."""
    halves = [n >> i for i in range(max(n, 1).bit_length()) if n > 0 and n % (1 << i) == 0]
    return next((m for m in reversed(halves) if m == 1 or _primes_of(m) != (None, None)), None)


def _primes_of(n: int) -> tuple[int | None, int | None]:
    """The primes q with which Paley's first and second construction give n."""
    first, second = n - 1, n // 2 - 1
    return (
        first if first % 4 == 3 and _is_prime(first) else None,
        second if n % 4 == 0 and second % 4 == 1 and _is_prime(second) else None,
    )


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def _paley(n: int) -> Tensor:
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    first, second = _primes_of(n)
    q = first or second or 0
    i = torch.arange(q)
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[i * i % q] = 1.0
    character[0] = 0.0
    border = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    border[0, 1:] = 1
    border[1:, 0] = -1 if first else 1
    border[1:, 1:] = character[(i[:, None] - i) % q]
    identity = torch.eye(q + 1, dtype=torch.float64)
    if first:
        return identity + border
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(border, two) + torch.kron(identity, other)
