"""Which modules of a model are linears, by every name under which a reader of the files may look for them."""

from torch import Tensor, nn

from qlab.files.checkpoint import Checkpoint
from qlab.model.skeleton import Skeleton

HEAD = "lm_head"  # in no file where it shares the embedding's weight; readers that match by class still meet it


def linear_names(model: Checkpoint) -> dict[str, str]:
    """Name of a linear -> the module in the files that holds its weight.

    Where transformers knows the architecture: its own names and those of the files, which differ where it renames tensors,
    and one for every projection of fused experts.
    Of other models: every module of the files with a weight [o, k], embeddings among them, and the head.
    """
    if model.known:
        skeleton = Skeleton(model, model.dtype)
        own = {name: module for own in skeleton.linears() for module in [skeleton.module_name(own)] for name in (own, module)}
        return own | {module: module for module in skeleton.expert_modules()}
    matrices = [name for name, stored in model.stored.items() if name.endswith(".weight") and len(stored.shape) == 2]
    modules = {name.removesuffix(".weight") for name in matrices} | set(model.quantized) | {HEAD}
    return {name: name for name in sorted(modules)}


def other_matrices(model: Checkpoint) -> set[str]:
    """Modules of the files whose weight has two axes and is no linear's: embeddings, transposed layers. Where transformers does
    not know the architecture nobody can say, and none is returned."""
    if not model.known:
        return set()
    skeleton = Skeleton(model, model.dtype)
    found = {name: m for name, m in skeleton.model.named_modules() if not isinstance(m, nn.Linear) and _is_matrix(m)}
    return {skeleton.module_name(name) for name in found}


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2
