"""What from_pretrained is refused: files and models other than those of the directory, and what
transformers would fill in at random or let overflow."""

from collections.abc import Collection, Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint, open_checkpoint
from qlab.files.tensors import refuse_overflow
from qlab.model.skeleton import Skeleton


def checkpoint_of(files: Sequence[str] | None) -> Checkpoint:
    """The directory that from_pretrained reads. Refuses other files than those that qlab reads
    there."""
    if not files:
        raise QlabError(
            "from_pretrained was given no files (state_dict, or a config alone), and qlab takes "
            "codes from files; give a model directory"
        )
    checkpoint = open_checkpoint(Path(files[0]).parent)
    own_names = {file.name for file in checkpoint.files.values()}
    other_names = {Path(file).name for file in files} - own_names
    if other_names:
        raise QlabError(
            f"from_pretrained chose {sorted(other_names)[0]} (by variant or use_safetensors) and "
            f"qlab reads the codes of {checkpoint.path} from "
            f"{next(iter(checkpoint.files.values())).name}; leave out the option"
        )
    return checkpoint


def refuse_another_class(skeleton: Skeleton, model: PreTrainedModel) -> None:
    """Refuse a model of another class than the directory's."""
    if type(skeleton.model) is not type(model):
        raise QlabError(
            f"{skeleton.checkpoint.path} holds a {type(skeleton.model).__name__} and not a "
            f"{type(model).__name__}; load it with the auto class of its own architecture"
        )


def refuse_other_shapes(skeleton: Skeleton, model: nn.Module) -> None:
    """Refuse a model that options of from_pretrained have made another one than the
    directory's."""
    built, asked = _shapes(skeleton.model), _shapes(model)
    differing = [name for name in built.keys() | asked.keys() if built.get(name) != asked.get(name)]
    if differing:
        name = min(differing)
        shape = f"of shape {built[name]}" if name in built else "not"
        raise QlabError(
            f"{skeleton.checkpoint.path} is of another model than from_pretrained was asked for: "
            f"{name} is {shape} in it; leave out what changes the config, or change the "
            "directory's config.json"
        )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: tuple(parameter.shape) for name, parameter in parameters}


def refuse_experts_implementation(model: PreTrainedModel) -> None:
    """Refuse the option where it would be without effect: quantized experts have one forward."""
    asked = getattr(model.config, "_experts_implementation", None)
    if asked in ("eager", "batched_mm") and asked != model.get_correct_experts_implementation(None):
        raise QlabError(
            f"quantized experts have an implementation of their own, and {asked!r} was asked for; "
            "leave out experts_implementation"
        )


def refuse_missing(
    skeleton: Skeleton, model: PreTrainedModel, packed: Collection[str], decoded: Collection[str]
) -> None:
    """Refuse a directory that lacks a tensor: transformers would fill it at random and say so in a
    table.

    packed, decoded: the names of weights and of other parameters whose codes the directory holds.
    """
    checkpoint = skeleton.checkpoint
    codes = {f"{name}.weight" for name in packed}
    tied = {name for name, keeper in skeleton.names.tied.items() if keeper not in codes}
    made_by_qlab = {*packed, *codes, *decoded, *tied}
    for name, _ in skeleton.model.named_parameters():
        tensors = [piece.name for piece in skeleton.names.pieces(name)]
        missing = [tensor for tensor in tensors if tensor not in checkpoint.stored]
        if missing and name not in made_by_qlab:
            raise QlabError(
                f"{checkpoint.path} has no tensor {missing[0]}, which {type(model).__name__} "
                "needs; the download may be incomplete, or the tensors have names that only "
                "a key_mapping explains, which qlab does not apply to codes"
            )


def refuse_infinite(skeleton: Skeleton, model: PreTrainedModel) -> None:
    """Refuse a number of the files that the dtype asked for does not hold: transformers would let
    it become Inf."""
    checkpoint = skeleton.checkpoint
    for name, parameter in model.named_parameters():
        stored = skeleton.names.file_name(name)
        if stored in checkpoint.stored and parameter.isinf().any():
            refuse_overflow(
                f"{checkpoint.path}: {name}", checkpoint.tensor(stored), parameter.dtype
            )
