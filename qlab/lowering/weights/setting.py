"""In what a quantized weight is multiplied: what a row of the table of kernels decides by, beside
the weight itself."""

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from qlab.algebra.online import QuantizeInput
from qlab.errors import QlabError

# What `lower` may be asked to round activations to.
Activations = Literal["int8"]
ACTIVATIONS: tuple[str, ...] = get_args(Activations)


def refuse_another_dtype(x: Tensor, dtype: torch.dtype) -> None:
    """Refuse activations in another dtype than the weight was packed for."""
    if x.dtype != dtype:
        raise QlabError(
            f"a model lowered for {dtype} got {x.dtype} activations; lower it for that dtype "
            "instead"
        )


def checked_activations(name: str | None) -> Activations | None:
    """What activations are rounded to; refuses what no kernel rounds them to."""
    if name is not None and name not in ACTIVATIONS:
        raise QlabError(
            f"activations={name!r} is nothing that a kernel rounds to; give "
            f"{' or '.join(map(repr, ACTIVATIONS))}, or None to round nothing"
        )
    return cast("Activations | None", name)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a weight is multiplied, and with what.

    dtype: of the activations. device: where the weight is held. inputs: how the model directory
    rounds the activations, or None where it leaves them as they are. activations: "int8" lets a
    kernel round activations that the directory leaves as they are; None is the default.
    """

    dtype: torch.dtype
    device: torch.device
    inputs: QuantizeInput | None = None
    activations: Activations | None = None
