"""Tensors of static rounding of a module's inputs: input_scale [1] and input_zero_point int8 [1],
or NVFP4's input_global_scale fp32 [1]. Dynamic rounding, whose scales come from the inputs at run
time, has no tensors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import InputSpec
from qlab.codecs.checks import take_spread
from qlab.codecs.compressed_tensors.tensors import INPUTS, WIDE
from qlab.errors import QlabError


def encode_input(path: str, rounding: QuantizeInput) -> dict[str, Tensor]:
    """The tensors of module `path` that its inputs need."""
    parts = zip(INPUTS, (rounding.scales, rounding.zeros, rounding.outer))
    return {f"{path}.{name}": part.reshape(1).clone() for name, part in parts if part is not None}


def decode_input(path: str, tensors: Mapping[str, Tensor], spec: InputSpec) -> QuantizeInput:
    """The operation on the module's input; refuses tensors that are missing, or that the spec has
    no place for."""
    expected = _expected(spec)
    _refuse_others(path, tensors, spec, expected)
    scales = zeros = outer = None
    if "input_scale" in expected:
        scales = take_spread(path, tensors, "input_scale", (1,), *WIDE).reshape(1, 1)
    if "input_zero_point" in expected:
        zeros = take_spread(path, tensors, "input_zero_point", (1,), torch.int8).reshape(1, 1)
    if "input_global_scale" in expected:
        outer = take_spread(path, tensors, "input_global_scale", (1,), torch.float32)
    for scale in (scales, outer):
        if scale is not None and not (scale > 0).all():
            raise QlabError(
                f"{path} has an input scale of {scale.item():g}, as of an input that no "
                "calibration saw; calibrate with more text"
            )
    return QuantizeInput(spec.spec, scales, zeros, outer)


def _expected(spec: InputSpec) -> tuple[str, ...]:
    """The tensors that such inputs need."""
    if not spec.static:
        return ()
    if spec.spec.outer:
        return ("input_global_scale",)
    return ("input_scale",) if spec.spec.symmetric else ("input_scale", "input_zero_point")


def _refuse_others(
    path: str, tensors: Mapping[str, Tensor], spec: InputSpec, expected: tuple[str, ...]
) -> None:
    for name in INPUTS:
        tensor = tensors.get(f"{path}.{name}")
        if tensor is None or name in expected:
            continue
        # Some releases write the zero point of symmetric inputs, which is 0.
        if name == "input_zero_point" and not tensor.any():
            continue
        raise QlabError(
            f"{path}.{name} has no place where inputs are {spec}; "
            "check the file's quantization_config"
        )
