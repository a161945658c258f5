"""Every module that a loader may treat as `nn.Linear`, under each name that it may use: the model's
and the files'."""

from collections.abc import Mapping

from torch import Tensor, nn

from qlab.algebra.spec import Spec
from qlab.files.checkpoint import Checkpoint
from qlab.files.directory import WIDTHS, Stored
from qlab.model.skeleton import Skeleton

# The files lack it where it shares the embedding's weight; a loader that goes by classes meets it.
HEAD = "lm_head"


def linears_of(skeleton: Skeleton) -> dict[str, str]:
    """Name of a linear -> the module in the files that holds its weight.

    A linear has transformers' name and the files', which differ where transformers renames tensors.
    Every projection of fused experts is a linear, and so are routers, as engines build them, and
    the modules of layers that only engines build.
    """
    names = skeleton.names
    routers = [
        name
        for name, module in other_matrices(skeleton).items()
        if not isinstance(module, nn.Embedding)
    ]
    modules: dict[str, str] = {}
    for name in [*names.linears(), *routers]:
        module = names.module_name(name)
        modules |= {name: module, module: module}
    modules |= {module: module for module in names.expert_modules()}
    for module in unbuilt(skeleton):
        modules |= {module: module, names.model_name(module): module}
    return modules


def by_module(skeleton: Skeleton, sites: Mapping[str, Spec | None]) -> dict[str, Spec | None]:
    """Name of a linear, as a format's configuration names it -> the spec of its site; None where it
    stays unquantized. Every linear has each name that readers may match."""
    specs: dict[str, Spec | None] = {}
    for name in [*skeleton.names.linears(), *sites]:
        for module in skeleton.names.modules(name):
            # blocks that share a weight have one module for it, and some may have no site
            specs[module] = sites.get(name) or specs.get(module)
    return dict.fromkeys([*specs, *linears_of(skeleton)]) | specs


def unbuilt(skeleton: Skeleton) -> list[str]:
    """Modules of the files with codes, a weight [o, k] or experts that the model has no place for,
    such as layers that predict further tokens."""
    pieces = skeleton.names.copies()
    for name, _ in skeleton.model.named_parameters(remove_duplicate=False):
        pieces.update(skeleton.names.pieces(name))
    built = {piece.module for piece in pieces} | {piece.name for piece in pieces}
    return sorted(matrices(skeleton.checkpoint) - built)


def matrices(model: Checkpoint) -> set[str]:
    """Modules of the files with codes or a weight [o, k]. Fused experts have two names: their
    tensor's and its owner's."""
    weights = {
        name.removesuffix(".weight")
        for name, stored in model.stored.items()
        if name.endswith(".weight") and len(stored.shape) == 2
    }
    experts = {name for name, stored in model.stored.items() if holds_experts(name, stored)}
    return weights | set(model.quantized) | experts | {name.rpartition(".")[0] for name in experts}


def holds_experts(name: str, stored: Stored) -> bool:
    """Whether a tensor may hold the weights of several experts: three axes and, unlike filters, not
    a module's `weight`."""
    return (
        len(stored.shape) == 3
        and stored.shape[0] > 1
        and not name.endswith(".weight")
        and WIDTHS[stored.dtype] >= 16
    )


def other_matrices(skeleton: Skeleton) -> dict[str, nn.Module]:
    """The modules whose weight has two axes and that are no linears: embeddings, routers."""
    linears = set(skeleton.names.linears())
    return {
        name: m
        for name, m in skeleton.model.named_modules()
        if name not in linears and _is_matrix(m)
    }


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2
