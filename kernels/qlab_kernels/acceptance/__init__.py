"""What proves the kernels right on a device: every family lists cases by name and checks one of
them against a reference.

A family is a module with `cases(cc)`, the cases of a compute capability, the most telling first:
assembly, what runs by default, every other configuration. Listing them needs no GPU, and no family
is imported before it is asked for. A case runs on any device that its capability describes, also
in Triton's interpreter unless it is `assembly`. What a family tunes it names in `TIMED`, and
`timed(problem, device, seed)` gives the products that are timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from qlab_kernels.capability import Capability, KernelError
from qlab_kernels.config import Config, Problem, candidates, family_of

FAMILIES = {
    "int4": "qlab_kernels.acceptance.int4",
    "int4_a8": "qlab_kernels.acceptance.int4_a8",
    "round8": "qlab_kernels.acceptance.round8",
    "floats": "qlab_kernels.acceptance.floats",
    "int8_int8": "qlab_kernels.acceptance.int8_int8",
    "fp8_fp8": "qlab_kernels.acceptance.fp8_fp8",
    "hadamard": "qlab_kernels.acceptance.hadamard",
    "cache_attention": "qlab_kernels.acceptance.cache_attention",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One check of a family.

    name: unique in its family and the same in every process. excess: a device -> the largest error
    over what rounding explains, at most 1 where the kernel is right; 0 or infinity where bits are
    compared. assembly: it runs assembly, which the interpreter does not. tuned: it runs only where
    tuning chose it. kernels: how many it compiles.
    """

    name: str
    excess: Callable[[torch.device], float]
    assembly: bool = False
    tuned: bool = False
    kernels: int = 1


@dataclass(frozen=True, kw_only=True)
class Form:
    """Weights whose products are tuned. op: the operator; dtype: of the activations; group, zeros:
    as in a `Problem`."""

    op: str
    dtype: str
    group: int
    zeros: bool = False


def cases(family: str, cc: Capability) -> list[Case]:
    """The cases of a family for a compute capability; none where the family has no kernel."""
    if family not in FAMILIES:
        raise KernelError(f"no family {family!r}: there are {', '.join(FAMILIES)}")
    listed: list[Case] = import_module(FAMILIES[family]).cases(cc)
    return listed


def check(family: str, name: str, cc: Capability, device: torch.device) -> float:
    """The excess of one case on a device of the capability. KernelError for an unknown name."""
    for case in cases(family, cc):
        if case.name == name:
            return case.excess(device)
    raise KernelError(f"the family {family} has no case {name!r} for capability {cc[0]}.{cc[1]}")


def forms(family: str, cc: Capability) -> list[Form]:
    """What a family tunes on a device of the capability; nothing where it has no configurations to
    choose among."""
    listed: tuple[Form, ...] = getattr(import_module(FAMILIES[family]), "TIMED", ())
    return [form for form in listed if _runs(form, cc)]


def _runs(form: Form, cc: Capability) -> bool:
    """Whether any configuration computes such a product."""
    try:
        candidates(Problem(form.op, cc, "", form.dtype, form.group, form.zeros, 4096, 4096, 1))
    except KernelError:
        return False
    return True


def timed(p: Problem, device: torch.device, seed: int) -> Callable[[Config], torch.Tensor]:
    """A product of random operands that belong to the seed: config -> y. KernelError for an
    operator whose family times none."""
    family = family_of(p.op).name
    module = import_module(FAMILIES[family]) if family in FAMILIES else None
    if not hasattr(module, "timed"):
        raise KernelError(f"the family {family} of {p.op} has no product to time")
    product: Callable[[Config], torch.Tensor] = module.timed(p, device, seed)  # type: ignore[union-attr]
    return product
