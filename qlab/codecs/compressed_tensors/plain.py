"""`int-quantized`, `float-quantized`, `naive-quantized` and `mxfp8-quantized`: one code per byte.

weight             int8 or e4m3 [o, k]
weight_scale       [1] (tensor), [o, 1] (channel), [o, g] (group) or [ceil(o/r), ceil(k/c)]
                   (blocks of r x c) in its own dtype; for MXFP8 uint8 [o, g], W = q * 2^(s - 127)
weight_zero_point  int8 in the shape of the scales, asymmetric integers only
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Spec
from qlab.codecs.checks import check_codes, take_spread
from qlab.codecs.compressed_tensors.tensors import (
    check_scales,
    refuse_others,
    scale_dtypes,
    stored_shape,
    take_matrix,
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
    """Scales as files hold them: those in e8m0 as the uint8 bytes of their exponents."""
    return (scales.view(torch.uint8) if scales.dtype == E8M0 else scales).contiguous()


def take_scales(
    path: str, tensors: Mapping[str, Tensor], spec: Spec, stored: tuple[int, ...]
) -> Tensor:
    """The module's weight_scale; where the spec says e8m0, the bytes in the file are exponents."""
    if spec.scale_dtype != E8M0:
        return take_spread(path, tensors, "weight_scale", stored, *scale_dtypes(spec))
    scales = take_spread(path, tensors, "weight_scale", stored, torch.uint8).view(E8M0)
    if scales.isnan().any():
        raise QlabError(f"{path}.weight_scale holds 255, which is no exponent; the file is damaged")
    return scales


def decode(path: str, tensors: Mapping[str, Tensor], spec: Spec) -> QTensor:
    """The inverse of encode; refuses missing, misshaped and unexpected tensors of the module."""
    known = {"weight", "weight_scale"}
    if not spec.symmetric:
        known.add("weight_zero_point")
    refuse_others(path, tensors, spec, known)
    shape = torch.Size(take_matrix(path, tensors, "weight", spec.code_dtype))
    grid, stored = spec.tile.scales_shape(shape), stored_shape(spec, shape)
    if not whole_groups(spec, shape):
        raise QlabError(
            f"{path}.weight does not fit its config: groups of {spec.tile.cols} do not divide "
            f"{shape[-1]} channels"
        )
    scales = take_scales(path, tensors, spec, stored)
    zeros = None
    if not spec.symmetric:
        zeros = take_spread(path, tensors, "weight_zero_point", stored, torch.int8).reshape(grid)
    leaf = QTensor(tensors[f"{path}.weight"], scales.reshape(grid), zeros, spec)
    if isinstance(spec, Int):
        check_codes(path, leaf)
    return leaf
