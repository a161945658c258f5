"""A format of the tests' own: int4 with a zero point per group and float16 scales, so that some
leaves fit and some do not."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from qlab.algebra.spec import Spec
from qlab.codecs import Codec, compressed_tensors

NAME = "four-bits"


def refusal(spec: Spec, online=()) -> str | None:
    if spec.bits != 4:
        return f"{NAME} has 4 bits, not {spec.bits}"
    if spec.symmetric:
        return f"{NAME} has a zero point per group"
    if spec.scale_dtype not in (None, torch.float16):
        return f"{NAME} has float16 scales"
    return compressed_tensors.refusal(spec, online)


def config(specs: Mapping[str, Spec | None]) -> dict:
    return compressed_tensors.config(specs) | {"quant_method": NAME}


def specs(config, names):
    return compressed_tensors.specs(config | {"quant_method": "compressed-tensors"}, names)


def encode(path, leaf):
    return compressed_tensors.encode(path, leaf)


FOUR_BITS = Codec(
    refusal=refusal, encode=encode, decode=compressed_tensors.decode, config=config, specs=specs
)


def rounded_scales(leaf, dtype):
    """The leaf with scales that `dtype` holds exactly, whatever dtype they are stored in."""
    return replace(leaf, scales=leaf.scales.to(dtype).to(leaf.scales.dtype))
