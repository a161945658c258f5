"""What of the int4 family is compiled ahead of time, and its gates."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlab_kernels import gates
from qlab_kernels.capability import TARGETS, Capability, target
from qlab_kernels.compilations.ahead import PTR, TL, AheadOfTime
from qlab_kernels.device import options
from qlab_kernels.gates import Compilation, Gate
from qlab_kernels.layout import padded_group
from qlab_kernels.problem import Config, Problem

# Per weight, of the loop of the kernel for at most 16 tokens, symmetric in groups of 128. Experts'
# pointers cost registers.
MOST_INSTRUCTIONS = {"int4_mm": 3.3, "int4_grouped_mm": 3.4}
KINDS = [
    (dtype, group, zeros)
    for dtype in ("bfloat16", "float16")
    for group in (32, 64, 128, 256, 8192)
    for zeros in (False, True)
]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Variant:
    """One compilation. group 0 is whole rows; of the config's split only whether there is one
    matters. op "dequantize", with a config of kind "dequant", is the kernel that makes dense
    weights."""

    op: str
    cc: Capability
    dtype: str
    group: int
    zeros: bool
    config: Config


def variant(p: Problem, c: Config) -> Variant | None:
    """The compilation that `c` needs for `p`; None for kinds that multiply by the library."""
    if isinstance(p.cc, str) or c.kind in ("dequant", "dense", "int4pack"):
        return None
    k_pad, group = padded_group(p.k, p.group)
    plain = replace(c, split=min(c.split, 2))
    return Variant(p.op, p.cc, p.dtype, 0 if group >= k_pad else group, p.zeros, plain)


def variants(p: Problem, c: Config) -> list[Variant]:
    """The compilations that `c` needs for `p`."""
    one = variant(p, c)
    return [] if one is None else [one]


def compilation(v: Variant, **planted: object) -> Compilation:
    """The kernel of a variant with its argument types, constants and options."""
    if v.op == "dequantize":
        return _dequantization(v, planted)
    c, row = v.config, target(v.cc)
    constants: dict = {"GROUP": v.group, "ZEROS": v.zeros, "BM": c.bm, "BN": c.bn, "BK": c.bk}
    types = {
        "x_ptr": PTR[v.dtype],
        "y_ptr": PTR["float32" if c.split > 1 else v.dtype],
        "words_ptr": "*u8",
        "scales_ptr": "*i32",
        "zeros_ptr": "*i32",
        "offsets_ptr": "*i32",
    }
    if c.kind == "fma":
        from qlab_kernels.fma import int4_mm_fma_kernel as kernel

        halves = {"scales_ptr": PTR[v.dtype], "zeros_ptr": PTR[v.dtype]}
        types |= {"x_ptr": "*fp32", "words_ptr": "*i32", **halves}
    else:
        constants |= {"SCALE_ON": c.scale_on, "STAGES": c.stages}
        constants |= {"LAYOUT": row.layout, "SEQUENCE": row.sequence, "COMPUTE": TL[v.dtype]}
        if v.op == "int4_grouped_mm":
            from qlab_kernels.grouped import int4_grouped_mm_kernel as kernel

            constants["EXPERTS"] = 64
        else:
            from qlab_kernels.int4_mm import int4_mm_kernel as kernel
    tiled = c.kind in ("gemm", "split_k")
    return Compilation(
        kernel=kernel,
        cc=v.cc,
        types=types,
        constants=constants | planted,
        aligned=("N", "K", "N_PAD", "K_PAD"),
        options=options(c, row.layout) if tiled else {"num_warps": c.warps},
        weights=max(c.bn * c.bk, 1),
    )


def _dequantization(v: Variant, planted: dict) -> Compilation:
    from qlab_kernels.dequantize import BK, WARPS, dequantize_kernel

    row, half = target(v.cc), TL[v.dtype]
    constants = {"GROUP": v.group, "ZEROS": v.zeros, "BK": BK, "DTYPE": half}
    constants |= {"LAYOUT": row.layout, "SEQUENCE": row.sequence, "COMPUTE": half}
    return Compilation(
        kernel=dequantize_kernel,
        cc=v.cc,
        types={
            "words_ptr": "*u8",
            "scales_ptr": "*i32",
            "zeros_ptr": "*i32",
            "y_ptr": PTR[v.dtype],
        },
        constants=constants | planted,
        aligned=("N", "K", "N_PAD", "K_PAD"),
        options={"num_warps": WARPS},
        # No gate looks at the machine code of a dequantization, and printing it takes long.
        weights=0,
    )


def gates_of(v: Variant) -> list[Gate]:
    """Limits for all; what keeps a kernel for tensor cores from the memory's rate."""
    c = v.config
    if v.op == "dequantize":
        return [*gates.FITS]
    of_loops = [*gates.FITS, gates.loop, gates.without("I2F")]
    if c.kind == "fma":
        return of_loops
    of_tiles = [*of_loops, gates.tensor_cores, gates.weights_from_registers]
    if c.stages > 1:
        of_tiles.append(gates.asynchronous)
    # tcgen05 takes weights through tensor memory.
    if c.bm <= 32 and v.cc != (10, 0):
        of_tiles.append(gates.no_exchange)
    if c.bm <= 16 and v.group == 128 and not v.zeros:
        of_tiles.append(gates.at_most(MOST_INSTRUCTIONS[v.op]))
    return of_tiles


def chosen(cc: Capability) -> Iterator[Problem]:
    """A square product for every number of tokens, and one of experts."""
    for dtype in _dtypes(cc):
        for m in TOKENS:
            yield Problem("int4_mm", cc, "", dtype, 128, False, 8192, 8192, m)
        if TARGETS[cc].path == "fused":
            yield Problem("int4_grouped_mm", cc, "", dtype, 128, False, 8192, 8192, 64, 32)


def every(cc: Capability) -> Iterator[Problem]:
    """Every kind of weights."""
    for dtype, group, zeros in (kind for kind in KINDS if kind[0] in _dtypes(cc)):
        for m in TOKENS:
            yield Problem("int4_mm", cc, "", dtype, group, zeros, 8192, 8192, m)
        if TARGETS[cc].path == "fused":
            yield Problem("int4_grouped_mm", cc, "", dtype, group, zeros, 8192, 8192, 64, 32)


def _dtypes(cc: Capability) -> list[str]:
    """Of activations; none where Triton does not compile."""
    row = TARGETS[cc]
    able = () if row.path == "dequantize" else row.dtypes
    return [str(dtype).removeprefix("torch.") for dtype in able]


AHEAD = AheadOfTime(
    name="int4",
    variant=Variant,
    variants=variants,
    compilation=compilation,
    gates=gates_of,
    chosen=chosen,
    every=every,
)
