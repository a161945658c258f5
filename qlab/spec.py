"""Number grids and what one scale covers. Nothing else in qlab knows which numbers exist."""

import re
from dataclasses import dataclass, replace

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
    """

    bits: int
    tile: Tile
    symmetric: bool = True
    scale_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise QlabError(f"int{self.bits} is not a grid qlab rounds to; bits go from 2 to 8")

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def bits_per_weight(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """Stored bits per weight: codes, scales in their dtype, and zero points of `bits` bits each."""
        per_scale = 8 * (self.scale_dtype or dtype).itemsize + (0 if self.symmetric else self.bits)
        rows, cols = self.tile.sizes(shape)
        return self.bits + per_scale / (rows * cols)

    def __str__(self) -> str:
        return f"int{self.bits}-{self.tile}" + ("" if self.symmetric else "-asym")


Spec = Int


def parse_spec(text: str, symmetric: bool = True) -> Spec:
    """'int4-g64', 'int8-channel', 'int8-tensor', with '-asym' for a zero point -> Spec."""
    match = re.fullmatch(r"int(\d+)-(?:g(\d+)|(channel)|(tensor))(-asym)?", text)
    if not match:
        raise QlabError(
            f"spec {text!r} is unknown; write int<bits>-g<group>, int<bits>-channel or int<bits>-tensor, such as int4-g64"
        )
    bits, group, channel, _, asym = match.groups()
    if group is not None and int(group) < 1:
        raise QlabError(f"spec {text!r} asks for groups of {group}; a group holds at least one input channel")
    tile = Tile(1, int(group)) if group else Tile(1, None) if channel else Tile(None, None)
    return Int(int(bits), tile, symmetric and not asym)


def with_scale_dtype(spec: Spec, dtype: torch.dtype) -> Spec:
    """The spec with its scale dtype settled: its own where stated, else the weight's."""
    return spec if spec.scale_dtype else replace(spec, scale_dtype=dtype)
