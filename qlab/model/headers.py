"""Whether the files hold the model that config.json describes, by their headers alone."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.model.names import Names
from qlab.model.pieces import Piece
from qlab.model.spelling import is_converted
from qlab.model.ties import FLAG


def refuse_another_model(names: Names) -> None:
    """Refuse tensors of other shapes than the model's, and parameters that are no floats.

    Of a tensor that transformers flattens, joins, cuts or transposes when it loads it, only the
    number of its elements is compared.
    """
    for name, parameter in names.model.named_parameters(remove_duplicate=False):
        for piece in names.pieces(name):
            _check(names, piece, shape_of(piece, parameter), floats=True)
    for name, buffer in names.model.named_buffers():
        stored = names.stored_buffer(name)
        if stored:
            _check(names, Piece(stored), buffer.shape, floats=False)


def _check(names: Names, piece: Piece, expected: torch.Size, floats: bool) -> None:
    checkpoint = names.checkpoint
    if piece.name not in checkpoint.stored or piece.module in checkpoint.quantized:
        return
    shape, dtype = checkpoint.shape_and_dtype(piece.name)
    whole = shape.numel() == expected.numel() and piece.expert is None
    fits = shape == expected or (whole and is_converted(names.model, piece.name))
    if not fits or (floats and not dtype.is_floating_point):
        raise QlabError(
            f"{checkpoint.files[piece.name]}: {piece.name} is {dtype} {tuple(shape)}, and "
            f"config.json describes a model with {'floats ' if floats else ''}{tuple(expected)} "
            "there; the one or the other is of another model"
        )


def refuse_another_weight(
    checkpoint: Checkpoint, name: str, shape: torch.Size, shapes: Mapping[str, torch.Size]
) -> None:
    """Refuse codes of a weight with another number of elements than the model's. shapes: name ->
    shape in the model, where that is known."""
    expected = shapes.get(name, shape)
    if shape.numel() != expected.numel():
        raise QlabError(
            f"{name} of {checkpoint.path} holds the codes of {tuple(shape)}, and its config.json "
            f"describes a model with {tuple(expected)} there; the one or the other is of another "
            "model"
        )


def refuse_missing(names: Names) -> None:
    """Refuse files that lack a tensor of the model."""
    for name, _ in names.model.named_parameters(remove_duplicate=False):
        if not names.lacking(name):
            continue
        lacking = names.lacking(names.tied.get(name, name))
        if lacking:
            _refuse_untied(names, name)
            names.checkpoint.shape_and_dtype(lacking[0])


def _refuse_untied(names: Names, name: str) -> None:
    """Refuse files that lack a tensor which the model's class could tie to another and config.json
    does not."""
    tying = names.model._tied_weights_keys or {}
    if name in tying and name not in names.model.all_tied_weights_keys:
        raise QlabError(
            f"{names.checkpoint.path} has no tensor {names.file_name(name)}, and its "
            f"config.json ties it to no other ({FLAG} is false); download it again, or restore "
            "that key"
        )


def shape_of(piece: Piece, parameter: Tensor) -> torch.Size:
    """The shape of the tensor that holds a parameter, or a part of it."""
    if not piece.stop:
        return parameter.shape
    cut = 1 if piece.expert is None else 2
    return torch.Size((piece.stop - piece.start, *parameter.shape[cut:]))
