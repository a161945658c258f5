"""Integer weights of up to 4 bits beside integer activations, on GPUs from capability 8.0: codes
become int8 in registers and are multiplied in sums of 32 bits, which are exact (`int4_a8`)."""

import torch

from qlab.algebra.qtensor import QTensor
from qlab.lowering.weights import int4_a8
from qlab.lowering.weights.int4_a8 import Nibbles
from qlab.lowering.weights.int8_int8 import rounding
from qlab.lowering.weights.setting import Setting


def meant(leaf: QTensor, setting: Setting) -> bool:
    """Whether a weight of up to 4 bits meets activations that are rounded to integers, on a GPU."""
    on_gpu = setting.device.type == "cuda"
    return on_gpu and int4_a8.is_nibble(leaf) and rounding(setting) is not None


def takes(leaf: QTensor, setting: Setting) -> str | None:
    """Why the rounded activations are multiplied as numbers instead, or None."""
    inputs = rounding(setting)
    assert inputs is not None
    if inputs.spec.code_dtype != torch.int8:
        return f"inputs in {inputs.spec} are no int8"
    return int4_a8.refusal(leaf, inputs, setting.device, "int8")


def pack(path: str, leaf: QTensor, setting: Setting) -> Nibbles:
    """A weight as the device's kernel reads it."""
    inputs = rounding(setting)
    assert inputs is not None
    return int4_a8.pack(leaf, inputs, setting, "int8")
