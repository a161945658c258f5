"""Codes of any grid as bit streams, one row behind the other.

Codes of 8 bits are bytes [..., n, k]; all others are int32 words [..., n, ceil(k bits / 32)]
(qlab.algebra.bits), floats by their place among the numbers of their grid.
"""

from functools import cache

import torch
from torch import Tensor

from qlab.algebra.bits import pack, pack_signed, unpack, unpack_signed
from qlab.algebra.spec import Float, Int, Spec
from qlab.errors import QlabError

CPU = torch.device("cpu")


def codes_of(words: Tensor, spec: Spec, k: int) -> Tensor:
    """Codes [..., n, k] in the dtype of the spec."""
    if isinstance(spec, Int):
        return words if spec.bits == 8 else unpack_signed(words, spec.bits, k)
    if spec.bits == 8:
        return words.view(spec.code_dtype)
    places = unpack(words, spec.bits, k).int()
    return _numbers(spec, words.device)[places].view(spec.code_dtype)


def words_of(path: str, codes: Tensor, spec: Spec) -> Tensor:
    """The inverse of codes_of; refuses codes that are not on the grid."""
    octets = codes.contiguous().view(torch.int8 if isinstance(spec, Int) else torch.uint8)
    if spec.bits == 8:
        return octets
    if isinstance(spec, Int):
        words = pack_signed(octets, spec.bits)
    else:
        words = pack(_places(octets, spec), spec.bits)
    if not torch.equal(codes_of(words, spec, codes.shape[-1]).view(octets.dtype), octets):
        raise QlabError(
            f"{path} has codes that are no numbers of {spec}; the file or its config is wrong"
        )
    return words


def _places(octets: Tensor, spec: Float) -> Tensor:
    """The place of every number among those of the grid: uint8."""
    numbers = _numbers(spec, CPU)
    table = torch.zeros(256, dtype=torch.uint8)
    table[numbers.int()] = torch.arange(len(numbers), dtype=torch.uint8)
    return table[octets.int()]


@cache
def _numbers(spec: Float, device: torch.device) -> Tensor:
    """The e4m3 bytes that are numbers of the grid, zeros of both signs among them: uint8 [2^bits].

    Cached for each device, because a CUDA graph cannot record a copy from the host.
    """
    octets = torch.arange(256, dtype=torch.uint8)
    values = octets.view(spec.code_dtype).float()
    return octets[spec.nearest_(values.clone()) == values].to(device)
