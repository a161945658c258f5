"""Number grids and what one scale covers. Nothing else in qlab knows which numbers exist."""

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from qlab.errors import QlabError


@dataclass(frozen=True)
class Tile:
    """The rows and columns of a weight that one scale covers; None is the whole axis.

    tensor = Tile(None, None), channel = Tile(1, None), group of g = Tile(1, g), 2-D block = Tile(128, 128).
    Leading axes (experts) always have scales of their own.
    """

    rows: int | None
    cols: int | None

    pattern = "... (a r) (g k) -> ... a g (r k)"

    def split(self, W_ok: Tensor) -> Tensor:
        """[..., o, k] -> [..., a, g, n]: the n numbers under scale [a, g]."""
        r, k = self.sizes(W_ok.shape)
        return rearrange(W_ok, self.pattern, r=r, k=k)

    def join(self, x_agn: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of split, for a weight of the given shape."""
        r, k = self.sizes(shape)
        return rearrange(x_agn, "... a g (r k) -> ... (a r) (g k)", r=r, k=k)

    def sizes(self, shape: torch.Size) -> tuple[int, int]:
        """Rows and columns under one scale of a weight [..., o, k]; refuses a tile that does not divide it."""
        o, k = shape[-2:]
        rows, cols = self.rows or o, self.cols or k
        if k % cols:
            raise QlabError(
                f"groups of {cols} do not divide the {k} input channels of a weight {tuple(shape)}; "
                f"legal groups here are {', '.join(map(str, legal_groups(k)))} or 'channel'"
            )
        if o % rows:
            raise QlabError(f"tiles of {rows} rows do not divide the {o} rows of a weight {tuple(shape)}")
        return rows, cols

    def scales_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Shape of the scales of a weight [..., o, k]: [..., a, g]."""
        rows, cols = self.sizes(shape)
        return (*shape[:-2], shape[-2] // rows, shape[-1] // cols)

    def __str__(self) -> str:
        named: dict[tuple[int | None, int | None], str] = {(None, None): "tensor", (1, None): "channel"}
        if (self.rows, self.cols) in named:
            return named[self.rows, self.cols]
        return f"g{self.cols}" if self.rows == 1 else f"b{self.rows}x{self.cols}"


def legal_groups(k: int) -> list[int]:
    """The group sizes that kernels know and that divide k."""
    return [g for g in (16, 32, 64, 128, 256) if k % g == 0]


@dataclass(frozen=True)
class Int:
    """Integer codes in [-2^(bits-1), 2^(bits-1) - 1]; W = (codes - zeros) * scales.

    symmetric: zeros are all 0 and not stored. scale_dtype: how scales are stored; None is the weight's own dtype.
    zero_dtype: int8 zeros are codes of the grid; a float dtype lets them lie between codes (HQQ).
    """

    bits: int
    tile: Tile
    symmetric: bool = True
    scale_dtype: torch.dtype | None = None
    zero_dtype: torch.dtype = torch.int8

    code_dtype: ClassVar[torch.dtype] = torch.int8

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise QlabError(f"int{self.bits} is not a grid qlab knows; bits go from 1 to 8")

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def bits_per_weight(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """Stored bits per weight: codes, scales in their dtype, and zero points of `bits` bits each."""
        per_zero = self.bits if self.zero_dtype == torch.int8 else 8 * self.zero_dtype.itemsize
        per_scale = 8 * (self.scale_dtype or dtype).itemsize + (0 if self.symmetric else per_zero)
        rows, cols = self.tile.sizes(shape)
        return self.bits + per_scale / (rows * cols)

    def __str__(self) -> str:
        return f"int{self.bits}-{self.tile}" + ("" if self.symmetric else "-asym")


@dataclass(frozen=True)
class Float:
    """Floating-point codes of 1 sign, `exponent` and `mantissa` bits; W = codes * scales, or codes * (scales / outer).

    Codes hold the value itself in an 8-bit float, which every narrower one fits into exactly. max: the largest finite
    value. outer: scales are relative to one global scale per weight (NVFP4), by which they are divided.
    """

    exponent: int
    mantissa: int
    tile: Tile
    scale_dtype: torch.dtype | None = None
    outer: bool = False

    symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.exponent, self.mantissa) not in _MAX:
            raise QlabError(f"e{self.exponent}m{self.mantissa} is not a float qlab knows; it knows "
                            f"{', '.join(f'e{e}m{m}' for e, m in _MAX)}")

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def max(self) -> float:
        return _MAX[self.exponent, self.mantissa]

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.float8_e5m2 if (self.exponent, self.mantissa) == (5, 2) else torch.float8_e4m3fn

    def bits_per_weight(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """Stored bits per weight: codes and scales in their dtype; one outer scale per weight does not show."""
        rows, cols = self.tile.sizes(shape)
        return self.bits + 8 * (self.scale_dtype or dtype).itemsize / (rows * cols)

    def __str__(self) -> str:
        if self.outer:
            return "nvfp4"
        if self.scale_dtype == torch.float8_e8m0fnu:
            return f"mxfp{self.bits}"
        return f"fp{self.bits}-{self.tile}"


# e4m3 has no infinities; e2m3 and e2m1 (OCP MX) have neither infinities nor NaN
_MAX = {(4, 3): 448.0, (5, 2): 57344.0, (2, 3): 7.5, (2, 1): 6.0}
FLOATS = {"fp8": (4, 3), "fp6": (2, 3), "fp4": (2, 1)}
Spec = Int | Float


def parse_spec(text: str, symmetric: bool = True) -> Spec:
    """The spec that a name means. Integers: 'int4-g64', 'int8-channel', 'int8-tensor', with '-asym' for a zero point.

    Floats: 'fp8-tensor', 'fp8-channel', 'fp8-b128x128', 'mxfp4', 'mxfp6', 'mxfp8' (groups of 32, power-of-two scales:
    OCP MX) and 'nvfp4' (groups of 16, e4m3 scales under one global scale).
    """
    if text in NAMED:
        return NAMED[text]
    match = re.fullmatch(r"(int|fp)(\d+)-(?:g(\d+)|b(\d+)x(\d+)|(channel)|(tensor))(-asym)?", text)
    if not match or (match[1] == "fp" and (f"fp{match[2]}" not in FLOATS or match[8])):
        raise QlabError(
            f"spec {text!r} is unknown; write int<bits>-g<group>, int<bits>-channel or int<bits>-tensor, such as int4-g64, "
            f"or fp8-channel, fp8-b128x128, {', '.join(NAMED)}"
        )
    kind, bits, group, rows, cols, channel, _, asym = match.groups()
    if any(size is not None and int(size) < 1 for size in (group, rows, cols)):
        raise QlabError(f"spec {text!r} asks for groups of {group or f'{rows}x{cols}'}; a group holds at least one input channel")
    tile = Tile(1, int(group)) if group else Tile(int(rows), int(cols)) if rows else Tile(1 if channel else None, None)
    return Int(int(bits), tile, symmetric and not asym) if kind == "int" else Float(*FLOATS[f"fp{bits}"], tile)


NAMED: dict[str, Spec] = {
    "mxfp4": Float(2, 1, Tile(1, 32), torch.float8_e8m0fnu),
    "mxfp6": Float(2, 3, Tile(1, 32), torch.float8_e8m0fnu),
    "mxfp8": Float(4, 3, Tile(1, 32), torch.float8_e8m0fnu),
    "nvfp4": Float(2, 1, Tile(1, 16), torch.float8_e4m3fn, outer=True),
}


def with_scale_dtype(spec: Spec, dtype: torch.dtype) -> Spec:
    """The spec with its scale dtype settled: its own where stated, else the weight's."""
    return spec if spec.scale_dtype else replace(spec, scale_dtype=dtype)
