"""What an attention whose heads are divided over ranks does to what it reads, of what is said of
all heads.

    stored scales, zero points and means: those of the rank's heads
    a scale for all heads of a token:     from the ends of its range on all ranks

Matrices and scales of a head, or of channels in it, are the same on every rank.
"""

from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qlab.algebra.graph import Op
from qlab.algebra.online import QuantizeClipped, QuantizeInput, Subtract


class Ranks(Protocol):
    """rank, world: which of how many. passes: torch's process group of all of them."""

    rank: int
    world: int
    passes: Any


class Ends(nn.Module):
    """x [n, k] -> [n, k + 2 d]: two heads more, the lowest and the highest number that the token
    has on any rank. A scale of the row is then that of all heads.

    Args:
        channels: d, of a head.
        group: torch's process group of all ranks.
    """

    def __init__(self, channels: int, group: Any):
        super().__init__()
        self.channels, self.group = channels, group

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.stack([-x.amin(1), x.amax(1)], 1).float()
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self.group)
        heads = (ends * ends.new_tensor([-1.0, 1.0])).repeat_interleave(self.channels, 1)
        return torch.cat([x, heads.to(x.dtype)], 1)


def of_rank(op: Op, ranks: Ranks, channels: int) -> tuple[Op, ...]:
    """An operation on the channels of all heads as those of a rank's heads have it.

    Args:
        ranks: which of them, of all ranks with as many heads each.
        channels: of a head.
    """
    if isinstance(op, Subtract):
        return (Subtract(_own(op.c_k, ranks)),)
    if not isinstance(op, QuantizeInput | QuantizeClipped):
        return (op,)
    if op.scales is None:
        return (op,) if op.spec.tile.cols else (Ends(channels, ranks.passes), op)
    if op.scales.shape[-1] == 1:
        return (op,)
    zeros = None if op.zeros is None else _own(op.zeros, ranks)
    return (replace(op, scales=_own(op.scales, ranks), zeros=zeros),)


def _own(t: Tensor, ranks: Ranks) -> Tensor:
    """What a rank has of the last axis."""
    return t.chunk(ranks.world, -1)[ranks.rank].clone()
