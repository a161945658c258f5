"""Scales of cached keys and values, which writers of all formats put among the weights:
attn.k_scale, self_attn.kv_scale, inside a module k_proj.k_scale or, before compressed-tensors 0.10,
k_proj.output_scale."""

from collections.abc import Collection, Mapping
from typing import Any

from qlab.codecs.extra import Extra

KINDS = ("k_scale", "v_scale", "kv_scale")
OUTPUTS = (".k_proj.output_scale", ".v_proj.output_scale")  # of modules whose outputs are cached


def scales_of(names: Collection[str]) -> tuple[str, ...]:
    """The scales of cached keys and values among `names`."""
    return tuple(
        sorted(name for name in names if name.rpartition(".")[2] in KINDS or name.endswith(OUTPUTS))
    )


def unsaid(config: Mapping[str, Any], names: Collection[str]) -> tuple[Extra, ...]:
    """Those that lie beside a weight, of a format whose configuration says nothing of a cache:
    engines use them where they are asked for such a cache, and they are no part of the weight."""
    found = scales_of(names)
    others = {name.rpartition(".")[0] for name in set(names).difference(found)}
    beside = tuple(name for name in found if name.rpartition(".")[0] in others)
    says = "scales for a cache of keys and values lie beside the weights"
    return (Extra("k_scale", says, online=False, applied=True, tensors=beside),) if beside else ()
