"""llama.cpp beside qlab: what it computes with a GGUF file, the same numbers without its rounding,
and its rounding without its code."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import torch
from torch import nn

from qlab.lowering.weights.modules import QLinear

DRIVER = Path(__file__).with_name("llama_cpp_driver.py")
ARCHITECTURE = "general.architecture"  # which a writer adds itself


def of_llama(file, **asked):
    """What the driver says of a file."""
    answer = subprocess.run(
        [sys.executable, DRIVER, file], input=json.dumps(asked), capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    return json.loads(answer.stdout)


def in_float32(file, out):
    """The file with every tensor as F32, dequantized by the format's own library: ggml rounds no
    input of such a product."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, reader.fields[ARCHITECTURE].contents())
    for key, field in reader.fields.items():
        if key != ARCHITECTURE and not key.startswith("GGUF."):  # those of the header
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def q8_0(x):
    """x [..., k] in float32 as ggml holds the input of a product with Q4_0 or Q8_0 blocks: of each
    32 numbers round(x * 127 / max|x|), ties to even, times max|x| / 127 in float16."""
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = torch.where(largest > 0, blocks * (127 / largest), 0).round()
    return (codes * (largest / 127).half().float()).flatten(-2)


def rounding_as_ggml(model):
    """The lowered model, which from now on rounds the inputs of its linears as ggml does: by
    `q8_0` before codes, to bfloat16 before weights of that dtype in the file."""
    for module in model.modules():
        if isinstance(module, QLinear):
            module.register_forward_pre_hook(lambda _, given: q8_0(given[0]))
        elif isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, given: given[0].bfloat16().float())
    return model
