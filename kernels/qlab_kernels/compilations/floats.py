"""What of the kernels for 4- and 8-bit floats is compiled ahead of time, and its gates."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlab_kernels import gates
from qlab_kernels.capability import TARGETS, Capability, target
from qlab_kernels.compilations.ahead import PTR, TL, AheadOfTime
from qlab_kernels.device import options
from qlab_kernels.families.floats import BITS, as_packed
from qlab_kernels.float_layout import FINE
from qlab_kernels.gates import Compilation, Gate
from qlab_kernels.problem import Config, Problem

# {(bits, group): per weight, of the loop of the kernel for at most 16 tokens and 128 channels}
MOST_INSTRUCTIONS = {(4, 16): 4.9, (4, 32): 4.3, (8, 32): 4.9, (8, 128): 4.3, (8, 0): 4.3}
# NVFP4, MXFP4; MXFP8, fp8 in blocks of 128 and in rows
FOURS, EIGHTS = (16, 32), (32, 128, 8192)
FORMATS = [*(("float4", g) for g in (*FOURS, 128)), *(("float8", g) for g in EIGHTS)]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LARGE = 256  # tokens of a large tile


@dataclass(frozen=True)
class Variant:
    """One compilation. group 0 is one scale per row; of the config's split only whether there is
    one matters."""

    op: str
    cc: Capability
    dtype: str
    group: int
    config: Config


def variants(p: Problem, c: Config) -> list[Variant]:
    """The compilation that `c` needs for `p`."""
    assert not isinstance(p.cc, str)
    plain = replace(c, split=min(c.split, 2))
    return [Variant(p.op, p.cc, p.dtype, as_packed(p)[1], plain)]


def compilation(v: Variant, **planted: object) -> Compilation:
    """The kernel of a variant with its argument types, constants and options."""
    from qlab_kernels.float_mm import float_grouped_mm_kernel, float_mm_kernel

    c, row = v.config, target(v.cc)
    constants: dict = {"BITS": BITS[v.op], "GROUP": v.group, "BM": c.bm, "BN": c.bn, "BK": c.bk}
    constants |= {"LAYOUT": row.layout, "SEQUENCE": row.sequence, "COMPUTE": TL[v.dtype]}
    constants |= {"STAGES": c.stages}
    is_grouped = v.op.endswith("_grouped_mm")
    return Compilation(
        kernel=float_grouped_mm_kernel if is_grouped else float_mm_kernel,
        cc=v.cc,
        types={
            "x_ptr": PTR[v.dtype],
            "y_ptr": PTR["float32" if c.split > 1 else v.dtype],
            "words_ptr": "*u8",
            "scales_ptr": "*i32" if v.group in FINE else "*fp32",
            "factors_ptr": "*fp32",
            "offsets_ptr": "*i32",
        },
        constants=constants | ({"EXPERTS": 64} if is_grouped else {}) | planted,
        aligned=("N", "K", "N_PAD"),
        options=options(c, row.layout),
        weights=c.bn * c.bk,
    )


def gates_of(v: Variant) -> list[Gate]:
    """Limits for all; what keeps a kernel for tensor cores from the memory's rate."""
    c = v.config
    wanted = [
        *gates.FITS,
        gates.loop,
        gates.without("I2F"),
        gates.without("F2F"),
        gates.tensor_cores,
        gates.weights_from_registers,
    ]
    if c.stages > 1:
        wanted.append(gates.asynchronous)
    # tcgen05 takes weights through tensor memory.
    if c.bm <= 32 and v.cc != (10, 0):
        wanted += [gates.no_exchange, gates.without("SHFL")]
    most = MOST_INSTRUCTIONS.get((BITS[v.op], v.group))
    if most and c.bm <= 16 and c.bk == 128 and v.op in ("float4_mm", "float8_mm"):
        wanted.append(gates.at_most(most))
    return wanted


def chosen(cc: Capability) -> Iterator[Problem]:
    """A square product of each number of bits for few tokens, one for many, and one of experts: of
    formats and dtypes, which differ little, others for the next capability."""
    turn, dtypes = list(TARGETS).index(cc), _dtypes(cc)
    if not dtypes:
        return
    dtype, four, eight = dtypes[turn // 2 % 2], FOURS[turn % 2], EIGHTS[turn % 3]
    other, experts = FOURS[(turn + 1) % 2], EIGHTS[(turn + 1) % 3]
    yield Problem("float4_mm", cc, "", dtype, four, False, 8192, 8192, 1)
    yield Problem("float8_mm", cc, "", dtype, eight, False, 8192, 8192, 1)
    yield Problem("float4_mm", cc, "", dtype, other, False, 8192, 8192, LARGE)
    yield Problem("float8_grouped_mm", cc, "", dtype, experts, False, 8192, 8192, 64, 32)


def every(cc: Capability) -> Iterator[Problem]:
    """Every format in both dtypes."""
    for dtype in _dtypes(cc):
        for name, group in FORMATS:
            for m in TOKENS:
                yield Problem(f"{name}_mm", cc, "", dtype, group, False, 8192, 8192, m)
            yield Problem(f"{name}_grouped_mm", cc, "", dtype, group, False, 8192, 8192, 64, 32)


def _dtypes(cc: Capability) -> list[str]:
    """Of activations; none where there are no such kernels."""
    row = TARGETS[cc]
    able = row.dtypes if row.path == "fused" else ()
    return [str(dtype).removeprefix("torch.") for dtype in able]


AHEAD = AheadOfTime(
    name="floats",
    variant=Variant,
    variants=variants,
    compilation=compilation,
    gates=gates_of,
    chosen=chosen,
    every=every,
)
