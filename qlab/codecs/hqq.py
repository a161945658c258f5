"""HQQ: W = (q - z) * s with unsigned q and a zero point z between codes; read only, from
safetensors.

    W_q    uint8, or int32 for 3 bits: the matrix of groups [N*K/g, g], cut along its rows into as
           many parts as fit into a word (2 of 4 bits, 10 of 3 bits), the first part in the highest
           bits
    scale  float [N*K/g, 1]      zero  float [N*K/g, 1]      shape  [N, K]      nbits, group_size,
                                                                    axis  one number each

Groups along axis 1 are qlab's own and stay codes. Groups along axis 0 hold every (N/g)-th row of a
column, which no tile covers: they come back as a dense weight. Source: hqq 0.2.8.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.bits import signed
from qlab.algebra.qtensor import Leaf, QTensor
from qlab.algebra.spec import Int, Spec, Tile
from qlab.codecs import checks
from qlab.errors import QlabError

PARTS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # bits -> codes in a word
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
ZERO = (
    torch.float64
)  # codes move down by 2^(bits-1) and zero points with them, which narrower floats would round
NUMBERS = ("nbits", "group_size", "axis", "view_as_float", "quant_scale", "quant_zero")
UNUSED = (
    "packing",
    "unpack_view_dtype",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)


def specs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Spec | None]:
    """The spec of every module with a W_q among `names`; None where groups run along axis 0."""
    found: dict[str, Spec | None] = {}
    for path in checks.modules_with("W_q", names):
        bits, group, axis = (
            _params(config, path).get(key) for key in ("nbits", "group_size", "axis")
        )
        if type(bits) is not int or bits not in PARTS:
            raise QlabError(f"{path} has nbits {bits!r}; qlab reads {', '.join(map(str, PARTS))}")
        if group is not None and (type(group) is not int or group < 1):
            raise QlabError(
                f"{path} has group_size {group!r}; it is a number of weights, or null for a scale "
                "per row"
            )
        if axis not in (0, 1) or type(axis) is not int:
            raise QlabError(f"{path} has axis {axis!r}; it is 0 or 1")
        found[path] = Int(bits, Tile(1, group), symmetric=False, zero_dtype=ZERO) if axis else None
    return found


def _params(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """How one module is quantized: the config says it for all, or by the module's path without
    prefix and layer number."""
    table = config.get("quant_config")
    if isinstance(table, Mapping) and "weight_quant_params" not in table:
        table = next(
            (value for tag, value in table.items() if re.search(rf"(^|\.){re.escape(tag)}$", path)),
            None,
        )
    params = table.get("weight_quant_params") if isinstance(table, Mapping) else None
    if not isinstance(table, Mapping) or not isinstance(params, Mapping):
        raise QlabError(
            f"quantization_config has no weight_quant_params for {path}; repair its quant_config"
        )
    if table.get("scale_quant_params") or table.get("zero_quant_params"):
        raise QlabError(
            f"{path} has scales or zero points that are quantized themselves, which qlab does not "
            "read"
        )
    if params.get("view_as_float"):
        raise QlabError(
            f"{path} has its words stored as floats (view_as_float), which qlab does not read"
        )
    return params


def decode(path: str, tensors: Mapping[str, Tensor], spec: Int | None) -> Leaf:
    """The tensors of module `path` -> codes (groups along rows) or a dense weight in the scales'
    dtype (spec None).

    Refuses missing, misshaped and unexpected tensors, and numbers in the file that are not those of
    its config.
    """
    checks.check_names(path, "HQQ", tensors, ("W_q", "scale", "zero", "shape", *NUMBERS, *UNUSED))
    bits, group, axis, *others = (_number(path, tensors, name) for name in NUMBERS)
    if any(others):
        raise QlabError(
            f"{path} holds words viewed as floats, or scales or zero points quantized themselves; "
            "qlab reads neither"
        )
    if (
        bits not in PARTS
        or (spec is None) != (axis == 0)
        or (spec and (bits, group or None) != (spec.bits, spec.tile.cols))
    ):
        raise QlabError(
            f"{path} has nbits {bits}, group_size {group} and axis {axis}, and its config says "
            f"{spec or 'axis 0'}; one of them is wrong"
        )
    o, k = checks.take(path, tensors, "shape", (2,), torch.int64, torch.int32).tolist()
    if min(o, k) < 1 or (group and (o * k % group or (axis and k % group))):
        raise QlabError(
            f"{path}.shape is ({o}, {k}), which groups of {group} do not divide; qlab reads groups "
            "of neighbours in one row or column"
        )
    size = group or (k if axis else o)
    rows, columns = (o * k // size, size) if axis else (size, o * k // size)
    words = checks.take(
        path,
        tensors,
        "W_q",
        (-(-rows // PARTS[bits]), columns),
        torch.int32 if bits == 3 else torch.uint8,
    )
    grid = (rows, 1) if axis else (1, columns)
    scales, zeros = (
        checks.take_spread(path, tensors, name, grid, *FLOATS) for name in ("scale", "zero")
    )
    codes = _unpack(words, bits)[:rows]
    if spec is None:
        return ((codes.float() - zeros.float()) * scales.float()).reshape(o, k).to(scales.dtype)
    moved = zeros.to(ZERO) - 2 ** (bits - 1)
    if not torch.equal(moved + 2 ** (bits - 1), zeros.to(ZERO)):
        raise QlabError(
            f"{path}.zero has values too close to 0 (or none that are numbers) to be kept exactly "
            f"beside codes of {bits} bits; quantize the model again"
        )
    return QTensor(
        signed(codes.reshape(o, k), bits), scales.reshape(o, -1), moved.reshape(o, -1), spec
    )


def _number(path: str, tensors: Mapping[str, Tensor], name: str) -> int:
    """A number that safetensors hold as a tensor of one; 0 where it is missing and may be."""
    if f"{path}.{name}" not in tensors and name not in ("nbits", "axis"):
        return 0
    return int(checks.take(path, tensors, name, (), torch.int32, torch.uint8, torch.int64))


def _unpack(words: Tensor, bits: int) -> Tensor:
    """[rows / parts, columns] -> uint8 [rows, columns], or a few more rows of padding."""
    shifts = range(bits * (PARTS[bits] - 1), -1, -bits)
    return torch.cat([(words >> shift & 2**bits - 1).to(torch.uint8) for shift in shifts])
