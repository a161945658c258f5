"""`int-quantized`, `float-quantized`, `naive-quantized` and `mxfp8-quantized`: one code per byte.

weight int8 or e4m3 [o, k], weight_scale [1] (tensor), [o, 1] (channel), [o, g] (group) or
[ceil(o/r), ceil(k/c)] (blocks of r x c) in its own dtype, for MXFP8 uint8 exponents of two biased
by 127; asymmetric integers add weight_zero_point int8 in the shape of the scales.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Spec
from qlab.codecs.compressed_tensors.packed import check_codes
from qlab.codecs.compressed_tensors.tensors import (
    check_scales,
    refuse_others,
    scale_dtypes,
    stored_shape,
    take_matrix,
    take_spread,
    whole_groups,
)
from qlab.errors import QlabError

E8M0 = torch.float8_e8m0fnu


def encode(path: str, leaf: QTensor) -> dict[str, Tensor]:
    """QTensor [o, k] -> {path.weight, path.weight_scale[, path.weight_zero_point]}."""
    check_scales(path, leaf)
    if isinstance(leaf.spec, Int):
        check_codes(path, leaf)
    stored = stored_shape(leaf.spec, leaf.shape)
    tensors = {
        "weight": leaf.codes.contiguous(),
        "weight_scale": as_stored(leaf.scales).reshape(stored),
    }
    if leaf.zeros is not None:
        tensors["weight_zero_point"] = leaf.zeros.reshape(stored)
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}


def as_stored(scales: Tensor) -> Tensor:
    """Powers of two as the bytes of their exponents, which files hold as uint8."""
    return (scales.view(torch.uint8) if scales.dtype == E8M0 else scales).contiguous()


def take_scales(
    path: str, tensors: Mapping[str, Tensor], spec: Spec, stored: tuple[int, ...]
) -> Tensor:
    """The module's weight_scale, uint8 exponents as the powers of two that they are."""
    if spec.scale_dtype != E8M0:
        return take_spread(path, tensors, "weight_scale", stored, *scale_dtypes(spec))
    scales = take_spread(path, tensors, "weight_scale", stored, torch.uint8).view(E8M0)
    if scales.isnan().any():
        raise QlabError(f"{path}.weight_scale holds 255, which is no exponent; the file is damaged")
    return scales


def decode(path: str, tensors: Mapping[str, Tensor], spec: Spec) -> QTensor:
    """The inverse of encode; refuses missing, misshaped and unexpected tensors of the module."""
    refuse_others(
        path,
        tensors,
        spec,
        {"weight", "weight_scale", *(() if spec.symmetric else ("weight_zero_point",))},
    )
    shape = torch.Size(take_matrix(path, tensors, "weight", spec.code_dtype))
    grid, stored = spec.tile.scales_shape(shape), stored_shape(spec, shape)
    if not whole_groups(spec, shape):
        raise QlabError(
            f"{path}.weight does not fit its config: groups of {spec.tile.cols} do not divide "
            f"{shape[-1]} channels"
        )
    scales = take_scales(path, tensors, spec, stored)
    zeros = (
        None
        if spec.symmetric
        else take_spread(path, tensors, "weight_zero_point", stored, torch.int8).reshape(grid)
    )
    leaf = QTensor(tensors[f"{path}.weight"], scales.reshape(grid), zeros, spec)
    if isinstance(spec, Int):
        check_codes(path, leaf)
    return leaf
