"""Which weights share one scale: a tile of rows and columns.

Legend: W_ok a weight of o output and k input channels; [a, g] its scales, a tiles down and g tiles
across; n the weights in one tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from qlab.errors import QlabError


@dataclass(frozen=True)
class Tile:
    """The rows and columns of a weight [..., o, k] that share one scale.

    Tile(None, None) is the whole tensor, Tile(1, None) an output channel, Tile(1, 64) a group of 64
    input channels, Tile(128, 128) a block. Each expert [e, o, k] has its own scales. Tiles that
    reach over the lower or right edge are filled up with zeros. qlab rounds only to groups that
    divide k, but reads files of other writers whose groups do not.

    Args:
        rows: output channels under one scale, at least 1; None for all of them.
        cols: input channels under one scale, at least 1; None for all of them.

    Raises:
        QlabError: a size is not a whole number of at least 1.

    Example:
        >>> import qlab, torch
        >>> tile = qlab.Tile(1, 64)
        >>> str(tile), tile.scales_shape(torch.Size([96, 256]))
        ('g64', (96, 4))
    """

    rows: int | None
    cols: int | None

    pattern: ClassVar[str] = "... (a r) (g k) -> ... a g (r k)"
    inverse: ClassVar[str] = "... a g (r k) -> ... (a r) (g k)"

    def __post_init__(self) -> None:
        for size in (self.rows, self.cols):
            if size is not None and (not is_size(size) or size < 1):
                raise QlabError(
                    f"a tile of {self.rows!r:.40} x {self.cols!r:.40}; give whole numbers of at "
                    "least 1, or None for all"
                )

    def split(self, W_ok: Tensor) -> Tensor:
        """[..., o, k] -> [..., a, g, n]: the n weights under each scale, with zeros where a tile
        reaches over the edge."""
        rows, cols = self.sizes(W_ok.shape)
        o, k = W_ok.shape[-2:]
        if o % rows or k % cols:
            W_ok = F.pad(W_ok, (0, -k % cols, 0, -o % rows))
        return rearrange(W_ok, self.pattern, r=rows, k=cols)

    def join(self, x_agn: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of split, for a weight of the given shape."""
        rows, cols = self.sizes(shape)
        W_ok = rearrange(x_agn, self.inverse, r=rows, k=cols)
        if W_ok.shape == shape:
            return W_ok
        return W_ok[..., : shape[-2], : shape[-1]].contiguous()

    def sizes(self, shape: torch.Size) -> tuple[int, int]:
        """Rows and columns under one scale of a weight [..., o, k]."""
        o, k = shape[-2:]
        return self.rows or o, self.cols or k

    def parts(self, shape: torch.Size, count: int) -> Iterator[tuple[slice, slice]]:
        """The rows of a weight [o, k] in parts of about `count` numbers that share no scale, each
        with the rows of its scales [a, g]."""
        o, k = shape
        rows = self.sizes(shape)[0]
        tiles = max(1, count // (rows * k))
        for first in range(0, -(-o // rows), tiles):
            last = first + tiles
            yield slice(first * rows, min(last * rows, o)), slice(first, last)

    def check(self, shape: torch.Size) -> None:
        """Refuse groups that do not divide the input channels of a weight [..., o, k] that is to be
        rounded."""
        k = shape[-1]
        cols = self.cols or k
        if self.rows in (None, 1) and k % cols:
            groups = ", ".join(map(str, legal_groups(k)))
            legal = f"legal groups here are {groups} or" if groups else "the only legal one here is"
            raise QlabError(
                f"groups of {cols} do not divide the {k} input channels of a weight "
                f"{tuple(shape)}; {legal} 'channel'"
            )

    def scales_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Shape of the scales of a weight [..., o, k]: [..., a, g]."""
        rows, cols = self.sizes(shape)
        return (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // cols))

    def __str__(self) -> str:
        if self.rows is None and self.cols is None:
            return "tensor"
        if self.rows != 1:
            return f"b{self.rows}x{self.cols}"
        return "channel" if self.cols is None else f"g{self.cols}"


def is_size(size: object) -> bool:
    """Whether this is an int, which a bool is not here."""
    return isinstance(size, int) and not isinstance(size, bool)


def legal_groups(k: int) -> list[int]:
    """The group sizes that kernels know and that divide k."""
    return [g for g in (16, 32, 64, 128, 256) if k % g == 0]
