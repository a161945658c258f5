"""Codes of 5 to 8 bits and 8-bit floats as torchao's tensors: Int8Tensor and Float8Tensor, alone or
beside inputs that are rounded for every product."""

from typing import Any

import torch
from torch import Tensor

from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Float, Int, Spec
from qlab.errors import QlabError
from qlab.lowering.weights.integers import is_exact


def holds(spec: Spec) -> bool:
    """Whether torchao has a tensor of bytes for the codes."""
    if isinstance(spec, Int):
        return spec.bits > 4
    return spec.bits == 8 and spec.scale_dtype != torch.float8_e8m0fnu and not spec.outer


def tensor(name: str, leaf: QTensor, inputs: QuantizeInput | None, rotated: bool) -> Tensor:
    """The weight as torchao's tensor. Refuses what its products do not compute."""
    kind = "int8" if isinstance(leaf.spec, Int) else "fp8"
    reason = _refusal(leaf, inputs, rotated)
    if reason:
        raise QlabError(f"{name}: torchao's {kind} tensors {reason}; use qlab.lower")
    (rows, cols), codes = leaf.spec.tile.sizes(leaf.shape), leaf.codes.contiguous()
    how: dict[str, Any] = {"block_size": [rows, cols], "dtype": torch.bfloat16}
    if inputs is not None:
        how["act_quant_kwargs"] = _rounding(inputs.spec)
    if isinstance(leaf.spec, Int):
        from torchao.quantization import Int8Tensor

        return Int8Tensor(codes, leaf.scales.float(), **how)
    from torchao.quantization import Float8Tensor

    return Float8Tensor(codes, leaf.scales.float(), **how)


def _refusal(leaf: QTensor, inputs: QuantizeInput | None, rotated: bool) -> str | None:
    """Why torchao's products are others than those of the weight, or None."""
    (rows, cols), (n, k) = leaf.spec.tile.sizes(leaf.shape), leaf.shape
    if leaf.perm is not None or rotated:
        return "take inputs in the order of the channels and not rotated"
    if leaf.zeros is not None:
        return f"multiply no zero points, and {leaf.spec} has some"
    if k % cols or rows not in (1, n) or (rows == n and cols != k):
        return f"hold no blocks of {rows}x{cols}"
    if inputs is None:
        return None
    spec = inputs.spec
    is_whole = spec.tile.cols is None and spec.tile.rows in (None, 1)
    if type(spec) is not type(leaf.spec) or not holds(spec) or not is_whole or cols != k:
        return f"of {leaf.spec} take no inputs in {spec}"
    if isinstance(spec, Int) and spec.bits not in (7, 8):
        return f"take no inputs in {spec}"
    if inputs.scales is not None:
        return "take no fixed scale for activations of several sequences"
    if isinstance(spec, Float) and not torch.cuda.is_available():
        return "round their inputs on GPUs alone"
    if isinstance(spec, Int) and leaf.codes.device.type == "cpu" and not is_exact():
        return "are multiplied in 16 bits by this processor, which saturate"
    return None


def _rounding(spec: Spec) -> Any:
    """How torchao rounds inputs to a spec."""
    from torchao.quantization import PerRow, PerTensor
    from torchao.quantization.quant_primitives import MappingType

    granularity = PerTensor() if spec.tile.rows is None else PerRow()
    if isinstance(spec, Int):
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

        mapping = MappingType.SYMMETRIC if spec.symmetric else MappingType.ASYMMETRIC
        return QuantizeTensorToInt8Kwargs(granularity, mapping, reduce_range=spec.bits == 7)
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    return QuantizeTensorToFloat8Kwargs(granularity=granularity)
