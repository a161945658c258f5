"""`nvfp4-pack-quantized`, `mxfp4-pack-quantized`, `mxfp6-pack-quantized`: 4- and 6-bit floats as
bit streams.

    weight_packed        uint8 [o, k*b/8]   codes from the lowest bits up; a code is the sign bit
                                            above the index of its magnitude
    weight_scale         e4m3 [o, k/16] for NVFP4, W = q * (s / g)
                         uint8 [o, k/32] for MX, W = q * 2^(s - 127)
    weight_global_scale  fp32 [1], the g of NVFP4 alone
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qlab.algebra.bits import pack, unpack
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Float, Spec
from qlab.codecs.checks import take_spread
from qlab.codecs.compressed_tensors.plain import as_stored, take_scales
from qlab.codecs.compressed_tensors.tensors import check_scales, refuse_others, take_matrix
from qlab.errors import QlabError


def encode(path: str, leaf: QTensor) -> dict[str, Tensor]:
    """QTensor [o, k] -> {path.weight_packed, path.weight_scale[, path.weight_global_scale]}."""
    check_scales(path, leaf)
    spec = leaf.spec
    assert isinstance(spec, Float)
    codes, exact = _indices(leaf.codes, spec)
    if not exact:
        raise QlabError(f"{path}: codes are not all numbers of {spec}; round them to it")
    padded = pack(codes, spec.bits).view(torch.uint8)
    packed = padded[:, : leaf.shape[1] * spec.bits // 8].contiguous()
    tensors = {"weight_packed": packed, "weight_scale": as_stored(leaf.scales)}
    if leaf.outer is not None:
        # Modules share this tensor, and a file cannot hold one tensor under two names.
        tensors["weight_global_scale"] = leaf.outer.reshape(1).clone()
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}


def decode(path: str, tensors: Mapping[str, Tensor], spec: Spec) -> QTensor:
    """The inverse of encode; refuses missing, misshaped and unexpected tensors of the module."""
    assert isinstance(spec, Float)
    known = {"weight_packed", "weight_scale"}
    if spec.outer:
        known.add("weight_global_scale")
    refuse_others(path, tensors, spec, known)
    o, width = take_matrix(path, tensors, "weight_packed", torch.uint8)
    k = width * 8 // spec.bits
    if width * 8 % spec.bits or k % (spec.tile.cols or k):
        raise QlabError(
            f"{path}.weight_packed ({o}, {width}) holds no whole groups of {spec}; "
            "the file or its config is wrong"
        )
    scales = take_scales(path, tensors, spec, spec.tile.scales_shape(torch.Size((o, k))))
    outer = _global_scale(path, tensors, scales) if spec.outer else None
    padded = torch.nn.functional.pad(tensors[f"{path}.weight_packed"], (0, -width % 4))
    indices = unpack(padded.view(torch.int32), spec.bits, k).int()
    codes = _numbers(spec)[indices].to(spec.code_dtype)
    return QTensor(codes=codes, scales=scales, zeros=None, spec=spec, outer=outer)


def _global_scale(path: str, tensors: Mapping[str, Tensor], scales: Tensor) -> Tensor:
    """NVFP4's global scale [1]; refuses one that scales cannot be divided by."""
    outer = take_spread(path, tensors, "weight_global_scale", (1,), torch.float32)
    if not ((outer > 0) & (scales.float() / outer).isfinite()).all():
        raise QlabError(
            f"{path}.weight_global_scale is {outer.item():g}, which scales cannot be divided by; "
            "the file is damaged"
        )
    return outer


def _numbers(spec: Float) -> Tensor:
    """The value of every code, fp32 [2^bits]: e2m1 or e2m3 with an exponent bias of 1, and
    subnormals below 1."""
    code = torch.arange(2 ** (spec.bits - 1))
    exponent, mantissa = code >> spec.mantissa, (code & (2**spec.mantissa - 1)) / 2**spec.mantissa
    magnitude = torch.where(exponent == 0, mantissa, (1 + mantissa) * 2.0 ** (exponent - 1))
    return torch.cat([magnitude, -magnitude])


def _indices(codes: Tensor, spec: Float) -> tuple[Tensor, bool]:
    """The bits of the codes, uint8 [o, k], and whether every value is a number of the spec."""
    numbers, x = _numbers(spec).to(codes.device), codes.float()
    magnitudes = numbers[: len(numbers) // 2]
    index = torch.searchsorted(magnitudes, x.abs()).clamp_max(len(magnitudes) - 1)
    bits = index | (x.signbit().long() << (spec.bits - 1))
    return bits.to(torch.uint8), torch.equal(numbers[bits], x)
