"""`kv_cache_scheme`: keys and values are rounded before they are cached. qlab rounds what attention
reads, which is what a cache of such numbers gives back, and carries the scheme on.

One QuantizationArgs holds for every attention with a cache (`attended.py`), and each attention has
the scales. The library's dynamic "tensor" and "token" depend on what is computed beside: one scale
for a batch, and one for all tokens of a head. qlab carries these on and does not compute them; nor
scales that other writers put in other places (cache_scales.py). Source: compressed-tensors 0.20.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from qlab.algebra.graph import Op
from qlab.codecs.cache_scales import scales_of
from qlab.codecs.compressed_tensors.attended import (
    SCALES,
    decode,
    fault,
    is_static,
    modules_of,
    spec_of,
)
from qlab.codecs.compressed_tensors.scheme import check_args
from qlab.codecs.extra import Extra
from qlab.codecs.families import pattern
from qlab.errors import QlabError

KEY = "kv_cache_scheme"
CACHED = ("key", "value")
KEYS_TO_VALUES = str.maketrans("kv", "vk")
STRATEGIES = {
    (False, "tensor"): "a stored scale per tensor",
    (False, "attn_head"): "a stored scale per head",
    (True, "tensor"): "a scale per tensor",
    (True, "token"): "a scale per token",
    (True, "group"): "a scale per group of channels of a token",
}


def cache(config: Mapping[str, Any], names: Collection[str]) -> Extra | None:
    """What the key says, with the scales among `names`; refuses schemes that compressed-tensors
    does not have."""
    args = config.get(KEY)
    if not args:
        return None
    check_args(KEY, args)
    dynamic = args.get("dynamic") or False
    strategy = args.get("strategy") or "tensor"
    bits = args.get("num_bits") or 8
    scales = None
    if isinstance(dynamic, bool) and isinstance(strategy, str):
        scales = STRATEGIES.get((dynamic, strategy))
    if scales is None or not args.get("symmetric", True) or bits not in (4, 8):
        raise QlabError(
            f"{KEY} has strategy {strategy!r} with dynamic {dynamic!r}, symmetric "
            f"{args.get('symmetric', True)!r} and num_bits {bits}; "
            "qlab reads symmetric ones of 4 or 8 bits with a scale per tensor, head or token"
        )
    number = "int" if args.get("type", "int") == "int" else "fp"
    says = f"keys and values are cached as {number}{bits} with {scales}"
    tensors, missing = ((), ()) if dynamic else _scales(names)
    extra = Extra(
        KEY,
        says,
        attended=True,
        tensors=tensors,
        missing=missing,
        fault=partial(fault, "keys or values"),
    )
    has_scales = bool(dynamic) or (bool(tensors) and _are_of_attentions(tensors, names))
    if spec_of(args, 1) is None or not has_scales:
        return extra
    needed = frozenset({*tensors, *missing})
    return replace(extra, applied=True, ops=partial(_operations, args, needed))


def _operations(
    args: Mapping[str, Any],
    scales: Collection[str],
    path: str,
    location: str,
    channels: int,
    tensor: Callable[[str], Tensor],
) -> tuple[Op, ...]:
    """How the scheme rounds the keys or values of an attention, with so many channels per head (see
    Extra.ops)."""
    name = f"{path}.{SCALES.get(location)}"
    if location not in CACHED or (is_static(args) and name not in scales):
        return ()
    return (decode(name, args, channels, tensor),)


def _are_of_attentions(scales: Collection[str], names: Collection[str]) -> bool:
    """Whether all scales are k_scale or v_scale of a module around others, as compressed-tensors
    has them. Other writers put them into a module of their own, or into a linear."""
    _, around = modules_of(names)
    kinds = {SCALES[kind] for kind in CACHED}
    return all(
        kind in kinds and owner in around
        for owner, _, kind in (scale.rpartition(".") for scale in scales)
    )


def _scales(names: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The scales among `names`, and those that are missing: every module of a family of which one
    has a scale needs that scale too. A family has the same name, and the same modules inside: of
    blocks that differ some have no cache of keys and values."""
    scales = scales_of(names)
    if not scales:
        return (), ("k_scale of every attention",)
    inside: dict[str, set[str]] = defaultdict(set)  # module -> the modules inside it
    for name in names:
        owner, _, module = name.rpartition(".")[0].rpartition(".")
        inside[owner].add(module)
        inside[f"{owner}.{module}"] |= set()
    family = {owner: (pattern(owner), frozenset(modules)) for owner, modules in inside.items()}
    kinds: dict[Any, set[str]] = defaultdict(set)  # family of modules -> the scales of each of them
    for scale in scales:
        for name in (scale, _counterpart(scale)):
            owner, _, kind = name.rpartition(".")
            kinds[family.get(owner)].add(kind)
    expected: set[str] = set()
    for owner in inside:
        expected |= {f"{owner}.{kind}" for kind in kinds.get(family[owner], ())}
    return scales, tuple(sorted(expected.difference(scales)))


def _counterpart(scale: str) -> str:
    """The scale of values that belongs to a scale of keys, and the other way round."""
    return re.sub(
        r"(^|\.)[kv](?=_proj\.|_scale$)", lambda match: match[0].translate(KEYS_TO_VALUES), scale
    )
