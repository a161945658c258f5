"""torchao's configs as they lie in config.json: which numbers weights and their inputs are rounded
to."""

from collections.abc import Mapping
from typing import Any

from qlab.algebra.spec import FLOATS, Float, Int, Spec, Tile
from qlab.errors import QlabError

INTS = tuple(f"int{bits}" for bits in range(1, 9))
SYMMETRIC = {"SYMMETRIC": True, "SYMMETRIC_NO_CLIPPING_ERR": True, "ASYMMETRIC": False}


def config_of(config: Mapping[str, Any]) -> tuple[str, Any]:
    """The class of the one config of all modules, and its fields."""
    quant_type = config.get("quant_type")
    if not isinstance(quant_type, Mapping) or list(quant_type) != ["default"]:
        raise QlabError(
            f"quantization_config has quant_type {quant_type!r:.80}; "
            "qlab reads one config for all modules, as 'default'"
        )
    kind, data = _typed(quant_type["default"])
    if kind not in READ:
        raise QlabError(f"quantization_config has torchao's {kind}; qlab reads {', '.join(READ)}")
    return kind, data


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


def _int8_beside_int8(data: Any) -> Spec:
    return Int(8, _tile(_granularities(_fields(data))[1], whole=True))


def _int8_inputs(data: Any) -> Spec:
    data = _fields(data)
    bits = 7 if data.get("reduce_range") else 8
    tile = _tile(_granularities(data)[0], whole=True)
    return Int(bits, tile, _is_symmetric(data.get("act_mapping_type")))


def _float8(data: Any) -> Spec:
    data = _fields(data)
    _check_e4m3(data, "weight_dtype")
    return Float(*FLOATS["fp8"], _tile(data.get("granularity"), whole=True))


def _float8_beside_float8(data: Any) -> Spec:
    data = _fields(data)
    _check_e4m3(data, "weight_dtype")
    packing = data.get("packing_format") and _typed(data["packing_format"])[1]
    if packing not in (None, "PLAIN", "plain"):
        raise QlabError(
            f"quantization_config has packing_format {packing!r}, made for one kind of device; "
            "qlab reads PLAIN"
        )
    return Float(*FLOATS["fp8"], _tile(_granularities(data)[1], whole=True))


def _float8_inputs(data: Any) -> Spec:
    data = _fields(data)
    _check_e4m3(data, "activation_dtype")
    for bound in ("activation_value_lb", "activation_value_ub"):
        if data.get(bound) is not None:
            raise QlabError(
                f"quantization_config has {bound} {data[bound]!r:.80}; qlab reads activations "
                "whose scales have no bounds"
            )
    return Float(*FLOATS["fp8"], _tile(_granularities(data)[0], whole=True))


def _intx_inputs(data: Any) -> Spec:
    return Int(8, Tile(1, None), _is_symmetric(_fields(data).get("act_mapping_type")))


def _check_e4m3(data: Mapping[str, Any], key: str) -> None:
    """Refuse another float than e4m3."""
    _, dtype = _typed(data.get(key))
    if dtype != "float8_e4m3fn":
        raise QlabError(f"quantization_config has {key} {dtype!r:.80}; qlab reads float8_e4m3fn")


def _is_symmetric(mapping: Any) -> bool:
    """Whether a mapping has no zero points."""
    _, kind = _typed(mapping)
    if kind not in list(SYMMETRIC):
        raise QlabError(
            f"quantization_config has act_mapping_type {kind!r:.80}; qlab reads "
            f"{', '.join(SYMMETRIC)}"
        )
    return SYMMETRIC[kind]


def _granularities(data: Mapping[str, Any]) -> tuple[Any, Any]:
    """Those of activations and of weights: a list of both, or one of either."""
    both = data.get("granularity")
    if isinstance(both, list) and len(both) == 2:
        return both[0], both[1]
    return both, both


def _intx_beside_int8(data: Any) -> Spec:
    fields = _fields(data)
    names = {"granularity": "weight_granularity", "mapping_type": "weight_mapping_type"}
    return _intx({**fields, **{name: fields.get(theirs) for name, theirs in names.items()}})


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


READ = {
    "Int8WeightOnlyConfig": _int8,
    "IntxWeightOnlyConfig": _intx,
    "Int4WeightOnlyConfig": _int4,
    "Int8DynamicActivationInt8WeightConfig": _int8_beside_int8,
    "Int8DynamicActivationIntxWeightConfig": _intx_beside_int8,
    "Float8WeightOnlyConfig": _float8,
    "Float8DynamicActivationFloat8WeightConfig": _float8_beside_float8,
}
# the spec of inputs that are rounded
ROUNDED = {
    "Int8DynamicActivationInt8WeightConfig": _int8_inputs,
    "Int8DynamicActivationIntxWeightConfig": _intx_inputs,
    "Float8DynamicActivationFloat8WeightConfig": _float8_inputs,
}


def _fields(data: Any) -> Mapping[str, Any]:
    """The fields of one of torchao's objects."""
    if not isinstance(data, Mapping):
        raise QlabError(
            f"quantization_config has {data!r:.80} where torchao writes the fields of a config; "
            "repair it"
        )
    return data


def _tile(granularity: Any, whole: bool = False) -> Tile:
    """What one scale covers. whole: also all of a tensor."""
    kind, data = _typed(granularity)
    data = _fields(data)
    if kind == "PerGroup":
        return Tile(1, _size(data.get("group_size")))
    per_axis_0 = kind == "PerAxis" and data.get("axis", 0) == 0
    per_last_dim = kind == "PerRow" and data.get("dim", -1) == -1
    if per_axis_0 or per_last_dim:
        return Tile(1, None)
    if kind == "PerTensor" and whole:
        return Tile(None, None)
    raise QlabError(
        f"quantization_config has granularity {kind} {dict(data)}; "
        f"qlab reads PerGroup, PerRow and PerAxis 0{' and PerTensor' if whole else ''}"
    )


def _size(group: Any) -> int | None:
    if group is not None and (type(group) is not int or group < 1):
        raise QlabError(
            f"quantization_config has group_size {group!r}; it is a number of input channels"
        )
    return group
