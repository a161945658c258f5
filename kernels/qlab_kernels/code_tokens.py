"""New keys or values of a cache as codes, on a CPU: `code_tokens.cpp`, the arithmetic of
`qlab.lowering.around.coded_heads` bit for bit, for numbers that are finite.

    qlab::code_tokens_of_cpu(x, scales, zeros, heads, group, bits, in_pairs, is_symmetric,
        scale_kind, share) -> codes, scales, zeros         x [n, k], channels of all heads;
        codes [n, heads, d or ceil(d / 2)]; scales, zeros [n, heads or 1, groups of it], of the
        tokens, or empty where fixed ones are given [1 or heads] in fp32; bits 0 for e4m3

The library registers the operator when it is loaded, so that a compiled graph calls it without
Python. It has no gradient.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlab_kernels.capability import KernelError
from qlab_kernels.compiled import registered

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of numbers and scales
E4M3 = 0  # in the place of bits

torch.library.define(
    "qlab::code_tokens_of_cpu",
    "(Tensor x, Tensor scales, Tensor zeros, int heads, int group, int bits, int in_pairs, "
    "int is_symmetric, int scale_kind, float share) -> (Tensor, Tensor, Tensor)",
)
OPERATOR = torch.ops.qlab.code_tokens_of_cpu.default


@torch.library.register_fake("qlab::code_tokens_of_cpu")
def _(x, scales, zeros, heads, group, bits, in_pairs, is_symmetric, scale_kind, share):
    n, d = x.shape[0], x.shape[1] // heads
    codes = x.new_empty(
        (n, heads, -(-d // 2) if in_pairs else d),
        dtype=torch.uint8 if in_pairs or bits == E4M3 else torch.int8,
    )
    rows = heads if group <= d else 1
    groups = 0 if len(scales) else x.shape[1] // group // rows
    made = x.new_empty((n, rows, groups), dtype=DTYPES[scale_kind])
    return codes, made, x.new_empty((n, rows, 0 if is_symmetric else groups), dtype=torch.int8)


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How tokens are coded. bits: of an integer, or E4M3. group: channels under a scale. share: of
    each range, which is used. scale_dtype: one of DTYPES."""

    heads: int
    group: int
    bits: int
    in_pairs: bool
    is_symmetric: bool
    scale_dtype: torch.dtype
    share: float


def why_not() -> str | None:
    """Load the kernel and give torch its operator. Why there is none, or None."""
    return registered(SOURCE)


def takes(x_nk: Tensor) -> bool:
    """Whether the kernel codes these numbers: on a CPU, in a dtype of DTYPES."""
    return x_nk.device.type == "cpu" and x_nk.dtype in DTYPES


def code(
    x_nk: Tensor, coding: Coding, scales: Tensor | None = None, zeros: Tensor | None = None
) -> list[Tensor]:
    """Tokens that the kernel takes as codes, and where no scales [1 or heads] are given those of
    the tokens, and their zero points if they have any."""
    fixed_s, fixed_z = (
        x_nk.new_empty(0, dtype=torch.float32) if t is None else t.flatten().float().contiguous()
        for t in (scales, zeros)
    )
    if len(fixed_s) not in (0, 1, coding.heads):
        raise KernelError(f"{len(fixed_s)} scales are neither one nor {coding.heads}, as heads are")
    codes, made_s, made_z = OPERATOR(
        x_nk.contiguous(),
        fixed_s,
        fixed_z,
        coding.heads,
        coding.group,
        coding.bits,
        int(coding.in_pairs),
        int(coding.is_symmetric),
        DTYPES.index(coding.scale_dtype),
        coding.share,
    )
    if scales is not None:
        return [codes]
    return [codes, made_s] if coding.is_symmetric else [codes, made_s, made_z]
