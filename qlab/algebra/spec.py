"""Specs: which numbers a quantized weight may hold, and what one scale covers.

A spec is an `Int` or a `Float` with a `Tile`. It has a name such as int4-g64, which `parse_spec`
reads. No other file of qlab knows which numbers exist.
"""

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
    """Integer codes from -2^(bits-1) to 2^(bits-1) - 1, with W = (codes - zeros) * scales.

    Args:
        bits: bits of a code, 1 to 8.
        tile: the weights that share one scale and one zero point.
        symmetric: all zero points are 0, and are not stored.
        scale_dtype: the dtype in which scales are stored; None is that of the weight.
        zero_dtype: the dtype of zero points. int8 zero points are codes; those of a floating-point
            dtype may lie between codes, as HQQ's do.

    Raises:
        QlabError: the tile is no Tile, or bits is not from 1 to 8.

    Example:
        >>> import qlab
        >>> spec = qlab.Int(4, qlab.Tile(1, 64), symmetric=False)
        >>> str(spec), spec.qmin, spec.qmax
        ('int4-g64-asym', -8, 7)
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
        """Half the distance between the lowest and the highest code. max|W| / reach is the scale
        that spreads a symmetric range over all codes."""
        return (self.qmax - self.qmin) / 2

    def nearest_(self, x: Tensor) -> Tensor:
        """Round x, which is in units of the scale, to the nearest code, in place. Ties go to the
        even code, and what is beyond the ends saturates."""
        return x.round_().clamp_(self.qmin, self.qmax)

    def bits_per_weight(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """Stored bits per weight of a weight of this shape and dtype: its codes, scales and zero
        points. An int8 zero point counts as a code, of `bits` bits."""
        per_zero = self.bits if self.zero_dtype == torch.int8 else 8 * self.zero_dtype.itemsize
        per_scale = 8 * (self.scale_dtype or dtype).itemsize
        per_tile = per_scale if self.symmetric else per_scale + per_zero
        return self.bits + per_tile * _scales_per_weight(self.tile, shape)

    def __str__(self) -> str:
        return f"int{self.bits}-{self.tile}" + ("" if self.symmetric else "-asym")


def _scales_per_weight(tile: Tile, shape: torch.Size) -> float:
    return math.prod(tile.scales_shape(shape)) / math.prod(shape)


@dataclass(frozen=True)
class Float:
    """Floating-point codes, with W = codes * scales, or W = codes * (scales / outer).

    Codes are values: every number of a narrower format is also one of e4m3, the dtype that holds
    them.

    Args:
        exponent: bits of the exponent.
        mantissa: bits of the mantissa, beside which a code has 1 bit of sign.
        tile: the weights that share one scale.
        scale_dtype: the dtype in which scales are stored, float8_e8m0fnu for powers of two (OCP
            MX); None is that of the weight.
        outer: scales are divided by one fp32 global scale per weight (NVFP4).

    Raises:
        QlabError: no known format has these bits of exponent and mantissa.
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
        """The largest code. max|W| / reach is the scale that spreads a range over all codes."""
        return self.max

    def nearest_(self, x: Tensor) -> Tensor:
        """Round x, which is in units of the scale, to the nearest code, in place. Ties go to the
        even code, and what is beyond the ends saturates.

        As in compressed-tensors -0 becomes +0, and a small negative number becomes -0.
        """
        x.add_(0.0).clamp_(-self.max, self.max)
        if self.bits == 8:
            return x.copy_(x.to(self.code_dtype))
        # Codes of e2m1 and e2m3 below 2 are subnormal or in the first binade. Both have one step.
        step = torch.exp2((x.frexp().exponent - 1).clamp_(min=0) - self.mantissa).to(x.dtype)
        return x.div_(step).round_().mul_(step)

    def global_scale(self, absmax: Tensor) -> Tensor:
        """outer = max(scale dtype) * max / absmax, [...] -> [..., 1]: it makes the largest scale
        the largest number of its dtype."""
        assert self.outer and self.scale_dtype is not None
        largest = torch.finfo(self.scale_dtype).max * self.max
        outer = largest / absmax.float().clamp_min(torch.finfo(torch.float32).tiny)
        return outer.nan_to_num_(nan=1.0, posinf=1.0)[..., None]

    def bits_per_weight(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """Stored bits per weight of a weight of this shape and dtype: its codes and scales. The
        outer scale, of which a weight has one, is left out."""
        per_scale = 8 * (self.scale_dtype or dtype).itemsize
        return self.bits + per_scale * _scales_per_weight(self.tile, shape)

    def __str__(self) -> str:
        names = [name for name, spec in NAMED.items() if spec == self]
        return names[0] if names else f"fp{self.bits}-{self.tile}"


# e4m3 has no infinities; e2m3 and e2m1 (OCP MX) have neither infinities nor NaN
_MAX = {(4, 3): 448.0, (2, 3): 7.5, (2, 1): 6.0}
FLOATS = {"fp8": (4, 3), "fp6": (2, 3), "fp4": (2, 1)}
Spec = Int | Float


def scales_of(spec: Spec, shape: torch.Size) -> int:
    """How many scales a weight of this shape has."""
    return round(_scales_per_weight(spec.tile, shape) * shape.numel())


_NAME = re.compile(
    r"(?P<kind>int|fp)(?P<bits>[0-9]+)-"
    r"(?:g(?P<group>[0-9]{1,9})|b(?P<rows>[0-9]{1,9})x(?P<cols>[0-9]{1,9})"
    r"|(?P<whole>channel|tensor))"
    r"(?P<asym>-asym)?"
)


def parse_spec(text: str, symmetric: bool = True) -> Spec:
    """The spec that a name means, in upper or lower case: number, bits and what one scale covers.

    Integers: int4-g64 (groups of 64), int8-channel, int8-tensor, int4-b128x128 (blocks), each with
    -asym for zero points. Floats: fp8-tensor, fp8-channel, fp8-b128x128, and by the names of their
    formats mxfp4, mxfp6, mxfp8 (OCP MX: groups of 32, scales are powers of two) and nvfp4 (groups
    of 16, e4m3 scales under one global scale). Engines' names of formats whose inputs stay dense
    are read as well: w4a16, w4a16_asym, w8a16, nvfp4a16, mxfp4a16.

    Args:
        text: the name.
        symmetric: False adds zero points, as -asym does.

    Returns:
        The spec, an Int or a Float, with scales in the dtype of the weight or of the format.

    Raises:
        QlabError: the name is unknown, or asks for zero points of floats or for groups of 0.

    Example:
        >>> import qlab
        >>> qlab.parse_spec("int4-g64-asym")
        Int(bits=4, tile=Tile(rows=1, cols=64), symmetric=False, scale_dtype=None, ...)
        >>> str(qlab.parse_spec("W8A16"))
        'int8-channel'
    """
    text = text.lower() if text.isascii() else text
    text = ALIASES.get(text, text)
    if not symmetric and (text in NAMED or text.startswith("fp")):
        raise QlabError(f"spec {text!r} has no zero point; only integers are asymmetric")
    if text in NAMED:
        return NAMED[text]
    match = _NAME.fullmatch(text)
    if not match or (
        match["kind"] == "fp" and (f"fp{match['bits']}" not in FLOATS or match["asym"])
    ):
        raise QlabError(
            f"spec {text[:40]!r} is unknown; write int<bits>-g<group>, int<bits>-channel or "
            f"int<bits>-tensor, such as int4-g64, or fp8-channel, fp8-b128x128, {', '.join(NAMED)}"
        )
    tile = _tile_named(text, match)
    if match["kind"] == "fp":
        return Float(*FLOATS[f"fp{match['bits']}"], tile)
    return Int(int(match["bits"]), tile, symmetric and not match["asym"])


def _tile_named(text: str, match: re.Match[str]) -> Tile:
    group, rows, cols = match["group"], match["rows"], match["cols"]
    if any(size is not None and int(size) < 1 for size in (group, rows, cols)):
        raise QlabError(
            f"spec {text!r} asks for groups of {group or f'{rows}x{cols}'}; a group holds at "
            "least one input channel"
        )
    if group:
        return Tile(1, int(group))
    if rows:
        return Tile(int(rows), int(cols))
    return Tile(1 if match["whole"] == "channel" else None, None)


# What engines call these formats of weights. Inputs stay dense in them.
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
    """The spec with a scale dtype: its own, or `dtype` where it leaves that open."""
    return spec if spec.scale_dtype else replace(spec, scale_dtype=dtype)


def same_grid(a: Spec, b: Spec) -> bool:
    """Whether two specs are equal; an open scale dtype equals any."""
    dtype = a.scale_dtype or b.scale_dtype or torch.float32
    return with_scale_dtype(a, dtype) == with_scale_dtype(b, dtype)


def described(spec: Spec) -> str:
    """The name of a spec, or all of its fields where the name stands for another spec, as with
    scales or zero points in a dtype of their own."""
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
    """How the input x of a linear layer is rounded at run time.

    spec: its tiles lie over x [tokens, channels], so that a token is a row. static: the one scale
    (of NVFP4: the outer scale) is fixed and stored; otherwise scales are computed from each x.
    """

    spec: Spec
    static: bool = False

    def __str__(self) -> str:
        return f"{self.spec}{' static' if self.static else ''}"


def parse_input_spec(text: str) -> InputSpec:
    """The input spec of a name: a spec's name, in which -token is another word for -channel, and
    " static" behind it for a stored scale. Examples: int8-token, fp8-tensor static."""
    name, _, static = text.partition(" ")
    if static not in ("", "static"):
        raise QlabError(
            f"input spec {text!r} is unknown; write a spec such as fp8-token, with ' static' for "
            "a stored scale"
        )
    return InputSpec(parse_spec(re.sub(r"-token\b", "-channel", name)), bool(static))
