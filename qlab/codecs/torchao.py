"""torchao's tensors as they lie in safetensors; read only.

Int8Tensor and IntxUnpackedToInt8Tensor, W = (q - z) * s:

    _weight_qdata       int8 [N, K], one signed code a byte
    _weight_scale       float [N, G]
    _weight_zero_point  int8 [N, G], or none

Int4Tensor, W = q * s + z. Its zero point is in units of the weight, which no grid of qlab has: such
a weight comes back dense.

    _weight_qdata       int8 or uint8 [N, K/2], the even column in the low nibble
    _weight_scale       float [G, N]
    _weight_zero_point  float [G, N]

Float8Tensor, W = q * s:

    _weight_qdata       e4m3 [N, K]
    _weight_scale       fp32 [N, 1], [1, 1], or [N, G]

Configs with "DynamicActivation" round the inputs as well, each token (PerRow) or all of them
(PerTensor) by its own largest number.

Layouts packed for one kind of device (tile-packed, preshuffled, opaque, plain int32) are refused.
Source: torchao 0.18.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import Leaf, QTensor
from qlab.algebra.spec import Float, InputSpec, Spec
from qlab.codecs import checks
from qlab.codecs.torchao_config import READ, ROUNDED, config_of
from qlab.errors import QlabError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = ("_weight_qdata", "_weight_scale", "_weight_zero_point")


def specs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Spec | None]:
    """The spec of every module with a quantized weight among `names`; None where it is
    Int4Tensor."""
    kind, data = config_of(config)
    return dict.fromkeys(checks.modules_with("_weight_qdata", names), READ[kind](data))


def inputs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, InputSpec]:
    """How the inputs of every module with a quantized weight are rounded at run time."""
    kind, data = config_of(config)
    if kind not in ROUNDED:
        return {}
    spec = InputSpec(ROUNDED[kind](data))
    return dict.fromkeys(checks.modules_with("_weight_qdata", names), spec)


def decode_input(path: str, tensors: Mapping[str, Tensor], spec: InputSpec) -> QuantizeInput:
    """The operation on the module's input, whose scales are computed from each x."""
    return QuantizeInput(spec.spec)


def decode(path: str, tensors: Mapping[str, Tensor], spec: Spec | None) -> Leaf:
    """The tensors of module `path` -> codes, or for a spec of None a dense weight in the dtype of
    the scales.

    Refuses missing, misshaped and unexpected tensors (an act_pre_scale among them), codes outside
    the grid, and zero points other than 0 where the config says symmetric.
    """
    checks.check_names(path, "torchao's format", tensors, TENSORS)
    if spec is None:
        return _dense(path, tensors)
    if isinstance(spec, Float):
        return _floats(path, tensors, spec)
    codes = checks.take(path, tensors, "_weight_qdata", (None, None), torch.int8)
    o, k = codes.shape
    if spec.tile.cols and k % spec.tile.cols:
        raise QlabError(
            f"{path}._weight_qdata {(o, k)} does not hold a weight of {spec}; "
            "the file or its config is wrong"
        )
    low, high = (int(extreme) for extreme in codes.aminmax())
    if low < spec.qmin or high > spec.qmax:
        raise QlabError(
            f"{path}._weight_qdata spans [{low}, {high}] and int{spec.bits} holds [{spec.qmin}, "
            f"{spec.qmax}]; the file or its config is wrong"
        )
    grid = spec.tile.scales_shape(codes.shape)
    scales = checks.take_spread(path, tensors, "_weight_scale", grid, *FLOATS)
    if spec.symmetric and f"{path}._weight_zero_point" not in tensors:
        return QTensor(codes, scales, None, spec)
    zeros = checks.take_spread(path, tensors, "_weight_zero_point", grid, torch.int8)
    if spec.symmetric and bool(zeros.any()):
        raise QlabError(
            f"{path}._weight_zero_point is not 0 everywhere and the config says symmetric; "
            "one of them is wrong"
        )
    return QTensor(codes, scales, None if spec.symmetric else zeros, spec)


def _floats(path: str, tensors: Mapping[str, Tensor], spec: Float) -> QTensor:
    """A Float8Tensor."""
    codes = checks.take(path, tensors, "_weight_qdata", (None, None), torch.float8_e4m3fn)
    if spec.tile.cols and codes.shape[1] % spec.tile.cols:
        raise QlabError(
            f"{path}._weight_qdata {tuple(codes.shape)} does not hold a weight of {spec}; "
            "the file or its config is wrong"
        )
    grid = spec.tile.scales_shape(codes.shape)
    return QTensor(
        codes, checks.take_spread(path, tensors, "_weight_scale", grid, *FLOATS), None, spec
    )


def _dense(path: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """An Int4Tensor as a dense weight [o, k] in the dtype of its scales."""
    dtypes = torch.int8, torch.uint8
    words = checks.take(path, tensors, "_weight_qdata", (None, None), *dtypes).view(torch.uint8)
    o, k = words.shape[0], 2 * words.shape[1]
    scales = checks.take(path, tensors, "_weight_scale", (None, o), *FLOATS)
    groups = scales.shape[0]
    zeros = checks.take(path, tensors, "_weight_zero_point", (groups, o), scales.dtype)
    if k % groups:
        raise QlabError(f"{path} has {groups} scales for rows of {k} codes; the file is damaged")
    # The shift of signed bytes is arithmetic: it repeats a nibble's top bit, which is its sign.
    codes = torch.stack((words << 4, words & 0xF0), -1).view(torch.int8) >> 4
    codes_ogi = codes.view(o, groups, -1).float()
    dense_ogi = codes_ogi * scales.mT.float()[..., None] + zeros.mT.float()[..., None]
    return dense_ogi.view(o, k).to(scales.dtype)
