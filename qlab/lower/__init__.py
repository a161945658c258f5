"""Lowering: a quantized model directory as an ordinary, fast nn.Module. Nothing CUDA or Triton is imported before it is used."""

from qlab.lower.coded import CodedExperts, CodedLinear
from qlab.lower.compiling import inductor_options
from qlab.lower.linear import QExperts, QLinear
from qlab.lower.model import lower, resident_bytes
from qlab.lower.torchao_tensors import to_torchao

__all__ = ["CodedExperts", "CodedLinear", "QExperts", "QLinear", "inductor_options", "lower", "resident_bytes", "to_torchao"]
