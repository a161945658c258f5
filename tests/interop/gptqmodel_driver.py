"""Runs inside an environment with GPTQModel: `read DIR...` writes DIR.dense.safetensors, what its
kernel makes of every quantized weight; `write MODEL OUT` quantizes a model in every way of WAYS,
each into OUT/<name>, and reads them."""

import json
import sys
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import save_file

SKIP_AND_CHANGE = {r"-:.*\.down_proj": {}, r"+:.*\.o_proj": {"bits": 8, "group_size": 32}}
WAYS = {
    "plain": dict(bits=4, group_size=64),
    "three_bits": dict(bits=3, group_size=64),
    "channel": dict(bits=8, group_size=-1, act_group_aware=False),
    "asymmetric": dict(bits=4, group_size=64, sym=False),
    "asymmetric_v2": dict(bits=2, group_size=64, sym=False, format="gptq_v2"),
    "desc_act": dict(bits=4, group_size=64, desc_act=True, act_group_aware=False),
    "dynamic": dict(bits=4, group_size=64, dynamic=SKIP_AND_CHANGE),
}


def dense(module):
    """[out, in] as the kernel itself computes it."""
    if isinstance(module, AwqTorchLinear):
        return dequantize_gemm(
            module.qweight, module.qzeros, module.scales, module.bits, module.group_size
        ).T
    return module.dequantize_weight().detach().T


def read(directory):
    config = json.loads(Path(directory, "config.json").read_text())
    backend = (
        BACKEND.AWQ_TORCH
        if config["quantization_config"]["quant_method"] == "awq"
        else BACKEND.GPTQ_TORCH
    )
    model = GPTQModel.load(directory, backend=backend, device="cpu", dtype=torch.float16)
    modules = {name: m for name, m in model.model.named_modules() if isinstance(m, BaseQuantLinear)}
    save_file(
        {name: dense(m).half().contiguous() for name, m in modules.items()},
        f"{directory}.dense.safetensors",
    )


def write(source, out):
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(3, 128, (64,), generator=generator).tolist() for _ in range(16)]
    for name, settings in WAYS.items():
        model = GPTQModel.load(source, QuantizeConfig(**settings))
        model.quantize(
            [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples], batch_size=1
        )
        model.save(f"{out}/{name}")
        read(f"{out}/{name}")


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(*sys.argv[2:])
    else:
        for path in sys.argv[2:]:
            read(path)
