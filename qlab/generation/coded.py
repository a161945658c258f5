"""Keys and values in pages: as numbers, or as codes of 8 or 4 bits.

A token is rounded once, when it is written, as its attention rounds it
(`qlab.lowering.around.coded_tokens`).
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlab.lowering.around.attended import OfHeads, channels_of, key_heads_of
from qlab.lowering.around.coded_tokens import Coder, refusal

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
    """Codes, and where tokens have them scales and zero points, as `Coder` writes them.

    Args:
        slots, heads, channels, device: of what is stored.
        reads: what an attention makes of keys or values.
    """

    def __init__(self, slots: int, heads: int, channels: int, reads: OfHeads, device: torch.device):
        self.coder = Coder(reads.steps, channels)
        one = torch.zeros(1, heads * channels, dtype=torch.float32, device=device)
        parts = self.coder.coded(one)
        self.tensors = tuple(part.new_zeros(slots, *part.shape[1:]) for part in parts)

    def write(self, at_n: Tensor, x_bhqd: Tensor) -> None:
        for slots, part in zip(self.tensors, self.coder.written(x_bhqd)):
            slots.index_put_((at_n,), part)

    def read(self, at_bl: Tensor, dtype: torch.dtype) -> Tensor:
        return self.coder.read_at(self.tensors, at_bl, dtype)


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
        if kind in module.reads
        and _is_read(module, kind, shapes[module.layer_idx][0], channels)
        and refusal(module.reads[kind].steps, channels) is None
    }


def _is_read(module: Any, kind: str, heads: int, channels: int) -> bool:
    """Whether what is cached is what the attention reads, and no latent of which it makes that."""
    return heads == key_heads_of(module) and channels == channels_of(module)[kind]
