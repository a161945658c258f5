"""A cache of codes for one attention, and attention over it.

    p = softmax(scale q . k + mask),  y = sum p v

A GPU reads the codes in its kernel (qlab_kernels.attend). Elsewhere a block of positions is numbers
at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.online import QuantizeInput
from qlab.errors import QlabError
from qlab.lowering.around.coded_heads import CodedHeads, coded

BLOCK = 1024  # positions that are numbers at once


@dataclass(frozen=True, kw_only=True)
class CodedCache:
    """The cache of one attention."""

    keys: CodedHeads
    values: CodedHeads

    def appended(self, k: Tensor, v: Tensor) -> "CodedCache":
        """With the keys and values [b, h, n, d] of new tokens behind those that are there."""
        return CodedCache(keys=self.keys.appended(k), values=self.values.appended(v))

    @property
    def length(self) -> int:
        """Positions."""
        return self.keys.length

    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return self.keys.nbytes() + self.values.nbytes()

    def attend(
        self,
        q: Tensor,
        *,
        scale: float | None = None,
        cap: float | None = None,
        window: int | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """y [b, heads, t, dv] of the queries [b, heads, t, d] of the last t positions.

        scale: of scores, 1 / sqrt(d) by default. cap: scores s become cap tanh(s / cap). window:
        how many positions a query sees, its own included. starts: int [b], the first position of
        each sequence that exists. On a GPU by its kernel, where it has one; elsewhere BLOCK
        positions are numbers at a time.
        """
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        config = _configured(q, self.keys)
        if config is None:
            return _in_blocks(q, self, _Masks(scale, cap, window, starts))
        from qlab_kernels.attend import attend

        lengths = torch.full((len(q),), self.length, dtype=torch.int32, device=q.device)
        first = None if starts is None else starts.to(torch.int32)
        keys, values = self.keys.for_kernel(), self.values.for_kernel()
        masks: Any = {"scale": scale, "cap": cap, "window": window, "starts": first}
        return attend(q, keys, values, lengths, config, **masks)


def coded_cache(key: QuantizeInput, value: QuantizeInput, k: Tensor, v: Tensor) -> CodedCache:
    """A cache of the first tokens [b, h, n, d], which may be none, rounded as both operations
    say."""
    if k.shape[:3] != v.shape[:3]:
        raise QlabError(f"keys {tuple(k.shape)} and values {tuple(v.shape)} differ in positions")
    return CodedCache(keys=coded(key, k), values=coded(value, v))


def _configured(q: Tensor, keys: CodedHeads) -> Any:
    """The configuration of the kernel for these operands; None where the device has no kernel."""
    if q.device.type != "cuda":
        return None
    from qlab_kernels import cache
    from qlab_kernels.attend import problem
    from qlab_kernels.families.cache_attention import refusal as reason

    cc = torch.cuda.get_device_capability(q.device)
    if reason(cc, str(q.dtype).removeprefix("torch."), q.shape[-1]) is not None:
        return None
    name = torch.cuda.get_device_name(q.device)
    return cache.lookup(problem(q, keys.for_kernel(), cc, name)).config


@dataclass(frozen=True)
class _Masks:
    scale: float
    cap: float | None
    window: int | None
    starts: Tensor | None


def _in_blocks(q: Tensor, cache: CodedCache, masks: _Masks) -> Tensor:
    """Attention in fp32 with the running maximum and sum of every row (Milakov and Gimelshein
    2018). A query that sees no position has 0."""
    b, heads, t, d = q.shape
    h = cache.keys.codes.shape[1]
    q_bhrd = q.float().view(b, h, heads // h * t, d) * masks.scale
    top = q_bhrd.new_full((*q_bhrd.shape[:3], 1), -math.inf)
    total = torch.zeros_like(top)
    y = q_bhrd.new_zeros(*q_bhrd.shape[:3], cache.values.channels)
    for first, last in _blocks(cache.length):
        s = q_bhrd @ cache.keys.read(first, last).float().mT
        s = s if masks.cap is None else masks.cap * torch.tanh(s / masks.cap)
        seen = _seen(q, cache.length, (first, last), masks)
        s = s.unflatten(2, (-1, t)).masked_fill(~seen[:, None, None], -math.inf).flatten(2, 3)
        higher = torch.maximum(top, s.amax(-1, keepdim=True))
        finite = higher.masked_fill(higher == -math.inf, 0.0)
        p, fading = (s - finite).exp(), (top - finite).exp()
        total = total * fading + p.sum(-1, keepdim=True)
        y = y * fading + p @ cache.values.read(first, last).float()
        top = higher
    y = y / total.masked_fill(total == 0, 1.0)
    return y.to(q.dtype).reshape(b, heads, t, cache.values.channels)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, BLOCK):
        yield first, min(first + BLOCK, length)


def _seen(q: Tensor, length: int, block: tuple[int, int], masks: _Masks) -> Tensor:
    """Which positions of a block each query sees: [b, t, positions], or b = 1 for all."""
    n = torch.arange(*block, device=q.device)
    own = torch.arange(length - q.shape[2], length, device=q.device)[:, None]
    seen = n <= own
    if masks.window is not None:
        seen &= n > own - masks.window
    if masks.starts is None:
        return seen[None]
    return seen & (n >= masks.starts.to(n)[:, None, None])
