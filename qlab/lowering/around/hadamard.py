"""Hadamard matrices at run time in O(n log n).

    M = c diag(s) (H_a (x) ... (x) H_b (x) C) diag(t),  H_2 = [[1, 1], [1, -1]],  (x) Kronecker's

Sylvester's construction makes a matrix of an order n out of a core C of a smaller one. x @ M is
then a product with each factor along an axis of its own: n (a + ... + b + |C|) steps in the place
of n^2. The factors are read off the matrix that a directory holds, and are exact: every sign is
compared.
Source: Sylvester 1867; Paley 1933 for cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlab.algebra.online import rotate
from qlab.lowering.around.hadamard_op import Butterflies, refusal

LARGEST_FACTOR = 32  # several small products take less time than one large one
SMALLEST_ORDER = 256  # below, a product with the matrix itself takes as long


class Dense(nn.Module):
    """x -> x @ M for every n neighbouring channels, with M [n, n] or [b, n, n]."""

    M: Tensor

    def __init__(self, M: Tensor):
        super().__init__()
        self.register_buffer("M", M, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return rotate(x, self.M)


class Hadamard(nn.Module):
    """x -> x @ M for every n neighbouring channels, by the factors of M.

    before, behind: the signs s and t [n]. factors: from the left to the right, c in the first.
    """

    before: Tensor
    behind: Tensor

    def __init__(self, before: Tensor, factors: Sequence[Tensor], behind: Tensor):
        super().__init__()
        self.register_buffer("before", before, persistent=False)
        self.register_buffer("behind", behind, persistent=False)
        self.names = [f"factor_{i}" for i in range(len(factors))]
        for name, factor in zip(self.names, factors, strict=True):
            self.register_buffer(name, factor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, axis = len(self.before), 1
        y = x.to(self.before.dtype).unflatten(-1, (-1, n)) * self.before
        for name in reversed(self.names):
            factor = getattr(self, name)
            size = len(factor)
            # the axis of the last factor is the last one of y; that of the next lies before it
            is_last = axis == 1
            y = y.reshape(-1, size) @ factor if is_last else factor.mT @ y.reshape(-1, size, axis)
            axis *= size
        return (y.reshape(-1, n) * self.behind).reshape(x.shape).to(x.dtype)

    def extra_repr(self) -> str:
        sizes = " x ".join(str(len(getattr(self, name))) for name in self.names)
        return f"{len(self.before)} channels as {sizes}"


@dataclass(frozen=True, kw_only=True)
class Signs:
    """M = size diag(before) (H_2 (x) ... (x) H_2 (x) core) diag(behind), with `doublings` times
    H_2; the first row and column of the core are 1."""

    size: Tensor
    before: Tensor
    core: Tensor
    doublings: int
    behind: Tensor


def rotation(
    M: Tensor, device: torch.device, dtype: torch.dtype = torch.float32
) -> Dense | Hadamard | Butterflies:
    """The module that multiplies channels with a matrix: where the matrix has factors, by these on
    a CPU if there are many channels, and by one kernel on a GPU that has it. dtype: of the
    activations."""
    pays = device.type == "cuda" or (device.type == "cpu" and len(M) >= SMALLEST_ORDER)
    parts = signs(M) if pays and M.ndim == 2 else None
    if parts is None or (
        device.type == "cuda" and refusal(device, dtype, len(M), len(parts.core)) is not None
    ):
        return Dense(M.to(device))
    if device.type == "cpu":
        return _of_signs(parts)
    return Butterflies(
        before=parts.before.to(device),
        core=parts.core.to(device),
        behind=parts.behind.to(device),
        scale=float(parts.size),
        doublings=parts.doublings,
    )


def factors(M: Tensor) -> Hadamard | None:
    """A matrix [n, n] in factors, or None where it has none (`signs`)."""
    parts = signs(M)
    if parts is None:
        return None
    return _of_signs(parts)


def signs(M: Tensor) -> Signs | None:
    """A matrix [n, n] by its signs, or None where it has entries of several sizes, or no matrix of
    half the order in it."""
    size = M.abs()[0, 0]
    if not size > 0 or not bool((M.abs() == size).all()):
        return None
    before = M[:, 0].sign()
    core = M.sign() * before[:, None]
    behind = core[0].clone()
    core, doublings = _core(core * behind)
    if not doublings:
        return None
    return Signs(size=size, before=before, core=core, doublings=doublings, behind=behind)


def _of_signs(parts: Signs) -> Hadamard:
    """The factors, none larger than LARGEST_FACTOR but for a core that is."""
    core, doublings, M = parts.core, parts.doublings, parts.before
    while doublings and 2 * len(core) <= LARGEST_FACTOR:
        core, doublings = _doubled(core), doublings - 1
    matrices = [*map(_sylvester, _shares(doublings)), core]
    matrices[0] = matrices[0] * parts.size
    return Hadamard(parts.before, [matrix.to(M) for matrix in matrices], parts.behind)


def _shares(doublings: int) -> list[int]:
    """How many doublings each factor makes: equally many, as far as they go."""
    most = LARGEST_FACTOR.bit_length() - 1
    count = -(-doublings // most)
    return [(doublings + i) // count for i in range(count)]


def _core(H: Tensor) -> tuple[Tensor, int]:
    """(C, p) with H = H_2 (x) ... (x) H_2 (x) C, p times."""
    doublings = 0
    while len(H) % 2 == 0:
        half = len(H) // 2
        C = H[:half, :half]
        if not torch.equal(H, _doubled(C)):
            break
        H, doublings = C, doublings + 1
    return H, doublings


def _doubled(C: Tensor) -> Tensor:
    """H_2 (x) C."""
    return torch.cat([torch.cat([C, C], 1), torch.cat([C, -C], 1)])


def _sylvester(p: int) -> Tensor:
    """The Hadamard matrix of order 2^p."""
    H = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(p):
        H = _doubled(H)
    return H
