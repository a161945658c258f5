"""Which kernels of attention over a quantized cache are compiled, and the gates that they pass."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlab_kernels import gates
from qlab_kernels.cached import decoding
from qlab_kernels.capability import TARGETS, Capability
from qlab_kernels.compilations.ahead import PTR, TL, AheadOfTime
from qlab_kernels.families.cache_attention import OPERATORS, REGISTERS, padded, refusal
from qlab_kernels.gates import Compilation, Gate
from qlab_kernels.problem import Config, Problem

FORMATS: dict[str, Any] = {operator: name for name, operator in OPERATORS.items()}
# Per code of the loop over positions, of 128 channels and 64 positions, without groups. At the
# memory's rate of an H200 there are 7.8 for a byte, and 3.9 for a code of 4 bits: codes of 4 bits
# and those of 8 with bfloat16 queries are above.
MOST_INSTRUCTIONS = {"int8": 10.0, "fp8": 12.5, "int4": 7.5}


@dataclass(frozen=True)
class Variant:
    """One compilation, of keys and values in one format. group 0 is a head. masked: with windows,
    soft caps, first positions and pages."""

    op: str
    cc: Capability
    dtype: str
    channels: int
    group: int
    zeros: bool
    masked: bool
    config: Config


def variants(p: Problem, c: Config) -> list[Variant]:
    """The compilations that `c` needs for `p`; of the split none matters."""
    assert not isinstance(p.cc, str)
    group, plain = 0 if p.group >= p.k else p.group, replace(c, split=1)
    return [Variant(p.op, p.cc, p.dtype, p.k, group, p.zeros, p.zeros, plain)]


def compilation(v: Variant, **planted: object) -> Compilation:
    """The kernel of a variant with its argument types, constants and options."""
    from qlab_kernels.cache_attention import cache_attention_kernel

    form, c = FORMATS[v.op], v.config
    width = -(-v.channels // 2) if form == "int4" else v.channels
    offset, unit = decoding(form, getattr(torch, v.dtype))
    of_each = {
        "WIDTH": width,
        "PADDED": padded(width),
        "FORMAT": form,
        "OFFSET": offset,
        "UNIT": unit,
        "GROUP": v.group,
        "ZEROS": v.zeros,
    }
    masks = dict.fromkeys(("CAPPED", "WINDOWED", "STARTED"), v.masked)
    constants = {"D": v.channels, "DV": v.channels, "PAGE": 16 if v.masked else 0, **masks}
    constants |= {"COMPUTE": TL[v.dtype], "BM": c.bm, "BN": c.bn, "STAGES": c.stages}
    constants |= {f"K_{name}": value for name, value in of_each.items()}
    constants |= {f"V_{name}": value for name, value in of_each.items()}
    codes = "*i8" if form == "int8" else "*u8"
    types = {"q_ptr": PTR[v.dtype], "k_ptr": codes, "v_ptr": codes, "scale": "fp32", "cap": "fp32"}
    types |= dict.fromkeys(("k_zeros_ptr", "v_zeros_ptr"), "*i8")
    types |= dict.fromkeys(("lengths_ptr", "starts_ptr", "pages_ptr"), "*i32")
    floats = ("k_scales_ptr", "v_scales_ptr", "sums_ptr", "tops_ptr", "totals_ptr")
    return Compilation(
        kernel=cache_attention_kernel,
        cc=v.cc,
        types=types | dict.fromkeys(floats, "*fp32"),
        constants=constants | planted,
        aligned=("K_B", "K_H", "K_N", "V_B", "V_H", "V_N"),
        options={"num_warps": c.warps, "maxnreg": REGISTERS},
        weights=2 * c.bn * v.channels,
    )


def gates_of(v: Variant) -> list[Gate]:
    """Limits; tensor cores; no code converted by itself; codes copied ahead; few instructions.

    Zero points of tokens are converted, one for all channels of a head. Rows of pages and rows that
    are no multiple of 16 bytes are not copied 16 bytes at a time.
    """
    of_all = [*gates.FITS, gates.loop, gates.tensor_cores]
    if not v.zeros:
        of_all.append(gates.without("I2F"))
    width = v.channels // 2 if FORMATS[v.op] == "int4" else v.channels
    if v.config.stages > 1 and not v.masked and width % 16 == 0:
        of_all.append(gates.asynchronous)
    if v.channels == 128 and v.config.bn == 64 and v.config.bm == 16 and not v.group:
        most = MOST_INSTRUCTIONS[FORMATS[v.op]]
        of_all.append(gates.at_most(most + 2 if v.masked else most))
    return of_all


def chosen(cc: Capability) -> Iterator[Problem]:
    """Eight sequences over 4,096 positions, of every format, and heads of another size."""
    for op in OPERATORS.values():
        yield from _problems(cc, "bfloat16", op, 128, 128, False)
    yield from _problems(cc, "float16", OPERATORS["int4"], 80, 80, True)


def every(cc: Capability) -> Iterator[Problem]:
    """Every format, size of heads, group and dtype."""
    for op in OPERATORS.values():
        for dtype in ("bfloat16", "float16"):
            for d in (64, 80, 96, 128, 256):
                for zeros in (False, True):
                    yield from _problems(cc, dtype, op, d, d, zeros)
            yield from _problems(cc, dtype, op, 128, 32, False)


def _problems(
    cc: Capability, dtype: str, op: str, channels: int, group: int, zeros: bool
) -> Iterator[Problem]:
    """The problem, where the capability has a kernel for it."""
    if cc in TARGETS and refusal(cc, dtype, channels) is None:
        yield Problem(op, cc, "", dtype, group, zeros, 4096, channels, 4, 64)


AHEAD = AheadOfTime(
    name="cache_attention",
    variant=Variant,
    variants=variants,
    compilation=compilation,
    gates=gates_of,
    chosen=chosen,
    every=every,
)
