"""What launches over rows of bytes share: the experts' rows on the device, and the options of the
compiler."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlab_kernels.capability import target
from qlab_kernels.config import Config
from qlab_kernels.device import interpreted, options


def compiler_options(p: Tensor, config: Config) -> dict[str, int]:
    """What a kernel is compiled with on the device of p: mma.sync's tiles of few tokens with a
    limit of registers, without which they spill."""
    if interpreted():
        return {"num_warps": config.warps}
    return options(config, target(torch.cuda.get_device_capability(p.device)).layout)


@triton.jit
def expert_tile(offsets_ptr, tile, E, EXPERTS: tl.constexpr, BM: tl.constexpr):
    """(expert, first row, rows left from there) of a tile of BM rows; expert is E where tiles end.

    offsets: int32 [E] ascending ends. EXPERTS: E rounded up to a power of two.
    """
    e = tl.arange(0, EXPERTS)
    ends = tl.load(offsets_ptr + e, mask=e < E, other=0)
    starts = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = (ends - starts + BM - 1) // BM
    # The number of experts that end before this tile; the padding never ends.
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, tiles, 0), 0)
    row = tl.sum(tl.where(e == expert, starts, 0), 0) + (tile - before) * BM
    return expert, row, tl.sum(tl.where(e == expert, ends, 0), 0) - row
