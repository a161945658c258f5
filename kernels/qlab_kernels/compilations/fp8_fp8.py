"""What of the fp8 x fp8 family is compiled ahead of time, and its gates."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlab_kernels import gates
from qlab_kernels.capability import Capability, target
from qlab_kernels.compilations.ahead import PTR, AheadOfTime
from qlab_kernels.device import options
from qlab_kernels.families.fp8_fp8 import BLOCK, FIRST
from qlab_kernels.fp8_fp8_kernel import fp8_fp8_kernel
from qlab_kernels.gates import Compilation, Gate
from qlab_kernels.problem import Config, Problem

TOKENS = (1, 16, 32, 64, 256, 4096)


@dataclass(frozen=True)
class Fp8Variant:
    """One compilation. blocks: whether scales are those of blocks. whole: tiles divide k. dtype: of
    results."""

    op: str
    cc: Capability
    dtype: str
    blocks: bool
    whole: bool
    config: Config


def variants(p: Problem, c: Config) -> list[Fp8Variant]:
    """The compilations that `c` needs for `p`; none where the library multiplies."""
    if isinstance(p.cc, str) or c.kind == "library":
        return []
    plain = replace(c, split=min(c.split, 2))
    return [Fp8Variant(p.op, p.cc, p.dtype, p.group < p.k, p.k % c.bk == 0, plain)]


def compilation(v: Fp8Variant, **planted: object) -> Compilation:
    """The kernel of a variant with its argument types, constants and options."""
    c = v.config
    constants: dict = {"BLOCK": BLOCK if v.blocks else 0, "TOKENS": True, "BIAS": True}
    constants |= {"PARTS": c.split > 1, "WHOLE": v.whole}
    constants |= {"EXPERTS": 64 if v.op == "fp8_fp8_grouped_mm" else 0}
    constants |= {"BM": c.bm, "BN": c.bn, "BK": c.bk, "STAGES": c.stages}
    types = {
        **dict.fromkeys(("x_ptr", "words_ptr"), "*fp8e4nv"),
        **dict.fromkeys(("scales_ptr", "row_scales_ptr"), "*fp32"),
        "offsets_ptr": "*i32",
        "bias_ptr": PTR[v.dtype],
        "y_ptr": PTR["float32" if c.split > 1 else v.dtype],
    }
    return Compilation(
        kernel=fp8_fp8_kernel,
        cc=v.cc,
        types=types,
        constants=constants | planted,
        aligned=("N", "K", "W_STRIDE"),
        options=options(c, target(v.cc).layout),
        weights=c.bn * c.bk,
    )


def gates_of(v: Fp8Variant) -> list[Gate]:
    """Tensor cores take codes as they are from shared memory, which is filled in the background."""
    of_all = [*gates.FITS, gates.loop, gates.without("F2F"), gates.tensor_cores, gates.asynchronous]
    # The wait for tcgen05 is a branch back from behind the loop, where results become 16 bits wide.
    return of_all if v.cc == (10, 0) else [*of_all, gates.without("F2FP")]


def chosen(cc: Capability) -> Iterator[Problem]:
    """Few and many tokens, rows and blocks, channels that no tile divides, and experts."""
    if cc >= FIRST:
        yield Problem("fp8_fp8_mm", cc, "", "bfloat16", 8000, False, 8192, 8000, 1)
        yield Problem("fp8_fp8_mm", cc, "", "bfloat16", 8192, False, 8192, 8192, 4096)
        yield Problem("fp8_fp8_mm", cc, "", "bfloat16", BLOCK, False, 8192, 8192, 256)
        yield Problem("fp8_fp8_grouped_mm", cc, "", "bfloat16", BLOCK, False, 8192, 8192, 64, 32)


def every(cc: Capability) -> Iterator[Problem]:
    """Every kind of scales and of results."""
    if cc >= FIRST:
        for dtype in ("bfloat16", "float16", "float32"):
            for group in (8192, BLOCK):
                for m in TOKENS:
                    yield Problem("fp8_fp8_mm", cc, "", dtype, group, False, 8192, 8192, m)
                yield Problem("fp8_fp8_grouped_mm", cc, "", dtype, group, False, 8192, 8192, 64, 32)


AHEAD = AheadOfTime(
    name="fp8_fp8",
    variant=Fp8Variant,
    variants=variants,
    compilation=compilation,
    gates=gates_of,
    chosen=chosen,
    every=every,
)
