"""HQQ: W = (q - z) * s with unsigned q and a zero point z between codes; read only, from
safetensors.

    W_q    uint8, or int32 for 3 bits: the matrix of groups [N*K/g, g], cut along its rows into as
           many parts as fit into a word (2 of 4 bits, 10 of 3 bits), the first part in the highest
           bits
    scale  float [N*K/g, 1]
    zero   float [N*K/g, 1]
    shape  [N, K]
    nbits, group_size, axis: one number each

Groups along axis 1 are groups of qlab, and their codes are kept. A group along axis 0 holds every
(N/g)-th row of a column, which no tile of qlab covers: such a weight comes back dense.
Source: hqq 0.2.8.
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
# Codes become signed by subtracting 2^(bits-1), and zero points with them. Narrower floats would
# round that difference.
ZERO = torch.float64
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
    return {path: _spec(path, _params(config, path)) for path in checks.modules_with("W_q", names)}


def _spec(path: str, params: Mapping[str, Any]) -> Spec | None:
    """The spec that the parameters of a module mean; None for groups along axis 0."""
    bits, group, axis = params.get("nbits"), params.get("group_size"), params.get("axis")
    if type(bits) is not int or bits not in PARTS:
        raise QlabError(f"{path} has nbits {bits!r}; qlab reads {', '.join(map(str, PARTS))}")
    if group is not None and (type(group) is not int or group < 1):
        raise QlabError(
            f"{path} has group_size {group!r}; "
            "it is a number of weights, or null for a scale per row"
        )
    if axis not in (0, 1) or type(axis) is not int:
        raise QlabError(f"{path} has axis {axis!r}; it is 0 or 1")
    return Int(bits, Tile(1, group), symmetric=False, zero_dtype=ZERO) if axis else None


def _params(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The `weight_quant_params` of one module. `quant_config` holds one table for all modules, or a
    table for each name of a module, without the prefix and the layer's number."""
    table = config.get("quant_config")
    if isinstance(table, Mapping) and "weight_quant_params" not in table:
        tables = (
            value for tag, value in table.items() if re.search(rf"(^|\.){re.escape(tag)}$", path)
        )
        table = next(tables, None)
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
    """The tensors of module `path` -> codes (groups along rows), or for a spec of None a dense
    weight in the dtype of the scales.

    Refuses missing, misshaped and unexpected tensors, and numbers in the file that differ from
    those of its config.
    """
    checks.check_names(path, "HQQ", tensors, ("W_q", "scale", "zero", "shape", *NUMBERS, *UNUSED))
    bits, group, axis = _numbers(path, tensors, spec)
    o, k = _shape(path, tensors, group, axis)
    # A group is a row of the matrix of groups along axis 1, and a column along axis 0.
    if axis:
        columns = group or k
        rows = o * k // columns
        grid = (rows, 1)
    else:
        rows = group or o
        columns = o * k // rows
        grid = (1, columns)
    word_dtype = torch.int32 if bits == 3 else torch.uint8
    words = checks.take(path, tensors, "W_q", (-(-rows // PARTS[bits]), columns), word_dtype)
    scales = checks.take_spread(path, tensors, "scale", grid, *FLOATS)
    zeros = checks.take_spread(path, tensors, "zero", grid, *FLOATS)
    codes = _unpack(words, bits)[:rows]
    if spec is None:
        dense = (codes.float() - zeros.float()) * scales.float()
        return dense.reshape(o, k).to(scales.dtype)
    return QTensor(
        codes=signed(codes.reshape(o, k), bits),
        scales=scales.reshape(o, -1),
        zeros=_signed_zeros(path, zeros, bits).reshape(o, -1),
        spec=spec,
    )


def _numbers(path: str, tensors: Mapping[str, Tensor], spec: Int | None) -> tuple[int, int, int]:
    """The module's nbits, group_size (0: one group for a row or column) and axis; refuses those
    that differ from its config's."""
    bits, group, axis, *unread = (_number(path, tensors, name) for name in NUMBERS)
    if any(unread):
        raise QlabError(
            f"{path} holds words viewed as floats, or scales or zero points quantized themselves; "
            "qlab reads neither"
        )
    agrees = bits in PARTS and (axis == 0) == (spec is None)
    if spec is not None:
        agrees = agrees and (bits, group or None) == (spec.bits, spec.tile.cols)
    if not agrees:
        raise QlabError(
            f"{path} has nbits {bits}, group_size {group} and axis {axis}, and its config says "
            f"{spec or 'axis 0'}; one of them is wrong"
        )
    return bits, group, axis


def _shape(path: str, tensors: Mapping[str, Tensor], group: int, axis: int) -> tuple[int, int]:
    """[o, k] of the weight; refuses a shape that the groups do not divide."""
    o, k = checks.take(path, tensors, "shape", (2,), torch.int64, torch.int32).tolist()
    uneven = group and (o * k % group or (axis and k % group))
    if min(o, k) < 1 or uneven:
        raise QlabError(
            f"{path}.shape is ({o}, {k}), which groups of {group} do not divide; "
            "qlab reads groups of neighbours in one row or column"
        )
    return o, k


def _signed_zeros(path: str, zeros: Tensor, bits: int) -> Tensor:
    """z - 2^(bits-1), for signed codes; refuses a zero point that float64 would round."""
    middle = 2 ** (bits - 1)
    unsigned_zeros = zeros.to(ZERO)
    signed_zeros = unsigned_zeros - middle
    if not torch.equal(signed_zeros + middle, unsigned_zeros):
        raise QlabError(
            f"{path}.zero has values too close to 0 (or none that are numbers) to be kept exactly "
            f"beside codes of {bits} bits; quantize the model again"
        )
    return signed_zeros


def _number(path: str, tensors: Mapping[str, Tensor], name: str) -> int:
    """A number, which safetensors hold as a tensor []; 0 for an optional one that is missing."""
    if f"{path}.{name}" not in tensors and name not in ("nbits", "axis"):
        return 0
    return int(checks.take(path, tensors, name, (), torch.int32, torch.uint8, torch.int64))


def _unpack(words: Tensor, bits: int) -> Tensor:
    """[rows / parts, columns] -> uint8 [rows, columns]; rows beyond the last group are padding."""
    shifts = range(bits * (PARTS[bits] - 1), -1, -bits)
    return torch.cat([(words >> shift & 2**bits - 1).to(torch.uint8) for shift in shifts])
