"""Which modules of a model readers may take for linears, by every name under which they may look for them in the files."""

from torch import Tensor, nn

from qlab.files.checkpoint import Checkpoint
from qlab.model.skeleton import Skeleton

HEAD = "lm_head"  # in no file where it shares the embedding's weight; readers that match by class still meet it


def linear_names(model: Checkpoint) -> dict[str, str]:
    """Name of a linear -> the module in the files that holds its weight.

    Where transformers knows the architecture: its own names and those of the files, which differ where it renames tensors,
    one for every projection of fused experts, and the routers, which to engines are linears like any other.
    Of other models: every module of the files with a weight [o, k], embeddings among them, and the head.
    """
    if model.known:
        skeleton = Skeleton(model, model.dtype)
        routers = [name for name, module in _other_matrices(skeleton).items() if not isinstance(module, nn.Embedding)]
        own = {name: m for own in [*skeleton.linears(), *routers] for m in [skeleton.module_name(own)] for name in (own, m)}
        return own | {module: module for module in skeleton.expert_modules()}
    matrices = [name for name, stored in model.stored.items() if name.endswith(".weight") and len(stored.shape) == 2]
    modules = {name.removesuffix(".weight") for name in matrices} | set(model.quantized) | {HEAD}
    return {name: name for name in sorted(modules)}


def other_matrices(model: Checkpoint) -> set[str]:
    """Modules of the files whose weight has two axes and is no linear's: embeddings, routers. Where transformers does not know the
    architecture nobody can say, and none is returned."""
    if not model.known:
        return set()
    skeleton = Skeleton(model, model.dtype)
    return {skeleton.module_name(name) for name in _other_matrices(skeleton)}


def transposed(model: Checkpoint) -> frozenset[str]:
    """Modules of the files whose weight is stored as [k, o] where it is dense; as far as transformers knows the architecture."""
    return Skeleton(model, model.dtype).transposed if model.known else frozenset()


def _other_matrices(skeleton: Skeleton) -> dict[str, nn.Module]:
    linears = set(skeleton.linears())
    return {name: m for name, m in skeleton.model.named_modules() if name not in linears and _is_matrix(m)}


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2
