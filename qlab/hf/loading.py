"""Stand-ins in a model while transformers loads its weights, and the tensors of the files that
transformers must ignore because qlab reads them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlab.files.checkpoint import Checkpoint
from qlab.lowering.assembling import set_module
from qlab.model.pieces import Piece
from qlab.model.skeleton import Skeleton


class Awaiting(nn.Module):
    """A stand-in for a packed linear, without parameters that transformers could look for or fill
    at random.

    weight, bias: found by modules that initialize those of their children (gpt2's, CLIP's), and
    marked as initialized.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = self.bias = torch.empty(0, dtype=torch.float32)
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]


def make_room(
    model: PreTrainedModel, skeleton: Skeleton, packed: Mapping[str, Sequence[Piece]]
) -> None:
    """Take the quantized weights out of a model, and let transformers pass over their tensors.

    packed: name of a weight -> its tensors in the files.
    """
    patterns = _patterns_of_files(skeleton.checkpoint)
    for name, pieces in packed.items():
        place = _at(model, name)
        if isinstance(place, nn.Module):
            patterns |= _patterns_of_linear(name, pieces, skeleton.checkpoint)
            step = 1 if name in skeleton.names.transposed else -1
            k, o = place.get_parameter("weight").shape[::step]
        else:
            patterns |= _patterns_of_experts(name)
            k, o = place.shape[:0:-1]
        set_module(model, name, Awaiting(k, o))
        model.all_tied_weights_keys.pop(f"{name}.weight", None)  # codes are tied to nothing
    families = {re.sub(r"\d+", r"\\d+", pattern) for pattern in patterns}
    model._keys_to_ignore_on_load_unexpected = joined(
        model._keys_to_ignore_on_load_unexpected, (f"^{family}$" for family in families)
    )


def _patterns_of_files(checkpoint: Checkpoint) -> set[str]:
    """The tensors of all codes, also of layers that transformers does not build, and those of
    what else the quantization_config describes."""
    codes = [part for module in checkpoint.quantized for part in checkpoint.parts(module)]
    beside = [name for extra in checkpoint.extras for name in extra.tensors]
    return {re.escape(name) for name in (*codes, *beside)}


def _patterns_of_linear(name: str, pieces: Sequence[Piece], checkpoint: Checkpoint) -> set[str]:
    """The tensors of a linear's codes under the model's name of the linear."""
    parts = [part for piece in pieces for part in checkpoint.parts(piece.module)]
    return {re.escape(f"{name}.{part.rpartition('.')[2]}") for part in parts}


def _patterns_of_experts(name: str) -> set[str]:
    """transformers may report the tensors of fused experts as <owner>.0.<part> or as
    <name>_<part>."""
    return {re.escape(name.rpartition(".")[0]) + r"\.0\..+", re.escape(name) + "(_.+)?"}


def joined(known: set[str] | list[str] | None, more: Iterable[str]) -> set[str] | list[str]:
    """The patterns that a model ignores and more, as a set, or in older releases of transformers a
    list: transformers adds its own patterns to it."""
    together = {*(known or ()), *more}
    return together if isinstance(known, set) else sorted(together)


def _at(model: nn.Module, name: str) -> Any:
    """The submodule or the parameter of this name."""
    owner, _, key = name.rpartition(".")
    return getattr(model.get_submodule(owner), key)
