"""Checks that several codecs share: of a leaf before it is written, of a module's tensors before
they are read."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Spec, Tile
from qlab.errors import QlabError

# The dtypes that engines compute in, and therefore those of scales.
HALVES = (torch.float16, torch.bfloat16)


def refusal(
    format_name: str, bits: Collection[int], spec: Spec, online: Collection = ()
) -> str | None:
    """Why a format of int weights with 16-bit scales per group or channel cannot hold such a
    weight, or None when it can."""
    if online:
        return (
            f"{format_name} holds no run-time operations; "
            "fold them into the weights or leave the method out"
        )
    if not isinstance(spec, Int) or spec.bits not in bits:
        return (
            f"{format_name} has no {spec}; "
            f"it holds integers of {' or '.join(map(str, bits))} bits: write compressed-tensors"
        )
    if spec.tile.rows != 1:
        return f"{format_name} has no scale per {spec.tile}; use a scale per group or channel"
    if not spec.symmetric and spec.zero_dtype != torch.int8:
        return f"{format_name} has no zero points between codes; choose a grid that rounds them"
    if spec.scale_dtype not in (None, *HALVES):
        return (
            f"{format_name} has no {spec.scale_dtype} scales; "
            "round them to float16 before codes (a spec's scale_dtype)"
        )
    return None


def check_leaf(path: str, format_name: str, leaf: QTensor, reason: str | None) -> None:
    """Refuse a leaf that the format cannot hold bit for bit; `reason` is what it says of the leaf's
    spec."""
    spec = leaf.spec
    if reason:
        raise QlabError(f"{path}: {reason}")
    assert isinstance(spec, Int)  # refused otherwise
    if len(leaf.shape) != 2:
        raise QlabError(
            f"{path}: {format_name} holds one [o, k] weight per module, not {tuple(leaf.shape)}; "
            "split it"
        )
    if leaf.scales.dtype not in scale_dtypes(spec):
        raise QlabError(
            f"{path}: scales are {leaf.scales.dtype} and {format_name} stores "
            f"{scale_dtypes(spec)[0]}; "
            "round scales to their stored dtype (a spec's scale_dtype) before rounding codes"
        )
    check_codes(path, leaf)


def check_codes(path: str, leaf: QTensor) -> None:
    """Refuse integer codes and zero points outside the grid of their spec: packed, they would
    change their neighbours."""
    spec = leaf.spec
    assert isinstance(spec, Int)
    for name, codes in (("codes", leaf.codes), ("zeros", leaf.zeros)):
        if codes is None:
            continue
        low, high = (int(extreme) for extreme in codes.aminmax())
        if low < spec.qmin or high > spec.qmax:
            raise QlabError(
                f"{path}: {name} span [{low}, {high}] but int{spec.bits} holds [{spec.qmin}, "
                f"{spec.qmax}]; clamp them when rounding"
            )


def scale_dtypes(spec: Int) -> tuple[torch.dtype, ...]:
    """The dtypes in which scales of this spec may be stored, the usual one first."""
    return (spec.scale_dtype,) if spec.scale_dtype else HALVES


def check_names(
    path: str, format_name: str, tensors: Mapping[str, Tensor], known: Collection[str]
) -> None:
    """Refuse a tensor of the module that the format has no place for: decoding would ignore it."""
    unknown = unknown_name(path, tensors, {*known, "bias"})
    if unknown is not None:
        raise QlabError(
            f"{unknown} has no place in {format_name}; check the file's quantization_config"
        )


def unknown_name(path: str, tensors: Mapping[str, Tensor], known: Collection[str]) -> str | None:
    """The first tensor of the module whose last name is not among the known ones, or None."""
    for name in sorted(tensors):
        module, _, kind = name.rpartition(".")
        if module == path and kind not in known:
            return name
    return None


def take(
    path: str,
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int | None, ...],
    *dtypes: torch.dtype,
) -> Tensor:
    """The tensor `path.name`; refuses one that is missing, of another shape (None: any size but 0)
    or dtype, or not finite."""
    if f"{path}.{name}" not in tensors:
        raise QlabError(
            f"{path}.{name} is missing; the file is incomplete or its quantization_config is wrong"
        )
    tensor = tensors[f"{path}.{name}"]
    if not _has_shape(tensor, shape) or tensor.dtype not in dtypes:
        expected = str(tuple(shape)).replace("None", "any")
        raise QlabError(
            f"{path}.{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtypes[0]} "
            f"{expected}; the file is damaged or its quantization_config is wrong"
        )
    # torch has no isfinite for e4m3.
    if tensor.is_floating_point() and not tensor.float().isfinite().all():
        raise QlabError(f"{path}.{name} holds NaN or Inf; the file is damaged")
    return tensor


def _has_shape(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    if tensor.ndim != len(shape):
        return False
    return all(size > 0 and expected in (size, None) for size, expected in zip(tensor.shape, shape))


def take_spread(
    path: str,
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int, ...],
    *dtypes: torch.dtype,
) -> Tensor:
    """`take` for scales and zero points, which some writers store with axes of size 1 and others
    without: [] and [1], [o] and [o, 1]."""
    tensor = tensors.get(f"{path}.{name}")
    if tensor is not None and bare(tensor.shape) == bare(shape):
        tensors = {f"{path}.{name}": tensor.reshape(shape)}
    return take(path, tensors, name, shape, *dtypes)


def bare(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape without its axes of size 1, which do not change the order of the numbers."""
    return tuple(size for size in shape if size != 1)


def modules_with(suffix: str, names: Collection[str]) -> list[str]:
    """The modules that have a tensor of this last name, sorted."""
    return sorted(name.removesuffix(f".{suffix}") for name in names if name.endswith(f".{suffix}"))


def refuse_unheld(specs: Mapping[str, Spec | None], refusal: Callable[[Spec], str | None]) -> None:
    """Refuse the first module whose spec the format cannot hold; `refusal` says why."""
    for path, spec in specs.items():
        reason = refusal(spec) if spec else None
        if reason:
            raise QlabError(f"{path}: {reason}")


def refuse_unquantized(specs: Mapping[str, Spec | None]) -> None:
    """Refuse a model without a quantized module."""
    if not any(specs.values()):
        raise QlabError(
            f"none of the {len(specs)} modules is quantized; "
            "write the model without a quantization_config"
        )


def read_spec(where: str, keys: Mapping[str, Any], bits: Collection[int]) -> Int:
    """The spec that `bits`, `group_size` (-1: one scale per row) and `sym` of a quantization_config
    say."""
    width, group, symmetric = keys.get("bits"), keys.get("group_size"), keys.get("sym", True)
    if type(width) is not int or width not in bits:
        raise QlabError(f"{where} has bits {width!r}; qlab reads {', '.join(map(str, bits))}")
    if type(group) is not int or (group < 1 and group != -1):
        raise QlabError(
            f"{where} has group_size {group!r}; "
            "it is a number of input channels, or -1 for a scale per row"
        )
    if type(symmetric) is not bool:
        raise QlabError(f"{where} has sym {symmetric!r}; it is true or false")
    return Int(width, Tile(1, None if group == -1 else group), symmetric)
