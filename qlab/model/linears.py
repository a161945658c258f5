"""Which modules of a model readers may take for linears, by every name under which they may look
for them in the files."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from qlab.algebra.spec import Spec
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.files.directory import INDEX, WIDTHS, Stored, unheld
from qlab.model.headers import refuse_missing
from qlab.model.skeleton import Skeleton
from qlab.model.ties import FLAG, untied

# in no file where it shares the embedding's weight; readers that match by class still meet it
HEAD = "lm_head"


def linear_names(model: Checkpoint) -> dict[str, str]:
    """Name of a linear -> the module in the files that holds its weight. Of a model that
    transformers does not know: every module of the files with a weight [o, k] or with experts,
    embeddings among them, and the head."""
    if model.known:
        return linears_of(Skeleton(model, model.dtype))
    return {name: name for name in sorted(_matrices(model) | {HEAD})}


def linears_of(skeleton: Skeleton) -> dict[str, str]:
    """Name of a linear -> the module in the files that holds its weight.

    transformers' own names and those of the files, which differ where it renames tensors, one for
    every projection of fused experts, the routers, which to engines are linears like any other, and
    whatever the files hold of layers that only engines build.
    """
    routers = [
        name
        for name, module in _other_matrices(skeleton).items()
        if not isinstance(module, nn.Embedding)
    ]
    own = {
        name: m
        for own in [*skeleton.names.linears(), *routers]
        for m in [skeleton.names.module_name(own)]
        for name in (own, m)
    }
    beyond = {
        name: module
        for module in unbuilt(skeleton)
        for name in (module, skeleton.names.model_name(module))
    }
    return own | {module: module for module in skeleton.names.expert_modules()} | beyond


def by_module(skeleton: Skeleton, sites: Mapping[str, Spec | None]) -> dict[str, Spec | None]:
    """What a format's configuration speaks of: every linear by every name that readers may match,
    with the spec of its site; None for one that stays as it is."""
    specs: dict[str, Spec | None] = {}
    for name in [*skeleton.names.linears(), *sites]:
        for module in skeleton.names.modules(name):  # of blocks that share it one may not run it
            specs[module] = sites.get(name) or specs.get(module)
    return dict.fromkeys([*specs, *linears_of(skeleton)]) | specs


def unbuilt(skeleton: Skeleton) -> list[str]:
    """Modules of the files with codes, a weight [o, k] or experts that the model has no place for,
    such as layers that predict further tokens."""
    parameters = [name for name, _ in skeleton.model.named_parameters(remove_duplicate=False)]
    pieces = [piece for name in parameters for piece in skeleton.names.pieces(name)]
    pieces += skeleton.names.copies()
    return sorted(
        _matrices(skeleton.checkpoint)
        - {piece.module for piece in pieces}
        - {piece.name for piece in pieces}
    )


def _matrices(model: Checkpoint) -> set[str]:
    """Modules of the files with codes or a weight [o, k], and fused experts under the name of their
    tensor and of its owner."""
    weights = {
        name.removesuffix(".weight")
        for name, stored in model.stored.items()
        if name.endswith(".weight") and len(stored.shape) == 2
    }
    experts = {name for name, stored in model.stored.items() if holds_experts(name, stored)}
    return weights | set(model.quantized) | experts | {name.rpartition(".")[0] for name in experts}


def other_matrices(model: Checkpoint) -> set[str]:
    """Modules of the files whose weight has two axes and is no linear's: embeddings, routers. Where
    transformers does not know the architecture nobody can say, and none is returned."""
    if not model.known:
        return set()
    skeleton = Skeleton(model, model.dtype)
    return {skeleton.names.module_name(name) for name in _other_matrices(skeleton)}


def embeddings(model: Checkpoint) -> set[str]:
    """Modules of the files that are embeddings, as far as transformers knows the architecture."""
    if not model.known:
        return set()
    skeleton = Skeleton(model, model.dtype)
    return {
        skeleton.names.module_name(name)
        for name, module in _other_matrices(skeleton).items()
        if isinstance(module, nn.Embedding)
    }


def refuse_unheld(model: Checkpoint) -> None:
    """Refuse files that lack a tensor of their index. Where transformers knows the architecture,
    those that it needs."""
    lacking = unheld(model.path, model.stored)
    if lacking and model.known:
        refuse_missing(Skeleton(model, model.dtype).names)
    elif lacking:
        name, file = next(iter(lacking.items()))
        raise QlabError(
            f"{model.path / INDEX} lists {name} in {file}, which does not hold it; download the "
            "model again, or take out what nobody needs"
        )


def untied_where_apart(model: Checkpoint, quantized: Collection[str]) -> Mapping[str, Any]:
    """The directory's config.json, which ties nothing that its files hold apart, or that they hold
    twice and of which one is quantized.

    quantized: modules of the files. Refuses files that lack a tensor of a model that transformers
    knows.
    """
    if not model.known:
        return untied(model.raw) if model.raw.get(FLAG) and HEAD in quantized else model.raw
    skeleton = Skeleton(model, model.dtype)
    refuse_missing(skeleton.names)
    twice = [
        (name, other)
        for name, other in skeleton.names.tied.items()
        if skeleton.names.file_name(name) in model.stored and not skeleton.names.shares(name)
    ]
    modules = {skeleton.names.file_name(name).rpartition(".")[0] for pair in twice for name in pair}
    return untied(model.raw) if skeleton.names.apart or modules & set(quantized) else model.raw


def transposed(model: Checkpoint) -> frozenset[str]:
    """Modules of the files whose weight is stored as [k, o] where it is dense; as far as
    transformers knows the architecture."""
    return Skeleton(model, model.dtype).names.transposed if model.known else frozenset()


def experts_apart(model: Checkpoint, whole: Collection[str] = ()) -> Checkpoint:
    """The directory as if experts that its files hold fused [e, o, k] lay there one by one [o, k],
    by the names that engines expect.

    Every expert's part is a range of bytes of the same file. whole: tensors to leave fused. Those
    stay so as well whose parts transformers has no names for, and all of an architecture that it
    does not know.
    """
    fused = {
        name for name, stored in model.stored.items() if holds_experts(name, stored)
    }.difference(whole)
    if not fused or not model.known:
        return model
    skeleton, stored = Skeleton(model, model.dtype), dict(model.stored)
    for name, parameter in skeleton.model.named_parameters():
        held = skeleton.names.file_name(name)
        if (
            held in fused
            and model.stored[held].shape == tuple(parameter.shape)
            and (pieces := skeleton.names.expert_pieces(name))
        ):
            del stored[held]
            stored |= {
                piece.name: model.stored[held].rows(piece.expert or 0, piece.start, piece.stop)
                for piece in pieces
            }
    return replace(model, stored=stored)


def holds_experts(name: str, stored: Stored) -> bool:
    """Whether a tensor may hold the weights of several experts: three axes and, unlike filters, not
    a module's `weight`."""
    return (
        len(stored.shape) == 3
        and stored.shape[0] > 1
        and not name.endswith(".weight")
        and WIDTHS[stored.dtype] >= 16
    )


def _other_matrices(skeleton: Skeleton) -> dict[str, nn.Module]:
    linears = set(skeleton.names.linears())
    return {
        name: m
        for name, m in skeleton.model.named_modules()
        if name not in linears and _is_matrix(m)
    }


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2
