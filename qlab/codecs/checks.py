"""What every codec of packed integers asks: of a leaf before it is written, of a module's tensors
before they are read."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Spec, Tile
from qlab.errors import QlabError

HALVES = (
    torch.float16,
    torch.bfloat16,
)  # what engines compute with, and so what scales are stored in


def refusal(
    format_name: str, bits: Collection[int], spec: Spec, online: Collection = ()
) -> str | None:
    """Why a format of int weights with 16-bit scales per group or channel cannot hold such a
    weight, or None when it can."""
    if online:
        return (
            f"{format_name} holds no run-time operations; fold them into the weights or leave the "
            "method out"
        )
    if not isinstance(spec, Int) or spec.bits not in bits:
        return (
            f"{format_name} has no {spec}; it holds integers of {' or '.join(map(str, bits))} "
            "bits: write compressed-tensors"
        )
    if spec.tile.rows != 1:
        return f"{format_name} has no scale per {spec.tile}; use a scale per group or channel"
    if not spec.symmetric and spec.zero_dtype != torch.int8:
        return f"{format_name} has no zero points between codes; choose a grid that rounds them"
    if spec.scale_dtype not in (None, *HALVES):
        return (
            f"{format_name} has no {spec.scale_dtype} scales; round them to float16 before codes "
            "(a spec's scale_dtype)"
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
            f"{scale_dtypes(spec)[0]}; round scales to their stored dtype (a spec's scale_dtype) "
            "before rounding codes"
        )
    for name, codes in (("codes", leaf.codes), ("zeros", leaf.zeros)):
        low, high = (0, 0) if codes is None else (int(x) for x in codes.aminmax())
        if low < spec.qmin or high > spec.qmax:
            raise QlabError(
                f"{path}: {name} span [{low}, {high}] but int{spec.bits} holds [{spec.qmin}, "
                f"{spec.qmax}]; clamp them when rounding"
            )


def scale_dtypes(spec: Int) -> tuple[torch.dtype, ...]:
    """In what a spec's scales may be stored; the first one is usual."""
    return (spec.scale_dtype,) if spec.scale_dtype else HALVES


def check_names(
    path: str, format_name: str, tensors: Mapping[str, Tensor], known: Collection[str]
) -> None:
    """Refuse tensors of the module that the format has no place for: they would be left out in
    silence."""
    found = {name.removeprefix(f"{path}.") for name in tensors if name.rpartition(".")[0] == path}
    if unknown := sorted(found - {*known, "bias"}):
        raise QlabError(
            f"{path}.{unknown[0]} has no place in {format_name}; check the file's "
            "quantization_config"
        )


def take(
    path: str,
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int | None, ...],
    *dtypes: torch.dtype,
) -> Tensor:
    """The tensor `path.name` of this shape (None: any size but 0) and one of these dtypes; refuses
    numbers that are not finite."""
    if f"{path}.{name}" not in tensors:
        raise QlabError(
            f"{path}.{name} is missing; the file is incomplete or its quantization_config is wrong"
        )
    tensor = tensors[f"{path}.{name}"]
    fits = len(tensor.shape) == len(shape) and all(
        n > 0 and want in (n, None) for n, want in zip(tensor.shape, shape)
    )
    if not fits or tensor.dtype not in dtypes:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise QlabError(
            f"{path}.{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtypes[0]} "
            f"({wanted}); the file is damaged or its quantization_config is wrong"
        )
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise QlabError(f"{path}.{name} holds NaN or Inf; the file is damaged")
    return tensor


def take_spread(
    path: str,
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int, ...],
    *dtypes: torch.dtype,
) -> Tensor:
    """The same for scales and zero points, which writers store with axes of one or without them: []
    and [1], [o] and [o, 1]."""
    found = tensors.get(f"{path}.{name}")
    if found is not None and bare(found.shape) == bare(shape):
        tensors = {f"{path}.{name}": found.reshape(shape)}
    return take(path, tensors, name, shape, *dtypes)


def bare(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape without its axes of one, which say nothing of what lies where."""
    return tuple(n for n in shape if n != 1)


def modules_with(suffix: str, names: Collection[str]) -> list[str]:
    """The modules that have a tensor of this last name, sorted."""
    return sorted(name.removesuffix(f".{suffix}") for name in names if name.endswith(f".{suffix}"))


def read_spec(where: str, found: Mapping[str, Any], bits: Collection[int]) -> Int:
    """The spec that `bits`, `group_size` (-1: one scale per row) and `sym` of a quantization_config
    say."""
    width, group, symmetric = found.get("bits"), found.get("group_size"), found.get("sym", True)
    if type(width) is not int or width not in bits:
        raise QlabError(f"{where} has bits {width!r}; qlab reads {', '.join(map(str, bits))}")
    if type(group) is not int or (group < 1 and group != -1):
        raise QlabError(
            f"{where} has group_size {group!r}; it is a number of input channels, or -1 for a "
            "scale per row"
        )
    if type(symmetric) is not bool:
        raise QlabError(f"{where} has sym {symmetric!r}; it is true or false")
    return Int(width, Tile(1, None if group == -1 else group), symmetric)
