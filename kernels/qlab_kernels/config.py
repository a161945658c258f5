"""Products and configurations of every family of kernels: which of them are allowed, worth timing,
and taken when nothing was timed. Each question goes to the family of the problem's operator."""

import ast
import hashlib
from functools import cache
from pathlib import Path

from qlab_kernels.capability import KernelError
from qlab_kernels.families import FAMILIES
from qlab_kernels.families.int4 import DENSE_TOKENS
from qlab_kernels.families.int4_legal import FMA_TOKENS, registers, shared_bytes
from qlab_kernels.problem import (
    BUCKETS,
    GROUPED_BUCKETS,
    Config,
    Family,
    Kind,
    Problem,
    reached,
    rows_each,
)

__all__ = [
    "BUCKETS",
    "DENSE_TOKENS",
    "FMA_TOKENS",
    "GROUPED_BUCKETS",
    "OPERATORS",
    "Config",
    "Family",
    "Kind",
    "Problem",
    "candidates",
    "family_of",
    "heuristic",
    "kernel_revision",
    "legal",
    "moved",
    "reached",
    "registers",
    "rows_each",
    "shared_bytes",
]

_OF = {operator: family for family in FAMILIES for operator in family.operators}
OPERATORS = tuple(_OF)


def family_of(op: str) -> Family:
    """The family that has the operator. KernelError when there is none."""
    if op not in _OF:
        raise KernelError(f"no operator {op!r}: there are {', '.join(OPERATORS)}")
    return _OF[op]


def legal(p: Problem, c: Config) -> str | None:
    """None when `c` computes `p` correctly and fits the device, else the sentence that says why
    not."""
    try:
        family = family_of(p.op)
    except KernelError as refusal:
        return str(refusal)
    return family.legal(p, c)


def candidates(p: Problem) -> list[Config]:
    """Every configuration worth timing for `p`, all legal; at least one, or KernelError saying why
    there is none."""
    return family_of(p.op).candidates(p)


def heuristic(p: Problem) -> Config:
    """A configuration from the shape alone: what runs when nothing was tuned. KernelError when none
    is legal."""
    return family_of(p.op).heuristic(p)


def moved(p: Problem) -> float:
    """Bytes that any kernel of the problem's family must move: weights, x and y once each."""
    return family_of(p.op).moved(p)


@cache
def kernel_revision(op: str = "int4_mm") -> str:
    """12 hex digits over the syntax of the operator's kernels and the names of their layouts: a
    cached time belongs to one of them.

    Line breaks and comments play no part: what is reformatted keeps its times.
    """
    family = family_of(op)
    digest = hashlib.sha256(family.layouts.encode())
    for name in family.sources:
        source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        digest.update(ast.unparse(ast.parse(source)).encode())
    return digest.hexdigest()[:12]
