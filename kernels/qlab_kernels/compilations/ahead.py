"""What a family says so that its kernels are compiled and held against gates without a GPU."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import triton.language as tl

from qlab_kernels.capability import Capability
from qlab_kernels.gates import Compilation, Gate
from qlab_kernels.problem import Config, Problem

TL = {"float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32}
PTR = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}


@dataclass(frozen=True, kw_only=True)
class AheadOfTime:
    """The compilations of a family.

    name: the family's. variant: the class of its variants; a variant names one compilation by plain
    values (it is hashable, and travels to other processes) and has the fields `cc` and `config`.
    variants: what a configuration needs for a problem; none where only the library runs.
    compilation: of a variant, with the constants that a test plants in place of the kernel's own.
    gates: what the variant is held against. chosen: for one capability, the problems whose
    configuration by the heuristic every run of the tests compiles; every: those whose candidates
    all compile under `-m static_full`. Both are empty where the family does not run.
    """

    name: str
    variant: type
    variants: Callable[[Problem, Config], Sequence[Any]]
    compilation: Callable[..., Compilation]
    gates: Callable[[Any], Sequence[Gate]]
    chosen: Callable[[Capability], Iterable[Problem]]
    every: Callable[[Capability], Iterable[Problem]]
