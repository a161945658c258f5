"""Keys or values of a cache as codes (`Cached`), how bytes hold 4-bit ones, and what a kernel reads
in the place of a code."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab_kernels.capability import KernelError

Format = Literal["int8", "fp8", "int4"]
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
NIBBLE_OFFSET = 8  # of a 4-bit code in its byte


@dataclass(frozen=True, kw_only=True)
class Cached:
    """Keys or values x[b, h, n, d] = (code - zero) * scale.

    codes: [b, h, n, d] in int8 or float8_e4m3fn; 4-bit ones uint8 [b, h, n, ceil(d / 2)] as
    `pack_nibbles` makes them. With a page table the first axis counts pages, and n positions of a
    page. scales: fp32 [b, h, n, groups], of which every axis may be expanded; zeros: of the same
    shape and strides, or None. channels: d, of which each group has as many.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    channels: int
    format: Format

    def __post_init__(self) -> None:
        width = -(-self.channels // 2) if self.format == "int4" else self.channels
        shape, dtype = tuple(self.codes.shape), DTYPES[self.format]
        if self.codes.dtype != dtype or self.codes.ndim != 4 or shape[-1] != width:
            raise KernelError(
                f"codes of {self.channels} channels as {self.format} are {dtype} [b, h, n, {width}]"
                f", not {self.codes.dtype} {shape}"
            )
        if self.scales.ndim != 4 or self.scales.shape[:3] != self.codes.shape[:3]:
            raise KernelError(
                f"codes {shape} have scales [{shape[0]}, {shape[1]}, {shape[2]}, groups], not "
                f"{tuple(self.scales.shape)}: expand them"
            )
        if self.channels % self.scales.shape[-1]:
            raise KernelError(
                f"{self.scales.shape[-1]} scales do not divide {self.channels} channels of a head"
            )
        if self.zeros is not None and (
            self.zeros.shape != self.scales.shape or self.zeros.stride() != self.scales.stride()
        ):
            raise KernelError("zero points have another shape or other strides than scales")

    @property
    def group(self) -> int:
        """Channels that share a scale, or 0 where all of a head do."""
        groups = self.scales.shape[-1]
        return 0 if groups == 1 else self.channels // groups

    @property
    def width(self) -> int:
        """Bytes of the codes of a head."""
        return self.codes.shape[-1]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes -8..7 [..., d] -> uint8 [..., ceil(d / 2)]: byte j holds code j in its low bits and
    code j + ceil(d / 2) in its high ones, each with 8 added."""
    d = codes.shape[-1]
    half = -(-d // 2)
    padded = F.pad(codes, (0, 1)) if d % 2 else codes
    whole = padded.to(torch.int8).view(torch.uint8) + NIBBLE_OFFSET  # -8 + 8 comes round to 0
    return whole[..., :half] | whole[..., half:] << 4


def unpack_nibbles(octets: Tensor, channels: int) -> Tensor:
    """uint8 [..., ceil(d / 2)] -> codes -8..7 int8 [..., d]."""
    both = torch.cat((octets & 15, octets >> 4), -1)[..., :channels]
    return both.to(torch.int8) - NIBBLE_OFFSET


def numbers(cached: Cached, dtype: torch.dtype) -> Tensor:
    """x [b, h, n, d] = (code - zero) * scale, computed in the dtype."""
    codes = cached.codes
    if cached.format == "int4":
        codes = unpack_nibbles(codes, cached.channels)
    x = codes.to(dtype).unflatten(-1, (cached.scales.shape[-1], -1))
    if cached.zeros is not None:
        x = x - cached.zeros.to(dtype)[..., None]
    return (x * cached.scales.to(dtype)[..., None]).flatten(-2)


def decoding(format: Format, compute: torch.dtype) -> tuple[float, float]:
    """(offset, unit) of what a kernel reads in the place of a code in a dtype: code = unit * v -
    offset, where one of them changes nothing."""
    if format == "fp8":
        return 0.0, 256.0
    exponents = {torch.float16: 1024.0, torch.bfloat16: 128.0, torch.float32: 0.0}
    if format == "int4":
        return exponents[compute] + NIBBLE_OFFSET, 1.0
    return (1024.0 + 128.0 if compute == torch.float16 else 0.0), 1.0
