"""Lowering: a quantized model directory as an ordinary, fast nn.Module. Nothing CUDA or Triton is
imported before it is used."""

from qlab.lowering.compiler.options import inductor_options
from qlab.lowering.model import lower
from qlab.lowering.resident import resident_bytes
from qlab.lowering.torchao_tensors import to_torchao
from qlab.lowering.weights.modules import QExperts, QLinear

__all__ = [
    "QExperts",
    "QLinear",
    "inductor_options",
    "lower",
    "resident_bytes",
    "to_torchao",
]
