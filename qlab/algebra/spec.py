"""Number grids. Nothing else in qlab knows which numbers exist."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlab.algebra.tile import Tile, is_size
from qlab.errors import QlabError


@dataclass(frozen=True)
class Int:
    """Integer codes in [-2^(bits-1), 2^(bits-1) - 1]; W = (codes - zeros) * scales.

    symmetric: zeros are all 0 and not stored. scale_dtype: how scales are stored; None is the
    weight's own dtype. zero_dtype: int8 zeros are codes of the grid; a float dtype lets them lie
    between codes (HQQ).
    """

    bits: int
    tile: Tile
    symmetric: bool = True
    scale_dtype: torch.dtype | None = None
    zero_dtype: torch.dtype = torch.int8

    code_dtype: ClassVar[torch.dtype] = torch.int8
    outer: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.tile, Tile):
            raise QlabError(
                f"the tile of an Int is a {type(self.tile).__name__}; give a Tile, such as "
                "Tile(1, 64)"
            )
        if not is_size(self.bits) or not 1 <= self.bits <= 8:
            raise QlabError(f"int{self.bits!r:.40} is not a grid qlab knows; bits go from 1 to 8")

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def reach(self) -> float:
        """max|W| / reach is the scale that spreads a symmetric range over all codes: half the
        distance between the ends."""
        return (self.qmax - self.qmin) / 2

    def nearest_(self, x: Tensor) -> Tensor:
        """x, in units of the scale, moved to the nearest code, ties to even, saturating at the
        ends. In place."""
        return x.round_().clamp_(self.qmin, self.qmax)

    def bits_per_weight(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """Stored bits per weight: codes, scales in their dtype, and zero points of `bits` bits
        each."""
        per_zero = self.bits if self.zero_dtype == torch.int8 else 8 * self.zero_dtype.itemsize
        per_scale = 8 * (self.scale_dtype or dtype).itemsize + (0 if self.symmetric else per_zero)
        return self.bits + per_scale * _scales_per_weight(self.tile, shape)

    def __str__(self) -> str:
        return f"int{self.bits}-{self.tile}" + ("" if self.symmetric else "-asym")


def _scales_per_weight(tile: Tile, shape: torch.Size) -> float:
    return math.prod(tile.scales_shape(shape)) / math.prod(shape)


@dataclass(frozen=True)
class Float:
    """Floating-point codes of 1 sign, `exponent` and `mantissa` bits; W = codes * scales, or codes
    * (scales / outer).

    Codes hold the value itself in e4m3, into which every narrower one fits exactly. outer: scales
    are relative to one fp32 global scale per weight (NVFP4), by which they are divided. scale_dtype
    float8_e8m0fnu: powers of two (OCP MX).
    """

    exponent: int
    mantissa: int
    tile: Tile
    scale_dtype: torch.dtype | None = None
    outer: bool = False

    symmetric: ClassVar[bool] = True
    code_dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn

    def __post_init__(self) -> None:
        if (self.exponent, self.mantissa) not in _MAX:
            raise QlabError(
                f"e{self.exponent}m{self.mantissa} is not a float qlab knows; it knows "
                f"{', '.join(f'e{e}m{m}' for e, m in _MAX)}"
            )

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def max(self) -> float:
        return _MAX[self.exponent, self.mantissa]

    @property
    def reach(self) -> float:
        """max|W| / reach is the scale that maps a range onto all codes."""
        return self.max

    def nearest_(self, x: Tensor) -> Tensor:
        """x, in units of the scale, moved to the nearest code, ties to even, saturating at the
        ends. In place.

        A zero of either sign becomes +0, while what is rounded down to zero keeps its sign
        (compressed-tensors).
        """
        x.add_(0.0).clamp_(-self.max, self.max)
        if self.bits == 8:
            return x.copy_(x.to(self.code_dtype))
        # below 2 the numbers of e2m1 and e2m3 are subnormal or in the first binade, which have the
        # same step
        step = torch.exp2((x.frexp().exponent - 1).clamp_(min=0) - self.mantissa).to(x.dtype)
        return x.div_(step).round_().mul_(step)

    def global_scale(self, absmax: Tensor) -> Tensor:
        """outer = (448 * max) / absmax: it takes the largest group's scale to the end of e4m3.
        absmax [...] -> [..., 1]."""
        assert self.outer and self.scale_dtype is not None
        largest = torch.finfo(self.scale_dtype).max * self.max
        outer = largest / absmax.float().clamp_min(torch.finfo(torch.float32).tiny)
        return outer.nan_to_num_(nan=1.0, posinf=1.0)[..., None]

    def bits_per_weight(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """Stored bits per weight: codes and scales in their dtype; one outer scale per weight does
        not show."""
        return self.bits + 8 * (self.scale_dtype or dtype).itemsize * _scales_per_weight(
            self.tile, shape
        )

    def __str__(self) -> str:
        named = [name for name, spec in NAMED.items() if spec == self]
        return named[0] if named else f"fp{self.bits}-{self.tile}"


# e4m3 has no infinities; e2m3 and e2m1 (OCP MX) have neither infinities nor NaN
_MAX = {(4, 3): 448.0, (2, 3): 7.5, (2, 1): 6.0}
FLOATS = {"fp8": (4, 3), "fp6": (2, 3), "fp4": (2, 1)}
Spec = Int | Float


def parse_spec(text: str, symmetric: bool = True) -> Spec:
    """The spec that a name means, in upper or lower case. Integers: 'int4-g64', 'int8-channel',
    'int8-tensor', with '-asym' for a zero point.

    Floats: 'fp8-tensor', 'fp8-channel', 'fp8-b128x128', 'mxfp4', 'mxfp6', 'mxfp8' (groups of 32,
    power-of-two scales:
    OCP MX) and 'nvfp4' (groups of 16, e4m3 scales under one global scale).
    """
    text = text.lower() if text.isascii() else text
    text = ALIASES.get(text, text)
    if not symmetric and (text in NAMED or text.startswith("fp")):
        raise QlabError(f"spec {text!r} has no zero point; only integers are asymmetric")
    if text in NAMED:
        return NAMED[text]
    match = re.fullmatch(
        r"(int|fp)([0-9]+)-(?:g([0-9]{1,9})|b([0-9]{1,9})x([0-9]{1,9})|(channel)|(tensor))(-asym)?",
        text,
    )
    if not match or (match[1] == "fp" and (f"fp{match[2]}" not in FLOATS or match[8])):
        raise QlabError(
            f"spec {text[:40]!r} is unknown; write int<bits>-g<group>, int<bits>-channel or "
            f"int<bits>-tensor, such as int4-g64, or fp8-channel, fp8-b128x128, {', '.join(NAMED)}"
        )
    kind, bits, group, rows, cols, channel, _, asym = match.groups()
    if any(size is not None and int(size) < 1 for size in (group, rows, cols)):
        raise QlabError(
            f"spec {text!r} asks for groups of {group or f'{rows}x{cols}'}; a group holds at "
            "least one input channel"
        )
    tile = (
        Tile(1, int(group))
        if group
        else Tile(int(rows), int(cols))
        if rows
        else Tile(1 if channel else None, None)
    )
    return (
        Int(int(bits), tile, symmetric and not asym)
        if kind == "int"
        else Float(*FLOATS[f"fp{bits}"], tile)
    )


# what engines call weights in these formats, whose inputs stay as they are
ALIASES = {
    "w4a16": "int4-g128",
    "w4a16_asym": "int4-g128-asym",
    "w8a16": "int8-channel",
    "nvfp4a16": "nvfp4",
    "mxfp4a16": "mxfp4",
}
NAMED: dict[str, Spec] = {
    "mxfp4": Float(2, 1, Tile(1, 32), torch.float8_e8m0fnu),
    "mxfp6": Float(2, 3, Tile(1, 32), torch.float8_e8m0fnu),
    "mxfp8": Float(4, 3, Tile(1, 32), torch.float8_e8m0fnu),
    "nvfp4": Float(2, 1, Tile(1, 16), torch.float8_e4m3fn, outer=True),
}


def with_scale_dtype(spec: Spec, dtype: torch.dtype) -> Spec:
    """The spec with its scale dtype settled: its own where stated, else the weight's."""
    return spec if spec.scale_dtype else replace(spec, scale_dtype=dtype)


