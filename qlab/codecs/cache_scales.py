"""Scales of cached keys and values. Writers of all formats put them among the weights: as
attn.k_scale or self_attn.kv_scale, inside a module as k_proj.k_scale or, before compressed-tensors
0.10, as k_proj.output_scale."""

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
    """The cache scales inside modules that have other tensors too, for a config that says nothing
    of a cache. Engines use them where they are asked for a quantized cache; no weight needs them.
    """
    scales = scales_of(names)
    owners = {name.rpartition(".")[0] for name in set(names).difference(scales)}
    beside = tuple(scale for scale in scales if scale.rpartition(".")[0] in owners)
    if not beside:
        return ()
    says = "scales for a cache of keys and values lie beside the weights"
    return (Extra("k_scale", says, online=False, applied=True, tensors=beside),)
