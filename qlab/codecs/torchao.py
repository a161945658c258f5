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

Layouts packed for one kind of device (tile-packed, preshuffled, opaque, plain int32) are refused.
Source: torchao 0.18.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.qtensor import Leaf, QTensor
from qlab.algebra.spec import Int, Spec, Tile
from qlab.codecs import checks
from qlab.errors import QlabError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
INTS = tuple(f"int{bits}" for bits in range(1, 9))
SYMMETRIC = {"SYMMETRIC": True, "SYMMETRIC_NO_CLIPPING_ERR": True, "ASYMMETRIC": False}


def specs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Spec | None]:
    """The spec of every module with a quantized weight among `names`; None where it is
    Int4Tensor."""
    quant_type = config.get("quant_type")
    if not isinstance(quant_type, Mapping) or list(quant_type) != ["default"]:
        raise QlabError(
            f"quantization_config has quant_type {quant_type!r:.80}; "
            "qlab reads one config for all modules, as 'default'"
        )
    kind, data = _typed(quant_type["default"])
    if kind not in READ:
        raise QlabError(f"quantization_config has torchao's {kind}; qlab reads {', '.join(READ)}")
    return dict.fromkeys(checks.modules_with("_weight_qdata", names), READ[kind](data))


def _typed(value: Any) -> tuple[str, Any]:
    """torchao writes its objects as {"_type": class, "_data": fields}."""
    if not isinstance(value, Mapping) or not isinstance(value.get("_type"), str):
        raise QlabError(
            f"quantization_config has {value!r:.80} where torchao writes an object with a _type; "
            "repair it"
        )
    return value["_type"], value.get("_data")


def _int8(data: Any) -> Spec:
    data = _fields(data)
    group = data.get("group_size")
    if data.get("granularity") and group is None:
        return Int(8, _tile(data["granularity"]))
    return Int(8, Tile(1, _size(group)))


def _intx(data: Any) -> Spec:
    data = _fields(data)
    _, dtype = _typed(data.get("weight_dtype"))
    _, mapping = _typed(data.get("mapping_type"))
    packing = data.get("intx_packing_format") and _typed(data["intx_packing_format"])[1]
    if not isinstance(dtype, str) or dtype not in INTS or mapping not in list(SYMMETRIC):
        raise QlabError(
            f"quantization_config has weight_dtype {dtype!r} and mapping_type {mapping!r}; "
            "qlab reads int1 to int8"
        )
    if packing not in (None, "UNPACKED_TO_INT8"):
        raise QlabError(
            f"quantization_config has intx_packing_format {packing!r}; qlab reads UNPACKED_TO_INT8"
        )
    return Int(int(dtype[3:]), _tile(data.get("granularity")), SYMMETRIC[mapping])


def _int4(data: Any) -> None:
    packing = _typed(_fields(data).get("int4_packing_format"))[1]
    if packing != "PLAIN":
        raise QlabError(
            f"quantization_config has int4_packing_format {packing!r}, made for one kind of "
            "device; qlab reads PLAIN"
        )


READ = {"Int8WeightOnlyConfig": _int8, "IntxWeightOnlyConfig": _intx, "Int4WeightOnlyConfig": _int4}


def _fields(data: Any) -> Mapping[str, Any]:
    """The fields of one of torchao's objects."""
    if not isinstance(data, Mapping):
        raise QlabError(
            f"quantization_config has {data!r:.80} where torchao writes the fields of a config; "
            "repair it"
        )
    return data


def _tile(granularity: Any) -> Tile:
    kind, data = _typed(granularity)
    data = _fields(data)
    if kind == "PerGroup":
        return Tile(1, _size(data.get("group_size")))
    per_axis_0 = kind == "PerAxis" and data.get("axis", 0) == 0
    per_last_dim = kind == "PerRow" and data.get("dim", -1) == -1
    if per_axis_0 or per_last_dim:
        return Tile(1, None)
    raise QlabError(
        f"quantization_config has granularity {kind} {dict(data)}; "
        "qlab reads PerGroup, PerRow and PerAxis 0"
    )


def _size(group: Any) -> int | None:
    if group is not None and (type(group) is not int or group < 1):
        raise QlabError(
            f"quantization_config has group_size {group!r}; it is a number of input channels"
        )
    return group


def decode(path: str, tensors: Mapping[str, Tensor], spec: Int | None) -> Leaf:
    """The tensors of module `path` -> codes, or for a spec of None a dense weight in the dtype of
    the scales.

    Refuses missing, misshaped and unexpected tensors (an act_pre_scale among them), codes outside
    the grid, and zero points other than 0 where the config says symmetric.
    """
    checks.check_names(path, "torchao's format", tensors, TENSORS)
    if spec is None:
        return _dense(path, tensors)
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
    grid = (o, k // (spec.tile.cols or k))
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
