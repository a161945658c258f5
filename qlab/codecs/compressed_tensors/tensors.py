"""Taking a module's tensors out of a file: each is there, of the right shape and type, and nothing
else is."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Spec, Tile
from qlab.codecs.checks import bare
from qlab.errors import QlabError

INPUTS = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
)  # what is fixed beforehand of a module's inputs
BESIDE = {"bias", *INPUTS}
WIDE = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
)  # what scales are stored in, where it is not settled


def strategy(tile: Tile) -> str:
    """compressed-tensors' name for what one scale covers."""
    if tile.rows is None:
        return "tensor"
    return "block" if tile.rows > 1 else "group" if tile.cols else "channel"


def scale_dtypes(spec: Spec) -> tuple[torch.dtype, ...]:
    """The dtypes that scales of this spec may be stored in."""
    return (spec.scale_dtype,) if spec.scale_dtype else WIDE


def stored_shape(spec: Spec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of a weight [o, k] in the file: one scale per tensor is a vector of one."""
    return (1,) if strategy(spec.tile) == "tensor" else spec.tile.scales_shape(torch.Size(shape))


def whole_groups(spec: Spec, shape: Sequence[int]) -> bool:
    """Whether groups divide the rows of a weight [o, k]; a row that is shorter than one is one."""
    k, cols = shape[-1], spec.tile.cols
    return spec.tile.rows != 1 or cols is None or k <= cols or k % cols == 0


def check_scales(path: str, leaf: QTensor) -> None:
    """Refuse scales and zero points in another dtype than the file's."""
    if leaf.scales.dtype not in scale_dtypes(leaf.spec):
        raise QlabError(
            f"{path}: scales are {leaf.scales.dtype}, expected {scale_dtypes(leaf.spec)[0]}; "
            f"round scales to their stored dtype before rounding codes"
        )
    if leaf.zeros is not None and leaf.zeros.dtype != torch.int8:
        raise QlabError(
            f"{path}: compressed-tensors stores int8 zeros, not {leaf.zeros.dtype}; choose a grid "
            "that rounds them"
        )


def take(
    path: str, tensors: Mapping[str, Tensor], name: str, shape: tuple, *dtypes: torch.dtype
) -> Tensor:
    """The module's tensor `name`; refuses one that is missing, of another shape or dtype, or not
    finite."""
    if f"{path}.{name}" not in tensors:
        raise QlabError(
            f"{path}.{name} is missing; the file is incomplete or its quantization_config is wrong"
        )
    tensor = tensors[f"{path}.{name}"]
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        raise QlabError(
            f"{path}.{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtypes[0]} {shape}; "
            f"the file is damaged or its quantization_config is wrong"
        )
    if tensor.is_floating_point() and not tensor.float().isfinite().all():
        raise QlabError(f"{path}.{name} holds NaN or Inf; the file is damaged")
    return tensor


def take_spread(
    path: str, tensors: Mapping[str, Tensor], name: str, shape: tuple, *dtypes: torch.dtype
) -> Tensor:
    """The same for scales and zero points, which writers store with axes of one or without them: []
    and [1], [o] and [o, 1]."""
    found = tensors.get(f"{path}.{name}")
    if found is not None and bare(found.shape) == bare(shape):
        tensors = {f"{path}.{name}": found.reshape(shape)}
    return take(path, tensors, name, shape, *dtypes)


def take_matrix(
    path: str, tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype
) -> tuple[int, int]:
    """The shape of the module's tensor `name`, which may be any matrix of this dtype."""
    found = tensors.get(f"{path}.{name}")
    shape = (1, 1) if found is None or found.ndim != 2 or 0 in found.shape else tuple(found.shape)
    take(path, tensors, name, shape, dtype)
    return shape[0], shape[1]


def refuse_others(path: str, tensors: Mapping[str, Tensor], spec: Spec, known: set[str]) -> None:
    """Refuse tensors of the module that this format has no place for, and would drop."""
    for name in sorted(tensors):
        module, _, kind = name.rpartition(".")
        if module == path and kind not in known | BESIDE:
            raise QlabError(
                f"{name} has no place beside {', '.join(sorted(known))} at {spec}; check the "
                "file's quantization_config"
            )
