"""Number grids as compressed-tensors writes them down: QuantizationArgs, format names and
presets."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qlab.algebra.graph import Op
from qlab.algebra.online import QuantizeInput, matrix_of
from qlab.algebra.spec import FLOATS, NAMED, Float, InputSpec, Int, Spec, Tile, same_grid
from qlab.codecs.compressed_tensors import rotations
from qlab.codecs.compressed_tensors.tensors import WIDE, strategy
from qlab.errors import QlabError

ARGS = {
    "num_bits",
    "type",
    "symmetric",
    "strategy",
    "group_size",
    "block_structure",
    "dynamic",
    "actorder",
    "scale_dtype",
    "zp_dtype",
    "observer",
    "observer_kwargs",
}
PACKED = {4: "mxfp4-pack-quantized", 6: "mxfp6-pack-quantized"}
E8M0 = torch.float8_e8m0fnu


def refusal(spec: Spec, online: Sequence[Op] = ()) -> str | None:
    """Why compressed-tensors cannot hold such a weight, or None when it can."""
    return _refusal_of_operations(online) or _refusal_of_grid(spec)


def _refusal_of_operations(online: Sequence[Op]) -> str | None:
    if online and matrix_of(online[0]) is not None:
        reason = rotations.refusal(online[0], "input")
        if reason:
            return reason
        online = online[1:]
    others = [op for op in online if not isinstance(op, QuantizeInput)]
    if others:
        return (
            f"compressed-tensors holds no run-time {type(others[0]).__name__}, only rounded "
            "inputs; fold it into the weights or leave the method out"
        )
    if len(online) > 1:
        return "compressed-tensors rounds an input once; give each site one quantize_inputs"
    reasons = (_unreadable(op) for op in online if isinstance(op, QuantizeInput))
    return next((reason for reason in reasons if reason), None)


def _refusal_of_grid(spec: Spec) -> str | None:
    if isinstance(spec, Int):
        if strategy(spec.tile) == "block":
            return (
                f"compressed-tensors has no scale per {spec.tile} block of integers; "
                "use a group, channel or tensor scale"
            )
        if spec.zero_dtype != torch.int8:
            return (
                f"compressed-tensors has no {spec.zero_dtype} zero points; "
                "use a method that rounds them"
            )
    elif spec.bits < 8 and spec not in NAMED.values():
        return (
            f"compressed-tensors has no {spec}; its floats below 8 bits are mxfp4, mxfp6 and nvfp4"
        )
    if spec.scale_dtype not in (None, *WIDE) and spec not in NAMED.values():
        return (
            f"compressed-tensors has no {spec.scale_dtype} scales for {spec}; "
            "store them as float32, bfloat16 or float16"
        )
    return None


def _unreadable(rounding: QuantizeInput) -> str | None:
    """Why inputs that are rounded so would not be read as they were written, or None."""
    written = rounding.input_spec
    if written.spec.outer and rounding.outer is None:
        return (
            f"compressed-tensors stores a global scale of inputs {written}, and this has none; "
            "measure it (quantize_inputs does)"
        )
    args = args_of(written.spec, written.static, of_inputs=True)
    try:
        read = input_spec_of("input_activations", args)
    except QlabError as error:
        return f"compressed-tensors has no inputs {written}: {error}"
    if read.static != written.static or not same_grid(read.spec, written.spec):
        return (
            f"compressed-tensors has no inputs {written}, which would be read as {read}; "
            "choose another input spec"
        )
    return None


def format_of(spec: Spec, inputs: InputSpec | None = None) -> str:
    """The format in which a weight with such inputs is written.

    It is the one that compressed-tensors picks itself, but for integers below 8 bits with rounded
    inputs: the library stores a byte per code, for which no engine has a kernel.
    """
    if isinstance(spec, Int):
        bytes_of_both = spec.bits == 8 and inputs is not None and isinstance(inputs.spec, Int)
        return "int-quantized" if bytes_of_both else "pack-quantized"
    if spec.outer:
        return "nvfp4-pack-quantized"
    if spec.scale_dtype == E8M0:
        return PACKED.get(spec.bits, "mxfp8-quantized")
    return "float-quantized" if inputs else "naive-quantized"


# format -> the types and bits of the weights that it may hold
FORMATS = {
    "pack-quantized": (("int",), range(1, 9)),
    "int-quantized": (("int",), range(1, 9)),
    "float-quantized": (("float",), (8,)),
    "naive-quantized": (("int", "float"), range(1, 9)),
    "mxfp8-quantized": (("float",), (8,)),
    "mxfp4-pack-quantized": (("float",), (4,)),
    "mxfp6-pack-quantized": (("float",), (6,)),
    "nvfp4-pack-quantized": (("float",), (4,)),
    "dense": ((), ()),
}


def check_format(where: str, name: Any, spec: Spec | None) -> None:
    """Refuse a format that qlab does not read, or that does not hold such weights."""
    if not isinstance(name, str) or name not in FORMATS:
        raise QlabError(f"{where} has format {name!r}; qlab reads {', '.join(FORMATS)}")
    if spec is None:
        return
    kinds, bits = FORMATS[name]
    kind = "int" if isinstance(spec, Int) else "float"
    if spec.bits not in bits or kind not in kinds:
        raise QlabError(f"{where} has format {name!r}, which holds no {spec}; its config is wrong")


# ------------------------------------------------------------------ writing
def args_of(spec: Spec, static: bool = True, of_inputs: bool = False) -> dict[str, Any]:
    """The spec as QuantizationArgs. Scale dtypes are written where they are part of the grid;
    elsewhere the tensors have them."""
    name = strategy(spec.tile)
    args: dict[str, Any] = {
        "dynamic": not static,
        "group_size": spec.tile.cols if name == "group" else None,
        "num_bits": spec.bits,
        "strategy": name,
        "symmetric": spec.symmetric,
        "type": "int" if isinstance(spec, Int) else "float",
    }
    if name == "block":
        args["block_structure"] = [spec.tile.rows, spec.tile.cols]
    if of_inputs and name == "channel":
        args["strategy"] = "token"
    if spec.outer:
        args |= {
            "strategy": "tensor_group",
            "scale_dtype": "torch.float8_e4m3fn",
            "dynamic": "local" if of_inputs else False,
        }
    elif spec.scale_dtype == E8M0:
        args["scale_dtype"] = "torch.uint8"
    return dict(sorted(args.items()))


# ------------------------------------------------------------------ reading
def spec_of(where: str, args: Any) -> Spec:
    """The spec that the QuantizationArgs of weights mean; refuses those that qlab does not read."""
    check_args(where, args)
    if args.get("dynamic") not in (None, False):
        raise QlabError(f"{where} has dynamic {args['dynamic']!r}; weights are rounded beforehand")
    if args.get("actorder") not in (None, False, True, "weight", "static", "group", "dynamic"):
        raise QlabError(
            f"{where} has actorder {args['actorder']!r}; "
            "qlab knows weight, static, group and dynamic"
        )
    return _spec(where, args, _tile(where, args))


def input_spec_of(where: str, args: Any) -> InputSpec:
    """How the QuantizationArgs of input_activations round at run time."""
    check_args(where, args)
    dynamic = args.get("dynamic", False)
    if dynamic not in (True, False, "local"):
        raise QlabError(f"{where} has dynamic {dynamic!r}; it is true, false or 'local'")
    per_token = args.get("strategy") == "token"
    tile = _tile(where, {**args, "strategy": "channel"} if per_token else args)
    spec = _spec(where, args, tile)
    static, one_scale = dynamic is not True, tile == Tile(None, None)
    several_stored = static and not one_scale and not spec.outer
    if several_stored or bool(spec.outer) != (dynamic == "local"):
        raise QlabError(
            f"{where} has strategy {args.get('strategy')!r} with dynamic {dynamic!r}; qlab reads "
            "inputs with one stored scale per tensor, with dynamic ones, and NVFP4 with 'local' "
            "ones"
        )
    if tile.rows not in (None, 1) or (tile == Tile(1, None) and not per_token):
        raise QlabError(
            f"{where} has strategy {args.get('strategy')!r}; "
            "inputs have a scale per tensor, token or group"
        )
    return InputSpec(spec, static)


def check_args(where: str, args: Any) -> None:
    """Refuse a value that is no QuantizationArgs."""
    if not isinstance(args, Mapping):
        raise QlabError(f"{where} is {args!r}, no QuantizationArgs")
    unknown = sorted(map(str, args.keys() - ARGS))
    if unknown:
        raise QlabError(
            f"{where} has unknown key {unknown[0]!r}; qlab knows {', '.join(sorted(ARGS))}"
        )
    for key in ("num_bits", "group_size"):
        if args.get(key) is not None and type(args[key]) is not int:
            raise QlabError(f"{where} has {key} {args[key]!r}, no whole number")
    symmetric, kind = args.get("symmetric", True), args.get("type", "int")
    if symmetric not in (True, False) or kind not in ("int", "float"):
        raise QlabError(
            f"{where} has symmetric {args.get('symmetric')!r} and type {args.get('type')!r}; "
            "qlab reads true or false, and int or float"
        )


def _tile(where: str, args: Mapping[str, Any]) -> Tile:
    """What one scale covers. A config may leave the strategy out where the size implies it."""
    size, block = args.get("group_size"), args.get("block_structure")
    implied = {None: "tensor", -1: "channel"}.get(size, "group")
    name = args.get("strategy") or implied
    if name == "block" and size is None:
        return Tile(*_block(where, block))
    if block is None:
        if name in ("group", "tensor_group") and size and size > 0:
            return Tile(1, size)
        if name in ("channel", "tensor") and size in (None, -1):
            return Tile(1 if name == "channel" else None, None)
    raise QlabError(
        f"{where} has strategy {name!r} with group_size {size} and block_structure {block}; "
        "qlab reads group with a size, block with a structure, channel and tensor"
    )


def _block(where: str, block: Any) -> tuple[int, int]:
    """[rows, columns] of a block."""
    if isinstance(block, str):  # older releases write "128x128"
        block = [int(size) if size.isdecimal() else size for size in block.split("x")]
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or not all(type(size) is int and 1 <= size <= 1 << 20 for size in sizes):
        raise QlabError(f"{where} has block_structure {block!r}; it is [rows, columns]")
    return sizes[0], sizes[1]


def _spec(where: str, args: Mapping[str, Any], tile: Tile) -> Spec:
    """The spec that QuantizationArgs with this tile mean, of weights or of inputs."""
    bits, symmetric = args.get("num_bits"), args.get("symmetric", True)
    bits = 8 if bits is None else bits
    if args.get("type", "int") == "int":
        return Int(bits, tile, symmetric)
    scales, two_level = args.get("scale_dtype"), args.get("strategy") == "tensor_group"
    powers = scales in ("torch.uint8", "uint8") or bits < 8
    if tile.rows == 1 and symmetric:
        grouped = (bits, tile.cols, two_level)
        if grouped == (4, 16, True):
            return NAMED["nvfp4"]
        if powers and grouped in ((4, 32, False), (6, 32, False), (8, 32, False)):
            return NAMED[f"mxfp{bits}"]
    if bits != 8 or not symmetric or two_level or powers:
        raise QlabError(
            f"{where} has {'symmetric' if symmetric else 'asymmetric'} fp{bits} with strategy "
            f"{args.get('strategy')!r}, group_size {args.get('group_size')} and scale_dtype "
            f"{scales!r}; qlab reads fp8, {', '.join(NAMED)}"
        )
    return Float(*FLOATS["fp8"], tile)


# ------------------------------------------------------------------ presets
# name -> (spec of weights, spec of inputs)
PRESETS: Mapping[str, tuple[str | None, str | None]] = {
    "UNQUANTIZED": (None, None),
    **{f"W{b}A16": (f"int{b}-g128", None) for b in range(2, 9)},
    **{f"W{b}A8": (f"int{b}-g128", "int8-token") for b in range(2, 8)},
    **{f"W{b}A4": (f"int{b}-g128", "int4-token") for b in (2, 3, 4)},
    "W4A16_ASYM": ("int4-g128-asym", None),
    "W4AFP8": ("int4-g128", "fp8-token"),
    "W8A8": ("int8-channel", "int8-token"),
    "INT8": ("int8-channel", "int8-token"),
    "FP8": ("fp8-tensor", "fp8-tensor static"),
    "FP8_DYNAMIC": ("fp8-channel", "fp8-token"),
    "FP8_BLOCK": ("fp8-b128x128", "fp8-g128"),
    "NVFP4A16": ("nvfp4", None),
    "NVFP4": ("nvfp4", "nvfp4 static"),
    "MXFP4A16": ("mxfp4", None),
    "MXFP4": ("mxfp4", "mxfp4"),
    "MXFP4XFP8": ("mxfp4", "fp8-g128"),
    "MXFP6A16": ("mxfp6", None),
    "MXFP6A8": ("mxfp6", "mxfp8"),
    "MXFP8A16": ("mxfp8", None),
    "MXFP8": ("mxfp8", "mxfp8"),
}
