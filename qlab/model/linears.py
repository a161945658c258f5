"""Which modules of a model readers may take for linears, by every name under which they may look
for them in the files."""

from collections.abc import Mapping

from torch import Tensor, nn

from qlab.algebra.spec import Spec
from qlab.files.checkpoint import Checkpoint
from qlab.files.directory import WIDTHS, Stored
from qlab.model.skeleton import Skeleton

# in no file where it shares the embedding's weight; readers that match by class still meet it
HEAD = "lm_head"


def linears_of(skeleton: Skeleton) -> dict[str, str]:
    """Name of a linear -> the module in the files that holds its weight.

    transformers' own names and those of the files, which differ where it renames tensors, one for
    every projection of fused experts, the routers, which to engines are linears like any other, and
    whatever the files hold of layers that only engines build.
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
        matrices(skeleton.checkpoint)
        - {piece.module for piece in pieces}
        - {piece.name for piece in pieces}
    )


def matrices(model: Checkpoint) -> set[str]:
    """Modules of the files with codes or a weight [o, k], and fused experts under the name of their
    tensor and of its owner."""
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
