"""Keys or values of a cache as numbers, on a CPU: `read_tokens.cpp`, which reads the codes that
`code_tokens` writes in the slots where they lie; bit for bit `qlab.lowering.around.coded_heads`,
but for which NaN a NaN is.

    x = (c - z) s, in fp32

    qlab::read_tokens_of_cpu(codes, scales, zeros, at, channels, is_float, is_half, path) -> x
        codes [slots, h, d or ceil(d / 2)] of d channels; scales [slots or 1, h or 1, groups];
        zeros int8 like them, or empty; at [b, l], slots; x [b, l, h, d], in bfloat16 if is_half,
        else fp32; path a number of `compiled.PATHS`

The library registers the operator when it is loaded, so that a compiled graph calls it without
Python. It has no gradient.
"""

from pathlib import Path

import torch
from torch import Tensor

from qlab_kernels.compiled import PATHS, paths_of, registered

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.float32, torch.bfloat16)  # of numbers
SCALES = (torch.float32, torch.float16, torch.bfloat16)

torch.library.define(
    "qlab::read_tokens_of_cpu",
    "(Tensor codes, Tensor scales, Tensor zeros, Tensor at, int channels, int is_float, "
    "int is_half, int path) -> Tensor",
)
OPERATOR = torch.ops.qlab.read_tokens_of_cpu.default


@torch.library.register_fake("qlab::read_tokens_of_cpu")
def _(codes, scales, zeros, at, channels, is_float, is_half, path):
    shape = (*at.shape, codes.shape[1], channels)
    return scales.new_empty(shape, dtype=DTYPES[is_half])


def why_not() -> str | None:
    """Load the kernel and give torch its operator. Why there is none, or None."""
    return registered(SOURCE)


def supported() -> tuple[str, ...]:
    """The paths that this processor runs, from the slowest to the fastest."""
    return paths_of(SOURCE)


def takes(codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the kernel makes numbers of the dtype out of these: contiguous and on a CPU."""
    parts = [codes, scales] if zeros is None else [codes, scales, zeros]
    are_plain = all(part.device.type == "cpu" and part.is_contiguous() for part in parts)
    is_known = scales.dtype in SCALES and (zeros is None or zeros.dtype == torch.int8)
    return are_plain and is_known and dtype in DTYPES


def read(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    at_bl: Tensor,
    dtype: torch.dtype,
    *,
    channels: int,
    is_float: bool,
    path: str = "best",
) -> Tensor:
    """x [b, l, h, d] of the tokens in slots, whose codes, scales and zero points the kernel takes.

    channels: d. is_float: whether bytes are e4m3 and no pairs of 4-bit codes. path: one of
    `supported()`, or the best.
    """
    none = scales.new_empty(0, dtype=torch.int8) if zeros is None else zeros
    numbers = (channels, int(is_float), DTYPES.index(dtype), PATHS.index(path))
    return OPERATOR(codes, scales, none, at_bl.contiguous(), *numbers)
