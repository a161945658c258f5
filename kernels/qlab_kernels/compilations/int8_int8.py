"""What of the int8 x int8 family is compiled ahead of time, and its gates."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlab_kernels import gates
from qlab_kernels.capability import Capability, target
from qlab_kernels.compilations.ahead import PTR, AheadOfTime
from qlab_kernels.device import options
from qlab_kernels.families.int8_int8 import fused
from qlab_kernels.gates import Compilation, Gate
from qlab_kernels.int8_int8_kernel import int8_int8_kernel
from qlab_kernels.problem import Config, Problem

TOKENS = (1, 16, 32, 64, 256, 4096)
GROUP = 1024  # of weights with several scales in a row


@dataclass(frozen=True)
class Int8Variant:
    """One compilation. whole: tiles divide k. groups: of channels in a row, several or one. zeros:
    of weights and of activations. dtype: of results."""

    op: str
    cc: Capability
    dtype: str
    groups: bool
    zeros: bool
    whole: bool
    config: Config


def variants(p: Problem, c: Config) -> list[Int8Variant]:
    """The compilations that `c` needs for `p`; none where the library multiplies."""
    if isinstance(p.cc, str) or c.kind == "library":
        return []
    plain = replace(c, split=min(c.split, 2))
    whole = min(p.group, p.k) % c.bk == 0
    return [Int8Variant(p.op, p.cc, p.dtype, p.group < p.k, p.zeros, whole, plain)]


def compilation(v: Int8Variant, **planted: object) -> Compilation:
    """The kernel of a variant with its argument types, constants and options."""
    c = v.config
    constants: dict = {"ZEROS": v.zeros, "SUMS": v.zeros, "TOKENS": True, "BIAS": True}
    constants |= {"GROUPS": v.groups, "PARTS": c.split > 1, "WHOLE": v.whole}
    constants |= {"EXPERTS": 64 if v.op == "int8_int8_grouped_mm" else 0}
    constants |= {"BM": c.bm, "BN": c.bn, "BK": c.bk, "STAGES": c.stages}
    types = {
        **dict.fromkeys(("x_ptr", "words_ptr", "row_zeros_ptr"), "*i8"),
        **dict.fromkeys(("scales_ptr", "row_scales_ptr"), "*fp32"),
        **dict.fromkeys(("zeros_ptr", "sums_ptr", "row_sums_ptr", "offsets_ptr"), "*i32"),
        "bias_ptr": PTR[v.dtype],
        "y_ptr": "*i32" if c.split > 1 else PTR[v.dtype],
    }
    return Compilation(
        kernel=int8_int8_kernel,
        cc=v.cc,
        types=types,
        constants=constants | planted,
        aligned=("N", "K", "WIDTH"),
        options={**options(c, target(v.cc).layout), "enable_fp_fusion": False},
        weights=c.bn * c.bk,
    )


def gates_of(v: Int8Variant) -> list[Gate]:
    """Tensor cores take codes from shared memory, which is filled in the background, and integers
    become numbers behind the loop: of several groups, behind the inner one of two."""
    behind = [] if v.groups else [gates.without("I2F")]
    return [*gates.FITS, gates.loop, gates.tensor_cores, gates.asynchronous, *behind]


def chosen(cc: Capability) -> Iterator[Problem]:
    """Few and many tokens, channels that no tile divides, groups, and experts. 8.7 has the
    instructions and the shared memory of 8.0."""
    if fused(cc) and cc != (8, 7):
        yield Problem("int8_int8_mm", cc, "", "bfloat16", 8000, False, 8192, 8000, 1)
        yield Problem("int8_int8_mm", cc, "", "bfloat16", 8192, True, 8192, 8192, 4096)
        yield Problem("int8_int8_mm", cc, "", "float16", GROUP, True, 8192, 8192, 64)
        yield Problem("int8_int8_grouped_mm", cc, "", "bfloat16", 8192, False, 8192, 8192, 64, 32)


def every(cc: Capability) -> Iterator[Problem]:
    """Every kind of weights and of results."""
    if fused(cc):
        for dtype in ("bfloat16", "float16", "float32"):
            for m in TOKENS:
                for group, zeros in ((8192, False), (8192, True), (GROUP, True)):
                    yield Problem("int8_int8_mm", cc, "", dtype, group, zeros, 8192, 8192, m)
            yield Problem("int8_int8_grouped_mm", cc, "", dtype, GROUP, True, 8192, 8192, 64, 32)


AHEAD = AheadOfTime(
    name="int8_int8",
    variant=Int8Variant,
    variants=variants,
    compilation=compilation,
    gates=gates_of,
    chosen=chosen,
    every=every,
)
