"""What save_pretrained writes: the codes as the directory holds them, and everything else as the
model holds it."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from qlab.files.checkpoint import open_checkpoint
from qlab.model.pieces import Piece
from qlab.model.skeleton import Skeleton

# Module or fused weight -> name of a tensor that is saved -> its name in the files.
Names = Mapping[str, Mapping[str, str]]


def names_of_codes(
    skeleton: Skeleton, packed: Mapping[str, Sequence[Piece]], decoded: Mapping[str, str]
) -> Names:
    """The tensors that hold the codes of quantized weights, and of other parameters.

    packed: name of a weight -> its tensors in the files. decoded: name of a parameter -> the module
    that has its codes.
    """
    parts_of = skeleton.checkpoint.parts
    names: dict[str, dict[str, str]] = {}
    for name, pieces in packed.items():
        parts = [part for piece in pieces for part in parts_of(piece.module)]
        is_fused = pieces[0].expert is not None
        names[name] = {part: part for part in parts} if is_fused else _renamed(name, parts)
    for name, module in decoded.items():
        owner = name.rpartition(".")[0]
        names[owner] = _renamed(owner, parts_of(module))
    return names


def _renamed(owner: str, parts: Collection[str]) -> dict[str, str]:
    """Tensors of the files under the model's name of their module."""
    return {f"{owner}.{part.rpartition('.')[2]}": part for part in parts}


def state_with_codes(
    model: nn.Module, source: Path, names: Names, decoded: Collection[str], beside: Sequence[str]
) -> dict[str, Tensor]:
    """The state of a model with the codes of its directory, which must still be there.

    decoded: parameters that are dense in the model and codes in the directory. beside: tensors of
    the directory that are no weights.
    """
    checkpoint = open_checkpoint(source)
    decoded_tensors = [model.get_parameter(name) for name in decoded]
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        # a linear of codes, and the module that rounds its input
        if name in names or name.rpartition(".")[0] in names:
            continue
        for key, tensor in _own_state(name, module).items():
            # a head tied to an embedding has the embedding's tensor
            if not any(tensor is decoded_tensor for decoded_tensor in decoded_tensors):
                state[key] = tensor
    for parts in names.values():
        state |= {name: checkpoint.tensor(part) for name, part in parts.items()}
    return state | {name: checkpoint.tensor(name) for name in beside}


def _own_state(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a module without those of its children."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(name, recurse=False))
    tensors |= dict(module.named_buffers(name, recurse=False))
    prefix = f"{name}." if name else ""
    transient = {f"{prefix}{key}" for key in module._non_persistent_buffers_set}
    return {key: tensor for key, tensor in tensors.items() if key not in transient}
