"""Whether the files are of the model that config.json describes, from their headers alone."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.model.pieces import Piece
from qlab.model.spelling import is_converted
from qlab.model.ties import FLAG

if TYPE_CHECKING:
    from qlab.model.skeleton import Skeleton


def refuse_another_model(skeleton: "Skeleton") -> None:
    """Refuse tensors of other shapes than the model's, and parameters that are no floats. Where
    transformers flattens, joins, cuts or transposes what it loads, only their size is known."""
    for name, parameter in skeleton.model.named_parameters(remove_duplicate=False):
        for piece in skeleton.pieces(name):
            _check(skeleton, piece, _shape_of(piece, parameter), floats=True)
    for name, buffer in skeleton.model.named_buffers():
        if stored := skeleton.stored_buffer(name):
            _check(skeleton, Piece(stored), buffer.shape, floats=False)


def _check(skeleton: "Skeleton", piece: Piece, wanted: torch.Size, floats: bool) -> None:
    checkpoint = skeleton.checkpoint
    if piece.name not in checkpoint.stored or piece.module in checkpoint.quantized:
        return
    shape, dtype = checkpoint.shape_and_dtype(piece.name)
    whole = shape.numel() == wanted.numel() and piece.expert is None
    fits = shape == wanted or (whole and is_converted(skeleton.model, piece.name))
    if not fits or (floats and not dtype.is_floating_point):
        raise QlabError(
            f"{checkpoint.files[piece.name]}: {piece.name} is {dtype} {tuple(shape)}, and "
            f"config.json describes a model with {'floats ' if floats else ''}{tuple(wanted)} "
            "there; the one or the other is of another model"
        )


def refuse_untied(skeleton: "Skeleton", name: str) -> None:
    """Refuse files that lack a tensor which the model's class could tie to another and config.json
    does not."""
    tying = skeleton.model._tied_weights_keys or {}
    if name in tying and name not in skeleton.model.all_tied_weights_keys:
        raise QlabError(
            f"{skeleton.checkpoint.path} has no tensor {skeleton.file_name(name)}, and its "
            f"config.json ties it to no other ({FLAG} is false); download it again, or restore "
            "that key"
        )


def _shape_of(piece: Piece, parameter: Tensor) -> torch.Size:
    """The shape of a tensor of the files that holds a parameter, or a part of it."""
    if not piece.stop:
        return parameter.shape
    return torch.Size(
        (piece.stop - piece.start, *parameter.shape[1 if piece.expert is None else 2 :])
    )
