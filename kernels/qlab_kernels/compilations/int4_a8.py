"""What of the family of int4 weights and activations of 8 bits is compiled ahead of time, and its
gates."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlab_kernels import gates
from qlab_kernels.capability import TARGETS, Capability
from qlab_kernels.compilations.ahead import PTR, AheadOfTime
from qlab_kernels.families.int4_a8 import NUMBERS
from qlab_kernels.gates import Compilation, Gate
from qlab_kernels.layout import padded_group
from qlab_kernels.layout8 import FIRST, UNIT, layout_of
from qlab_kernels.problem import Config, Problem

# Per weight, of the loop of the kernel for at most 16 tokens in groups of 128. e4m3 takes 0.75 more
# than int8 to make of nibbles, and zero points a load and a product per sum.
MOST_INSTRUCTIONS = {
    ("int8", False): 2.4,
    ("int8", True): 2.9,
    ("fp8", False): 2.9,
    ("fp8", True): 3.5,
}
KINDS = [
    (dtype, group, zeros)
    for dtype in ("bfloat16", "float32")
    for group in (32, 64, 128, 256, 8192)
    for zeros in (False, True)
]
TOKENS = (1, 16, 32, 64, 256)


@dataclass(frozen=True)
class Variant:
    """One compilation. group 0 is whole rows; of the config's split only whether there is one
    matters. dtype: of results, and of scales where it has 16 bits."""

    op: str
    cc: Capability
    dtype: str
    group: int
    zeros: bool
    config: Config


def variants(p: Problem, c: Config) -> list[Variant]:
    """The compilations that `c` needs for `p`."""
    assert not isinstance(p.cc, str)
    k_pad, group = padded_group(p.k, p.group)
    plain = replace(c, split=min(c.split, 2))
    return [Variant(p.op, p.cc, p.dtype, 0 if group >= k_pad else group, p.zeros, plain)]


def compilation(v: Variant, **planted: object) -> Compilation:
    """The kernel of a variant with its argument types, constants and options."""
    from qlab_kernels.int4_a8 import int4_a8_mm_kernel
    from qlab_kernels.int4_a8_grouped import int4_a8_grouped_mm_kernel

    c, numbers = v.config, NUMBERS[v.op]
    grouped = v.op.endswith("_grouped_mm")
    constants = {
        "UNIT": UNIT[numbers],
        "FIXED": False,
        "GROUP": v.group,
        "ZEROS": v.zeros,
        "BM": c.bm,
        "BN": c.bn,
        "BK": c.bk,
        "NUMBERS": numbers,
        "LAYOUT": layout_of(v.cc, numbers).partition("-")[0],
        "SEQUENCE": "asm",
        "STAGES": c.stages,
    }
    constants |= {"EXPERTS": 64} if grouped else {"BIAS": True}
    return Compilation(
        kernel=int4_a8_grouped_mm_kernel if grouped else int4_a8_mm_kernel,
        cc=v.cc,
        types={
            "x_ptr": {"int8": "*i8", "fp8": "*fp8e4nv"}[numbers],
            "t_ptr": "*fp32",
            "sums_ptr": "*fp32" if v.zeros else {"int8": "*i8", "fp8": "*fp8e4nv"}[numbers],
            "words_ptr": "*u8",
            "scales_ptr": PTR[v.dtype],
            "zeros_ptr": PTR[v.dtype],
            "bias_ptr": PTR[v.dtype],
            "offsets_ptr": "*i32",
            "y_ptr": PTR["float32" if c.split > 1 else v.dtype],
        },
        constants=constants | planted,
        aligned=("N", "K", "N_PAD"),
        options={"num_warps": c.warps},
        weights=c.bn * c.bk,
    )


def gates_of(v: Variant) -> list[Gate]:
    """Limits for all; what keeps a kernel for tensor cores from the memory's rate."""
    c, numbers = v.config, NUMBERS[v.op]
    found = [*gates.FITS, gates.loop, gates.without("I2F"), gates.without("F2F")]
    found += [gates.tensor_cores, gates.weights_from_registers]
    if c.stages > 1:
        found.append(gates.asynchronous)
    # tcgen05 takes weights through tensor memory.
    if c.bm <= 32 and (v.cc != (10, 0) or numbers == "int8"):
        found.append(gates.no_exchange)
    if c.bm <= 16 and v.group == 128:
        found.append(gates.at_most(MOST_INSTRUCTIONS[numbers, v.zeros]))
    return found


def chosen(cc: Capability) -> Iterator[Problem]:
    """A square product for few and for many tokens, and one of experts."""
    for op in _operators(cc):
        for m in (64,) if op.endswith("_grouped_mm") else (1, 256):
            experts = 32 if op.endswith("_grouped_mm") else 1
            yield Problem(op, cc, "", "bfloat16", 128, False, 8192, 8192, m, experts)


def every(cc: Capability) -> Iterator[Problem]:
    """Every kind of weights."""
    for op in _operators(cc):
        for dtype, group, zeros in KINDS:
            for m in (64,) if op.endswith("_grouped_mm") else TOKENS:
                experts = 32 if op.endswith("_grouped_mm") else 1
                yield Problem(op, cc, "", dtype, group, zeros, 8192, 8192, m, experts)


def _operators(cc: Capability) -> list[str]:
    """Those that the capability has; none where Triton makes no tensor-core code."""
    if TARGETS[cc].path != "fused":
        return []
    return [op for op, numbers in NUMBERS.items() if cc >= FIRST[numbers]]


AHEAD = AheadOfTime(
    name="int4_a8",
    variant=Variant,
    variants=variants,
    compilation=compilation,
    gates=gates_of,
    chosen=chosen,
    every=every,
)
