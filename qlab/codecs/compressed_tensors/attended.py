"""Roundings of the queries, keys and values that attention reads: their QuantizationArgs and their
scales q_scale, k_scale and v_scale.

One static scale is [1], and one for each head [heads, 1, 1] ("attn_head"). Dynamic ones, for
groups of a head's channels, have no tensors. Source: compressed-tensors 0.20.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from qlab.algebra.graph import Op
from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import FLOATS, Float, Int, Spec
from qlab.algebra.tile import Tile
from qlab.errors import QlabError

SCALES = {"query": "q_scale", "key": "k_scale", "value": "v_scale"}
BITS = (4, 8)
PER_HEAD = "attn_head"


def refusal(op: Op) -> str | None:
    """Why what attention reads cannot be rounded so in a directory, or None."""
    if not isinstance(op, QuantizeInput):
        return f"compressed-tensors holds no run-time {type(op).__name__} there"
    spec = op.spec
    is_fp8 = isinstance(spec, Float) and (spec.exponent, spec.mantissa) == FLOATS["fp8"]
    is_int = isinstance(spec, Int) and spec.symmetric and spec.bits in BITS
    if not (is_fp8 or is_int) or spec.outer or spec.scale_dtype is not None:
        return f"compressed-tensors has no {spec} there; it holds symmetric int4, int8 and fp8"
    if spec.tile == Tile(1, None):
        return (
            f"compressed-tensors has no scale per token of all heads ({spec}) there; give one to "
            "groups of the channels of a head (-g and a size), or a static one (-tensor, -head)"
        )
    return None


def args_of(op: QuantizeInput) -> dict[str, Any]:
    """The QuantizationArgs of a rounding that is not refused."""
    rows, cols = op.spec.tile.rows, op.spec.tile.cols
    strategy = "group"
    if rows is None:
        strategy = "tensor" if cols is None else PER_HEAD
    return {
        "dynamic": rows is not None,
        "group_size": cols if strategy == "group" else None,
        "num_bits": op.spec.bits,
        "strategy": strategy,
        "symmetric": True,
        "type": "int" if isinstance(op.spec, Int) else "float",
    }


def encode(name: str, op: QuantizeInput) -> dict[str, Tensor]:
    """The tensor `name` of a static rounding; nothing of a dynamic one."""
    if op.scales is None:
        return {}
    scales = op.scales.reshape(-1)
    is_per_head = op.spec.tile.cols is not None
    return {name: (scales[:, None, None] if is_per_head else scales).clone()}


def decode(
    name: str, args: Mapping[str, Any], channels: int, tensor: Callable[[str], Tensor]
) -> QuantizeInput:
    """The inverse of `args_of` and `encode`.

    channels: of a head. tensor: reads a tensor of the files by its name.
    """
    spec = spec_of(args, channels)
    assert spec is not None  # asked before
    if not is_static(args):
        return QuantizeInput(spec)
    scales = tensor(name)
    several = args.get("strategy") == PER_HEAD
    has_shape = scales.shape[1:] in ((), (1, 1)) if several else scales.numel() == 1
    if not has_shape or not scales.is_floating_point() or not (scales > 0).all():
        raise QlabError(
            f"{name} is {scales.dtype} {tuple(scales.shape)}, expected positive scales "
            f"{'[heads, 1, 1]' if several else '[1]'}; the file is damaged"
        )
    return QuantizeInput(spec, scales.reshape(1, -1))


def refusal_of_args(args: Mapping[str, Any]) -> str | None:
    """What of QuantizationArgs qlab does not compute, or None."""
    bits, symmetric = args.get("num_bits") or 8, args.get("symmetric", True)
    is_known = isinstance(args.get("strategy") or "", str) and isinstance(
        args.get("dynamic") or False, bool
    )
    if is_known and symmetric and bits in BITS and spec_of(args, 1) is not None:
        return None
    return (
        f"strategy {args.get('strategy')!r}, dynamic {args.get('dynamic')!r}, symmetric "
        f"{symmetric!r} and num_bits {bits}; qlab reads symmetric ones of 4 or 8 bits with a "
        "stored scale per tensor or head, or dynamic ones per group"
    )


def fault(of: str, scale: Tensor) -> str | None:
    """What is wrong with a stored scale, or None. of: what it rounds, in words."""
    good = scale.is_floating_point() and bool(((scale > 0) & scale.isfinite()).all())
    return None if good else f"is no scale of {of}, which are positive"


def modules_of(names: Collection[str]) -> tuple[set[str], set[str]]:
    """The modules that have the tensors `names`, and the modules around those."""
    modules = {name.rpartition(".")[0] for name in names}
    return modules, {module.rpartition(".")[0] for module in modules}


def is_static(args: Mapping[str, Any]) -> bool:
    """Whether scales are stored."""
    return not args.get("dynamic")


def spec_of(args: Mapping[str, Any], channels: int) -> Spec | None:
    """The spec of args, for heads of so many channels; None where qlab does not compute it."""
    strategy, size = args.get("strategy") or "tensor", args.get("group_size")
    tiles = {
        (False, "tensor"): Tile(None, None),
        (False, PER_HEAD): Tile(None, channels),
        (True, "group"): Tile(1, size) if type(size) is int and size > 0 else None,
    }
    tile = tiles.get((not is_static(args), strategy))
    bits = args.get("num_bits") or 8
    if tile is None or args.get("scale_dtype") is not None:
        return None
    if args.get("type", "int") == "int":
        return Int(bits, tile, True)
    return Float(*FLOATS["fp8"], tile) if bits == 8 else None
