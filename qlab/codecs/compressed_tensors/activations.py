"""What is fixed beforehand of a module's inputs: input_scale [1] and input_zero_point int8 [1], or
NVFP4's input_global_scale fp32 [1]. Inputs that are rounded with what is found at run time have no
tensors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import InputSpec
from qlab.codecs.compressed_tensors.tensors import INPUTS, WIDE, take_spread
from qlab.errors import QlabError


def encode_input(path: str, rounding: QuantizeInput) -> dict[str, Tensor]:
    """The tensors of module `path` that its inputs need."""
    parts = zip(INPUTS, (rounding.scales, rounding.zeros, rounding.outer))
    return {f"{path}.{name}": part.reshape(1).clone() for name, part in parts if part is not None}


def decode_input(path: str, tensors: Mapping[str, Tensor], spec: InputSpec) -> QuantizeInput:
    """The operation on the module's input; refuses tensors that are missing, or that the spec has
    no place for."""
    grid = spec.spec
    wanted = (
        {"input_global_scale"}
        if grid.outer
        else {"input_scale", *(() if grid.symmetric else ("input_zero_point",))}
    )
    wanted = wanted if spec.static else set()
    for name in INPUTS:
        # a symmetric zero point is 0, and some releases write it down
        if (
            f"{path}.{name}" in tensors
            and name not in wanted
            and (name != "input_zero_point" or tensors[f"{path}.{name}"].any())
        ):
            raise QlabError(
                f"{path}.{name} has no place where inputs are {spec}; check the file's "
                "quantization_config"
            )
    scales = (
        take_spread(path, tensors, "input_scale", (1,), *WIDE).reshape(1, 1)
        if "input_scale" in wanted
        else None
    )
    zeros = (
        take_spread(path, tensors, "input_zero_point", (1,), torch.int8).reshape(1, 1)
        if "input_zero_point" in wanted
        else None
    )
    outer = (
        take_spread(path, tensors, "input_global_scale", (1,), torch.float32)
        if "input_global_scale" in wanted
        else None
    )
    for scale in (scales, outer):
        if scale is not None and not (scale > 0).all():
            raise QlabError(
                f"{path} has an input scale of {scale.item():g}, as of an input that no "
                "calibration saw; calibrate with more text"
            )
    return QuantizeInput(grid, scales, zeros, outer)
