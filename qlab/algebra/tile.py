"""What one scale covers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from qlab.errors import QlabError


@dataclass(frozen=True)
class Tile:
    """The rows and columns of a weight that one scale covers; None is the whole axis.

    tensor = Tile(None, None), channel = Tile(1, None), group of g = Tile(1, g), 2-D block =
    Tile(128, 128).
    Leading axes (experts) always have scales of their own. Tiles at the lower and right edge may
    reach over it and are filled up with zeros, so that scale counts are rounded up. Weights are
    rounded to groups that divide a row; other writers' need not.
    """

    rows: int | None
    cols: int | None

    def __post_init__(self) -> None:
        for size in (self.rows, self.cols):
            if size is not None and (not is_size(size) or size < 1):
                raise QlabError(
                    f"a tile of {self.rows!r:.40} x {self.cols!r:.40}; give whole numbers of at "
                    "least 1, or None for all"
                )

    pattern = "... (a r) (g k) -> ... a g (r k)"

    def split(self, W_ok: Tensor) -> Tensor:
        """[..., o, k] -> [..., a, g, n]: the n numbers under scale [a, g], zeros where a block
        reaches over the edge."""
        rows, cols = self.sizes(W_ok.shape)
        o, k = W_ok.shape[-2:]
        if o % rows or k % cols:
            W_ok = F.pad(W_ok, (0, -k % cols, 0, -o % rows))
        return rearrange(W_ok, self.pattern, r=rows, k=cols)

    def join(self, x_agn: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of split, for a weight of the given shape."""
        rows, cols = self.sizes(shape)
        whole = rearrange(x_agn, "... a g (r k) -> ... (a r) (g k)", r=rows, k=cols)
        return whole if whole.shape == shape else whole[..., : shape[-2], : shape[-1]].contiguous()

    def sizes(self, shape: torch.Size) -> tuple[int, int]:
        """Rows and columns under one scale of a weight [..., o, k]."""
        o, k = shape[-2:]
        return self.rows or o, self.cols or k

    def check(self, shape: torch.Size) -> None:
        """Refuse groups that do not divide a weight [..., o, k], before it is rounded to them."""
        k = shape[-1]
        cols = self.cols or k
        if self.rows in (None, 1) and k % cols:
            raise QlabError(
                f"groups of {cols} do not divide the {k} input channels of a weight "
                f"{tuple(shape)}; legal groups here are {', '.join(map(str, legal_groups(k)))} or "
                "'channel'"
            )

    def scales_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Shape of the scales of a weight [..., o, k]: [..., a, g]."""
        rows, cols = self.sizes(shape)
        return (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // cols))

    def __str__(self) -> str:
        named: dict[tuple[int | None, int | None], str] = {
            (None, None): "tensor",
            (1, None): "channel",
        }
        if (self.rows, self.cols) in named:
            return named[self.rows, self.cols]
        return f"g{self.cols}" if self.rows == 1 else f"b{self.rows}x{self.cols}"


def is_size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool)


def legal_groups(k: int) -> list[int]:
    """The group sizes that kernels know and that divide k."""
    return [g for g in (16, 32, 64, 128, 256) if k % g == 0]
