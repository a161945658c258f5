"""torchao's tensors as they lie in safetensors; read only.

    _weight_qdata       int8 [N, K]: Int8Tensor and IntxUnpackedToInt8Tensor, one signed code a
                        byte, W = (q - z) * s
    _weight_scale       float [N, G]      _weight_zero_point  int8 [N, G], or none
    _weight_qdata       int8 or uint8 [N, K/2]: Int4Tensor, the even column in the low nibble, W = q
                        * s + z with a zero point in units of the weight, [G, N] like its scale: no
                        grid of qlab has that, it comes back as a dense weight

Formats packed for one kind of device (tile-packed, preshuffled, opaque, plain int32) are refused.
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
SYMMETRIC = {"SYMMETRIC": True, "SYMMETRIC_NO_CLIPPING_ERR": True, "ASYMMETRIC": False}


def specs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Spec | None]:
    """The spec of every module with a quantized weight among `names`; None where it is
    Int4Tensor."""
    quant_type = config.get("quant_type")
    if not isinstance(quant_type, Mapping) or list(quant_type) != ["default"]:
        raise QlabError(
            f"quantization_config has quant_type {quant_type!r:.80}; qlab reads one config for "
            "all modules, as 'default'"
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
    tile = (
        _tile(data["granularity"])
        if data.get("granularity") and group is None
        else Tile(1, _size(group))
    )
    return Int(8, tile)


def _intx(data: Any) -> Spec:
    data = _fields(data)
    (_, dtype), (_, mapping) = _typed(data.get("weight_dtype")), _typed(data.get("mapping_type"))
    packing = data.get("intx_packing_format") and _typed(data["intx_packing_format"])[1]
    if (
        not isinstance(dtype, str)
        or dtype not in {f"int{bits}" for bits in range(1, 9)}
        or mapping not in list(SYMMETRIC)
    ):
        raise QlabError(
            f"quantization_config has weight_dtype {dtype!r} and mapping_type {mapping!r}; qlab "
            "reads int1 to int8"
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
    if (kind, data.get("axis", 0)) == ("PerAxis", 0) or (kind, data.get("dim", -1)) == (
        "PerRow",
        -1,
    ):
        return Tile(1, None)
    raise QlabError(
        f"quantization_config has granularity {kind} {dict(data)}; qlab reads PerGroup, PerRow "
        "and PerAxis 0"
    )


def _size(group: Any) -> int | None:
    if group is not None and (type(group) is not int or group < 1):
        raise QlabError(
            f"quantization_config has group_size {group!r}; it is a number of input channels"
        )
    return group


def decode(path: str, tensors: Mapping[str, Tensor], spec: Int | None) -> Leaf:
    """The tensors of module `path` -> codes, or a dense weight in the scales' dtype (spec None).

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
            f"{path}._weight_qdata {(o, k)} does not hold a weight of {spec}; the file or its "
            "config is wrong"
        )
    low, high = (int(x) for x in codes.aminmax())
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
            f"{path}._weight_zero_point is not 0 everywhere and the config says symmetric; one of "
            "them is wrong"
        )
    return QTensor(codes, scales, None if spec.symmetric else zeros, spec)


def _dense(path: str, tensors: Mapping[str, Tensor]) -> Tensor:
    words = checks.take(path, tensors, "_weight_qdata", (None, None), torch.int8, torch.uint8).view(
        torch.uint8
    )
    (o, half), scale = (
        words.shape,
        checks.take(path, tensors, "_weight_scale", (None, words.shape[0]), *FLOATS),
    )
    zeros = checks.take(path, tensors, "_weight_zero_point", tuple(scale.shape), scale.dtype)
    if 2 * half % scale.shape[0]:
        raise QlabError(
            f"{path} has {scale.shape[0]} scales for rows of {2 * half} codes; the file is damaged"
        )
    signed = (
        torch.stack((words << 4, words & 0xF0), -1).view(torch.int8) >> 4
    )  # arithmetic: the top bit of a nibble is its sign
    groups = signed.view(o, scale.shape[0], -1).float()
    return (
        (groups * scale.mT.float()[..., None] + zeros.mT.float()[..., None])
        .view(o, 2 * half)
        .to(scale.dtype)
    )