def same_grid(a: Spec, b: Spec) -> bool:
    """Whether two specs are one, where either leaves the dtype of its scales open."""
    dtype = a.scale_dtype or b.scale_dtype or torch.float32
    return with_scale_dtype(a, dtype) == with_scale_dtype(b, dtype)


def described(spec: Spec) -> str:
    """Its name, or all of it where the name stands for another one: scales or zero points in a
    dtype of their own."""
    return str(spec) if parse_spec(str(spec)) == spec else repr(spec)


def spec_json(spec: Spec) -> dict[str, Any]:
    """The spec as plain data, of which `spec_from_json` makes the same spec again.

    "spec" is its name. What the name leaves open follows where it is not the default: "scale" and
    "zero" are dtypes, "outer" is True for scales under a global one, and "tile" is [rows, columns]
    where one of them is the whole axis and no name has both.
    """
    rows, cols = spec.tile.rows, spec.tile.cols
    has_name = rows == 1 or (rows is None) == (cols is None)
    text = str(spec if has_name else replace(spec, tile=Tile(None, None)))
    named = parse_spec(text)
    data: dict[str, Any] = {"spec": text}
    if not has_name:
        data["tile"] = [rows, cols]
    if spec.scale_dtype not in (None, named.scale_dtype):
        data["scale"] = str(spec.scale_dtype).removeprefix("torch.")
    if isinstance(spec, Int) and spec.zero_dtype != torch.int8:
        data["zero"] = str(spec.zero_dtype).removeprefix("torch.")
    if spec.outer != named.outer:
        data["outer"] = spec.outer
    return data


def spec_from_json(data: Mapping[str, Any]) -> Spec:
    """The spec of which `spec_json` made this data; other entries are not read."""
    spec = parse_spec(data["spec"])
    if "tile" in data:
        spec = replace(spec, tile=Tile(*data["tile"]))
    if "scale" in data:
        spec = replace(spec, scale_dtype=_dtype_named(data["scale"]))
    if isinstance(spec, Float):
        return replace(spec, outer=data.get("outer", spec.outer))
    return replace(spec, zero_dtype=_dtype_named(data.get("zero", "int8")))


def _dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise QlabError(f"{name!r:.40} is no dtype of torch; write one such as float32")
    return dtype


@dataclass(frozen=True)
class InputSpec:
    """How the input of a site is rounded at run time: the spec's tiles lie over x [tokens,
    channels].

    static: the one scale (NVFP4: the outer scale) was fixed beforehand and is stored; else it is
    found for the x at hand.
    """

    spec: Spec
    static: bool = False

    def __str__(self) -> str:
        return f"{self.spec}{' static' if self.static else ''}"


def parse_input_spec(text: str) -> InputSpec:
    """'int8-token', 'fp8-token', 'fp8-tensor static', or another spec over [tokens, channels]; a
    token is a row."""
    name, _, static = text.partition(" ")
    if static not in ("", "static"):
        raise QlabError(
            f"input spec {text!r} is unknown; write a spec such as fp8-token, with ' static' for "
            "a stored scale"
        )
    return InputSpec(parse_spec(re.sub(r"-token\b", "-channel", name)), bool(static))
