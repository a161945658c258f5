"""How many floating-point operations a step takes for one weight, as the step declares it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Operations:
    """square k^3 + rows o k^2 + elements o k operations for a weight [o, k], in float32: those of
    products and of factors of matrices, additions and multiplications.

    square: 1/3 for a Cholesky factor, 2/3 more for an inverse. rows: 2 for each product of the
    weight and a matrix [k, k], 1 for one with a triangle. elements: 2 n for each product of its
    groups of n columns and matrices [n, n].
    """

    square: float = 0.0
    rows: float = 0.0
    elements: float = 0.0

    def of(self, o: int, k: int) -> float:
        """Those of one weight [o, k]."""
        return k * (self.square * float(k) ** 2 + self.rows * float(o) * k + self.elements * o)
