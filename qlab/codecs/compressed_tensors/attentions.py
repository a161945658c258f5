"""Config groups of attention modules: their queries, keys and values are rounded where attention
reads them.

Such a group has input_activations and no weights, and its targets are modules around linears, or
classes with "attention" in their names. Scales are q_scale, k_scale and v_scale (`attended.py`).
Source: compressed-tensors 0.20.
"""

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from qlab.algebra.graph import Op
from qlab.codecs.compressed_tensors.attended import (
    SCALES,
    decode,
    fault,
    is_static,
    modules_of,
    refusal_of_args,
)
from qlab.codecs.compressed_tensors.scheme import check_args
from qlab.codecs.extra import Extra
from qlab.errors import QlabError

KEY = "config_groups"


def is_of_attentions(group: Any, names: Collection[str]) -> bool:
    """Whether a config group is for attention modules, of a directory with tensors `names`."""
    if not isinstance(group, Mapping) or group.get("weights") is not None:
        return False
    targets = group.get("targets")
    if not group.get("input_activations") or not isinstance(targets, list) or not targets:
        return False
    modules, around = modules_of(names)
    return all(_is_attention(target, modules, around) for target in targets)


def _is_attention(target: Any, modules: Collection[str], around: Collection[str]) -> bool:
    """Whether a target means modules around others, and no linear."""
    if not isinstance(target, str):
        return False
    if _is_class(target):
        return "attention" in target.lower()
    linears = {module for module in modules if module not in around}
    return _matches(target, around) and not _matches(target, linears)


def _is_class(target: str) -> bool:
    return not target.startswith("re:") and "." not in target


def _matches(target: str, modules: Collection[str]) -> bool:
    return any(_names(target, module) for module in modules)


def _names(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return target == module or _is_class(target)
    try:
        return re.match(target[3:], module) is not None
    except re.error:  # which is refused where targets are read
        return False


def attentions(config: Mapping[str, Any], names: Collection[str]) -> tuple[Extra, ...]:
    """What such groups of a config say; refuses roundings that qlab does not compute."""
    groups = config.get(KEY)
    if not isinstance(groups, Mapping):
        return ()  # which is refused where weights are read
    found = {name: group for name, group in groups.items() if is_of_attentions(group, names)}
    if found and config.get("kv_cache_scheme"):
        raise QlabError(
            f"config group {next(iter(found))} and kv_cache_scheme both round keys and values; "
            "qlab reads one of them"
        )
    return tuple(_extra(name, group, names) for name, group in found.items())


def _extra(name: str, group: Mapping[str, Any], names: Collection[str]) -> Extra:
    where, args = f"config group {name}", group["input_activations"]
    check_args(f"{where} input_activations", args)
    reason = refusal_of_args(args)
    if reason:
        raise QlabError(f"{where} rounds what attention reads with {reason}")
    targets = tuple(group["targets"])
    number = "int" if args.get("type", "int") == "int" else "fp"
    kinds = set(SCALES.values())
    tensors = tuple(
        sorted(
            tensor
            for tensor in names
            if tensor.rpartition(".")[2] in kinds
            and any(_names(target, tensor.rpartition(".")[0]) for target in targets)
        )
    )
    owners = {tensor.rpartition(".")[0] for tensor in tensors}
    needed = {f"{owner}.{kind}" for owner in owners for kind in kinds}
    return Extra(
        KEY,
        f"queries, keys and values are rounded to {number}{args.get('num_bits') or 8}",
        applied=True,
        attended=True,
        part=name,
        tensors=tensors if is_static(args) else (),
        missing=tuple(sorted(needed.difference(tensors))) if is_static(args) else (),
        fault=partial(fault, "queries, keys or values"),
        ops=partial(_operations, args, targets),
    )


def _operations(
    args: Mapping[str, Any],
    targets: tuple[str, ...],
    path: str,
    location: str,
    channels: int,
    tensor: Callable[[str], Tensor],
) -> tuple[Op, ...]:
    """How a group rounds what the attention of a module reads (see Extra.ops)."""
    if location not in SCALES or not any(_names(target, path) for target in targets):
        return ()
    return (decode(f"{path}.{SCALES[location]}", args, channels, tensor),)
