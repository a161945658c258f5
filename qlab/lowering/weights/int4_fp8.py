"""Integer weights of up to 4 bits beside 8-bit floats, on GPUs from capability 8.9: codes become
e4m3 in registers, exactly, and are multiplied in sums of fp32 (`int4_a8`)."""

from qlab.algebra.qtensor import QTensor
from qlab.lowering.weights import int4_a8
from qlab.lowering.weights.fp8_fp8 import is_e4m3
from qlab.lowering.weights.int4_a8 import Nibbles
from qlab.lowering.weights.setting import Setting


def meant(leaf: QTensor, setting: Setting) -> bool:
    """Whether a weight of up to 4 bits meets activations that are rounded to e4m3, on a GPU."""
    on_gpu, inputs = setting.device.type == "cuda", setting.inputs
    return on_gpu and int4_a8.is_nibble(leaf) and inputs is not None and is_e4m3(inputs.spec)


def takes(leaf: QTensor, setting: Setting) -> str | None:
    """Why the rounded activations are multiplied as 16-bit numbers instead, or None."""
    assert setting.inputs is not None
    return int4_a8.refusal(leaf, setting.inputs, setting.device, "fp8")


def pack(path: str, leaf: QTensor, setting: Setting) -> Nibbles:
    """A weight as the device's kernel reads it."""
    assert setting.inputs is not None
    return int4_a8.pack(leaf, setting.inputs, setting, "fp8")
