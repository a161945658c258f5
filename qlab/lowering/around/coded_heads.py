"""Keys or values of one attention as codes of 8 or 4 bits.

    appended(x): codes = round(f(x) / s + z), as the operation rounds each token by itself
    read():      (codes - z) * s, bit for bit what the operation gives

A token has its codes from the step that brings it, and no number is rounded twice. Scales are those
of the tokens (and of groups of channels in them), in the dtype that the spec names (fp32 by
default), or fixed beforehand for a head or a tensor. Nothing changes in place: `appended` gives
another value.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.grid import encode
from qlab.algebra.qtensor import numbers, round_codes
from qlab.algebra.spec import Float, Int
from qlab.errors import QlabError
from qlab.lowering.around.inputs import Rounding


def refusal(op: Rounding, channels: int) -> str | None:
    """Why keys or values with so many channels in a head are not kept as codes, or None."""
    spec, cols = op.spec, op.spec.tile.cols
    if (
        spec.outer
        or spec.tile.rows not in (None, 1)
        or (spec.tile.rows is None) == (op.scales is None)
    ):
        return f"{spec} has scales of several tokens, or global ones"
    known = isinstance(spec, Int) or (isinstance(spec, Float) and spec.bits == 8)
    if not known or (spec.scale_dtype is not None and spec.scale_dtype.itemsize < 2):
        return f"codes of {spec} are neither integers nor 8-bit floats with scales of fp32"
    if cols is not None and channels % cols:
        return f"groups of {cols} do not divide the {channels} channels of a head"
    if spec.tile.rows is None and cols not in (None, channels):
        return f"a stored scale for {cols} channels is none of a head with {channels}"
    return None


@dataclass(frozen=True, kw_only=True)
class CodedHeads:
    """Keys or values x[b, h, n, d] ~ (codes - zeros) * scales.

    codes: [b, h, n, d] in int8 or float8_e4m3fn; integers of at most 4 bits are kept as pairs in
    uint8 [b, h, n, ceil(d / 2)]. scales, zeros: [b or 1, h or 1, n or 1, groups].
    """

    op: Rounding
    channels: int
    dtype: torch.dtype
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    @property
    def length(self) -> int:
        """Positions."""
        return self.codes.shape[2]

    @property
    def pairs(self) -> bool:
        """Whether a byte holds two codes."""
        return in_pairs(self.op)

    def appended(self, x: Tensor) -> "CodedHeads":
        """With tokens [b, h, n, d] behind those that are there."""
        new = coded(self.op, x)
        if new.codes.shape[:2] != self.codes.shape[:2] or new.channels != self.channels:
            raise QlabError(
                f"a cache of {tuple(self.codes.shape[:2])} sequences and heads of {self.channels} "
                f"channels takes no tokens {tuple(x.shape)}"
            )
        if x.dtype != self.dtype:
            raise QlabError(f"a cache of {self.dtype} numbers takes no tokens in {x.dtype}")
        codes = _joined(self.codes, new.codes)
        if self.op.scales is not None:
            return replace(self, codes=codes)
        zeros = None
        if self.zeros is not None and new.zeros is not None:
            zeros = torch.cat((self.zeros, new.zeros), 2)
        return replace(
            self, codes=codes, scales=torch.cat((self.scales, new.scales), 2), zeros=zeros
        )

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """Positions first to last as numbers [b, h, n, d] in the dtype of the tokens: what the
        operation gives."""
        part = self._changed(lambda t, of_tokens: t[:, :, first:last] if of_tokens else t)
        channels = self.channels if self.pairs else None
        return decoded(part.codes, part.scales, part.zeros, self.dtype, channels)

    def until(self, last: int) -> "CodedHeads":
        """The first positions alone."""
        return self._changed(lambda t, of_tokens: t[:, :, :last] if of_tokens else t)

    def of_sequences(self, rows: Tensor) -> "CodedHeads":
        """Sequences by their numbers, of which some may come again."""
        return self._changed(lambda t, of_tokens: _selected(t, rows) if of_tokens else t)

    def moved(self, device: torch.device) -> "CodedHeads":
        """On a device."""
        return self._changed(lambda t, of_tokens: t.to(device))

    def _changed(self, change: Callable[[Tensor, bool], Tensor]) -> "CodedHeads":
        """With other tensors; whether one has an entry for every token is the second argument."""
        of_tokens = self.op.scales is None
        zeros = None if self.zeros is None else change(self.zeros, of_tokens)
        scales = change(self.scales, of_tokens)
        return replace(self, codes=change(self.codes, True), scales=scales, zeros=zeros)

    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        parts = (self.codes, self.scales, self.zeros)
        return sum(part.numel() * part.itemsize for part in parts if part is not None)

    def for_kernel(self) -> Any:
        """The same as qlab_kernels reads it."""
        from qlab_kernels.cached import Cached, Format

        shape = (*self.codes.shape[:3], self.scales.shape[-1])
        zeros = None if self.zeros is None else self.zeros.expand(shape)
        form: Format = (
            "int4" if self.pairs else "fp8" if isinstance(self.op.spec, Float) else "int8"
        )
        return Cached(
            codes=self.codes,
            scales=self.scales.float().expand(shape),
            zeros=zeros,
            channels=self.channels,
            format=form,
        )


def decoded(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype, channels: int | None
) -> Tensor:
    """(codes - zeros) * scales, computed in fp32. channels: of codes that lie in pairs, else
    None."""
    if channels is not None:
        from qlab_kernels.cached import unpack_nibbles

        codes = unpack_nibbles(codes, channels)
    # a tensor of its own, which is changed in place: large ones take most of the time to make
    x = numbers(codes, torch.float32).unflatten(-1, (scales.shape[-1], -1))
    if zeros is not None:
        x.sub_(zeros.float()[..., None])
    return x.mul_(scales.float()[..., None]).flatten(-2).to(dtype)


def coded(op: Rounding, x: Tensor) -> CodedHeads:
    """Tokens [b, h, n, d] as codes: rows of the rounding are tokens, and its columns the channels
    of all heads."""
    b, h, n, d = x.shape
    reason = refusal(op, d)
    if reason:
        raise QlabError(f"a cache holds no codes here: {reason}")
    rows = x.transpose(1, 2).reshape(b * n, h * d).float()
    if op.scales is None:
        codes, scales, zeros = _of_tokens(op, rows, (b, n, h))
    else:
        codes, scales, zeros = _of_heads(op, rows)
    codes = codes.view(b, n, h, d).transpose(1, 2).contiguous()
    if in_pairs(op):
        from qlab_kernels.cached import pack_nibbles

        codes = pack_nibbles(codes)
    return CodedHeads(op=op, channels=d, dtype=x.dtype, codes=codes, scales=scales, zeros=zeros)


def _of_tokens(
    op: Rounding, rows: Tensor, sizes: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes of rows, and scales and zero points of every token [b, h or 1, n, groups]."""
    b, n, h = sizes
    if not len(rows):
        groups = op.spec.tile.scales_shape(rows.shape)[1]
        scales, codes = rows.new_empty(0, groups), rows.to(op.spec.code_dtype)
        zeros = None if op.spec.symmetric else scales.to(torch.int8)
    else:
        q = encode(op.grid, rows, op.spec)
        codes, scales, zeros = q.codes, q.scales, q.zeros
    heads = 1 if op.spec.tile.cols is None else h
    shape = (b, n, heads, scales.shape[1] // heads)

    def laid(t: Tensor) -> Tensor:
        return t.view(shape).transpose(1, 2).contiguous()

    return codes, laid(scales), None if zeros is None else laid(zeros)


def _of_heads(op: Rounding, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same with scales that were fixed beforehand [1, h or 1, 1, 1]."""
    scales, zeros = (None if t is None else t.to(rows.device) for t in (op.scales, op.zeros))
    assert scales is not None
    # a tile of no rows has no size
    codes = round_codes(rows, scales, zeros, op.spec) if len(rows) else rows.to(op.spec.code_dtype)
    shape = (1, -1, 1, 1)
    return codes, scales.view(shape), None if zeros is None else zeros.view(shape)


def in_pairs(op: Rounding) -> bool:
    """Whether a byte holds two codes."""
    return isinstance(op.spec, Int) and op.spec.bits <= 4


def _selected(t: Tensor, rows: Tensor) -> Tensor:
    """Rows of a tensor; torch selects no 8-bit floats on every device."""
    return _as_octets(t).index_select(0, rows.to(t.device)).view(t.dtype)


def _as_octets(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.itemsize == 1 else t


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Codes one behind the other; torch joins no 8-bit floats on every device."""
    parts = [t.view(torch.uint8) for t in (first, second)]
    return torch.cat(parts, 2).view(first.dtype)
