"""Keys and values in pages: as numbers, or as codes of 8 or 4 bits.

    numbers:  x -> x
    codes:    x -> round(f(x) / s + z) when a token is written, (codes - z) * s when it is read

f, s and z are those of the attention (`qlab.lowering.around.attended`), so that an attention reads
what it would make of each token itself. A token is rounded once.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlab.algebra.spec import Float
from qlab.lowering.around.attended import OfHeads
from qlab.lowering.around.coded_heads import coded, decoded, in_pairs, refusal
from qlab.lowering.around.inputs import RoundedInput, operation_of
from qlab.lowering.weights.exact import spec_of

Shapes = Mapping[int, tuple[int, int, int]]  # layer -> heads, channels of a key and of a value
Coders = Mapping[tuple[int, str], OfHeads]  # layer, "key" or "value" -> what it becomes


class Slots(Protocol):
    """Keys or values of one layer, a slot for each token. tensors: [slots, ...]."""

    tensors: tuple[Tensor, ...]

    def write(self, at_n: Tensor, x_bhqd: Tensor) -> None:
        """Put the new tokens of all rows into slots [b * q]."""

    def read(self, at_bl: Tensor, dtype: torch.dtype) -> Tensor:
        """The tokens in slots [b, l], as [b, h, l, d]."""


class Numbers:
    """Numbers [slots, heads, channels] of a dtype."""

    def __init__(
        self, slots: int, heads: int, channels: int, dtype: torch.dtype, device: torch.device
    ):
        zeros = torch.zeros(slots, heads, channels, dtype=dtype, device=device)
        self.tensors: tuple[Tensor, ...] = (zeros,)

    def write(self, at_n: Tensor, x_bhqd: Tensor) -> None:
        (slots_nhd,) = self.tensors
        slots_nhd.index_put_((at_n,), x_bhqd.transpose(1, 2).flatten(0, 1).to(slots_nhd.dtype))

    def read(self, at_bl: Tensor, dtype: torch.dtype) -> Tensor:
        (slots_nhd,) = self.tensors
        return slots_nhd[at_bl].transpose(1, 2).to(dtype)


class Codes:
    """Codes [slots, heads, channels or pairs of them], and where tokens have them scales and zero
    points [slots, heads or 1, groups].

    Args:
        slots, heads, channels, device: of what is stored.
        coder: what an attention makes of keys or values; its last step rounds.
    """

    def __init__(self, slots: int, heads: int, channels: int, coder: OfHeads, device: torch.device):
        self.rounding: Any
        *self.before, self.rounding = coder.steps
        self.channels = channels if in_pairs(self.rounding.operation) else None
        self.is_float = isinstance(self.rounding.spec, Float)
        one = torch.zeros(1, heads * channels, dtype=torch.float32, device=device)
        parts = self._coded(one, heads)
        self.tensors = tuple(part.new_zeros(slots, *part.shape[1:]) for part in parts)

    def write(self, at_n: Tensor, x_bhqd: Tensor) -> None:
        x_nk = x_bhqd.transpose(1, 2).flatten(0, 1).flatten(1)
        for step in self.before:
            x_nk = step(x_nk)
        for slots, part in zip(self.tensors, self._coded(x_nk, x_bhqd.shape[1])):
            slots.index_put_((at_n,), part)

    def read(self, at_bl: Tensor, dtype: torch.dtype) -> Tensor:
        codes, *own = (slots[at_bl].transpose(1, 2) for slots in self.tensors)
        fixed = [
            t.view(1, -1, 1, 1)
            for t in (self.rounding.scales, self.rounding.zeros)
            if t is not None
        ]
        scales, *zeros = own or fixed
        codes = codes.view(torch.float8_e4m3fn) if self.is_float else codes
        return decoded(codes, scales, zeros[0] if zeros else None, dtype, self.channels)

    def _coded(self, x_nk: Tensor, heads: int) -> list[Tensor]:
        of = self.rounding
        return code_tokens(x_nk, heads, of.scales, of.zeros, of.text, of.share)


# ------------------------------------------------------------------ the operator
@torch.library.custom_op("qlab::code_tokens", mutates_args=())
def code_tokens(
    x_nk: Tensor, heads: int, scales: Tensor | None, zeros: Tensor | None, spec: str, share: float
) -> list[Tensor]:
    """Codes [n, h, d] or pairs of them [n, h, ceil(d / 2)], 8-bit floats as the bytes that they
    are, and scales and zero points of the tokens where none are given."""
    op = operation_of(scales, zeros, None, spec, share)
    of_heads = coded(op, x_nk.unflatten(1, (heads, -1)).transpose(0, 1)[None])
    parts = [of_heads.codes] if scales is not None else [of_heads.codes, of_heads.scales]
    if scales is None and of_heads.zeros is not None:
        parts.append(of_heads.zeros)
    return [_as_octets(part[0].transpose(0, 1).contiguous()) for part in parts]


def _as_octets(t: Tensor) -> Tensor:
    """torch indexes no 8-bit floats on every device."""
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


@code_tokens.register_fake
def _(
    x_nk: Tensor, heads: int, scales: Tensor | None, zeros: Tensor | None, spec: str, share: float
) -> list[Tensor]:
    grid, n = spec_of(spec), x_nk.shape[0]
    op = operation_of(scales, zeros, None, spec, share)
    d = x_nk.shape[1] // heads
    pairs, is_float = in_pairs(op), isinstance(grid, Float)
    codes = x_nk.new_empty(
        n, heads, -(-d // 2) if pairs else d, dtype=torch.uint8 if pairs or is_float else torch.int8
    )
    if scales is not None:
        return [codes]
    cols = grid.tile.cols
    shape = (n, heads, d // cols) if cols else (n, 1, 1)
    found = [codes, x_nk.new_empty(shape, dtype=grid.scale_dtype or torch.float32)]
    return (
        found
        if isinstance(grid, Float) or grid.symmetric
        else [*found, x_nk.new_empty(shape, dtype=grid.zero_dtype)]
    )


# ------------------------------------------------------------------ of a model
def coders_of(model: PreTrainedModel, shapes: Shapes) -> Coders:
    """What may be done when a token is written: of the layers whose attentions round keys and
    values in a way that codes hold. None where attentions read each other's keys and values, which
    get them as they came."""
    reading: list[Any] = [m for m in model.modules() if "reads" in m._modules]
    if any(getattr(module, "layer_idx", None) not in shapes for module in reading):
        return {}
    return {
        (module.layer_idx, kind): module.reads[kind]
        for module in reading
        for kind, channels in zip(("key", "value"), shapes[module.layer_idx][1:])
        if kind in module.reads and _holds(module.reads[kind], channels)
    }


def _holds(coder: OfHeads, channels: int) -> bool:
    last = coder.steps[-1]
    return isinstance(last, RoundedInput) and refusal(last.operation, channels) is None
