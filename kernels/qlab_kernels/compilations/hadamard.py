"""Which products with Hadamard matrices are compiled, and the gates that they pass."""

from collections.abc import Iterator
from dataclasses import dataclass

from qlab_kernels import gates
from qlab_kernels.capability import Capability
from qlab_kernels.compilations.ahead import PTR, TL, AheadOfTime
from qlab_kernels.families.hadamard import OPERATOR, padded_core, refusal
from qlab_kernels.gates import Compilation, Gate
from qlab_kernels.problem import Config, Problem

# order and core: what every run compiles, and what is compiled under -m static_full beside it
FEW = ((64, 1), (4096, 1), (24, 12), (1536, 12), (14336, 28))
MORE = ((2, 1), (128, 1), (1024, 1), (5120, 20), (9216, 36), (32768, 1))
# Per number of a program. At the memory's rate of an H200 there are 31 for one that is read and
# written in 16 bits, and 62 in 32 (4.3 TB/s; 132 multiprocessors of 128 lanes at 1.98 GHz); rows
# above 4,096 channels exceed the former.
MOST_INSTRUCTIONS = {"float16": 36, "bfloat16": 36, "float32": 62}


@dataclass(frozen=True)
class Variant:
    """One compilation; signs on both sides."""

    op: str
    cc: Capability
    dtype: str
    n: int
    core: int
    config: Config


def variants(p: Problem, c: Config) -> list[Variant]:
    """The compilation that `c` needs for `p`."""
    assert not isinstance(p.cc, str)
    return [Variant(p.op, p.cc, p.dtype, p.n, p.group, c)]


def compilation(v: Variant, **planted: object) -> Compilation:
    """The kernel of a variant with its argument types, constants and options."""
    from qlab_kernels.hadamard import hadamard_kernel

    constants = {
        "DOUBLINGS": (v.n // v.core).bit_length() - 1,
        "CORE": v.core,
        "PADDED": padded_core(v.core),
        "BEFORE": True,
        "BEHIND": True,
        "BM": v.config.bm,
        "COMPUTE": TL[v.dtype],
    }
    return Compilation(
        kernel=hadamard_kernel,
        cc=v.cc,
        types=dict.fromkeys(("x_ptr", "y_ptr"), PTR[v.dtype])
        | dict.fromkeys(("before_ptr", "core_ptr", "behind_ptr"), "*fp16")
        | {"scale": "fp32"},
        constants=constants | planted,
        aligned=(),
        options={"num_warps": v.config.warps},
        weights=v.config.bm * v.config.bn,
        straight=True,
    )


def gates_of(v: Variant) -> list[Gate]:
    """Limits; nothing converted; a core on the tensor cores; few enough instructions."""
    of_all = [*gates.FITS, gates.without("I2F"), gates.at_most(MOST_INSTRUCTIONS[v.dtype])]
    return [*of_all, gates.tensor_cores] if v.core > 1 else of_all


def chosen(cc: Capability) -> Iterator[Problem]:
    """A small and a large order, and two with cores."""
    yield from _problems(cc, FEW)


def every(cc: Capability) -> Iterator[Problem]:
    """Orders of all sizes."""
    yield from _problems(cc, (*FEW, *MORE))


def _problems(cc: Capability, orders: tuple[tuple[int, int], ...]) -> Iterator[Problem]:
    """Those that the capability multiplies, in each dtype."""
    for dtype in ("bfloat16", "float16", "float32"):
        for n, core in orders:
            if refusal(cc, dtype, n, core) is None:
                yield Problem(OPERATOR, cc, "", dtype, core, False, n, n, 16)


AHEAD = AheadOfTime(
    name="hadamard",
    variant=Variant,
    variants=variants,
    compilation=compilation,
    gates=gates_of,
    chosen=chosen,
    every=every,
)
