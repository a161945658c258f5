"""What the layouts of compressed-tensors share: shapes and dtypes of scales, and checks of a
module's tensors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Spec, Tile
from qlab.codecs.checks import take, unknown_name
from qlab.errors import QlabError

# The tensors of static rounding of a module's inputs.
INPUTS = ("input_scale", "input_zero_point", "input_global_scale")
BESIDE = {"bias", *INPUTS}
# The dtypes that scales may be stored in where the spec does not say.
WIDE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def strategy(tile: Tile) -> str:
    """compressed-tensors' name for what one scale covers."""
    if tile.rows is None:
        return "tensor"
    if tile.rows > 1:
        return "block"
    return "group" if tile.cols else "channel"


def scale_dtypes(spec: Spec) -> tuple[torch.dtype, ...]:
    """The dtypes that scales of this spec may be stored in."""
    return (spec.scale_dtype,) if spec.scale_dtype else WIDE


def stored_shape(spec: Spec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file of the scales of a weight [o, k]; one scale per tensor is [1]."""
    return (1,) if strategy(spec.tile) == "tensor" else spec.tile.scales_shape(torch.Size(shape))


def whole_groups(spec: Spec, shape: Sequence[int]) -> bool:
    """Whether groups divide the rows of a weight [o, k]; a row shorter than a group is a group."""
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
            f"{path}: compressed-tensors stores int8 zeros, not {leaf.zeros.dtype}; "
            "choose a grid that rounds them"
        )


def take_matrix(
    path: str, tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype
) -> tuple[int, int]:
    """The shape of the module's tensor `name`, which may be any matrix of this dtype. An error
    names [1, 1] as the expected shape where it is no matrix."""
    tensor = tensors.get(f"{path}.{name}")
    rows, columns = 1, 1
    if tensor is not None and tensor.ndim == 2 and 0 not in tensor.shape:
        rows, columns = tensor.shape
    take(path, tensors, name, (rows, columns), dtype)
    return rows, columns


def refuse_others(path: str, tensors: Mapping[str, Tensor], spec: Spec, known: set[str]) -> None:
    """Refuse a tensor of the module that this layout has no place for: decoding would ignore it."""
    unknown = unknown_name(path, tensors, known | BESIDE)
    if unknown is not None:
        raise QlabError(
            f"{unknown} has no place beside {', '.join(sorted(known))} at {spec}; "
            "check the file's quantization_config"
        )
