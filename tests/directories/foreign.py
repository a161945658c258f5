"""A tiny llama as a directory of every format and spec that qlab reads, with codes that no int4
kernel takes among them."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from families import tiny
from safetensors.torch import save_file
from transformers import GenerationConfig

from qlab.algebra.grid import encode, minmax
from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import Int, Tile, parse_input_spec, parse_spec, with_scale_dtype
from qlab.codecs import CODECS

COMPRESSED = {  # name -> weights, inputs
    "groups of 16": ("int4-g16", None),
    "zero points": ("int3-g16-asym", None),
    "int8 channels": ("int8-channel", None),
    "int8 tensor (naive)": ("int8-tensor", None),
    "fp8 tensor (naive)": ("fp8-tensor", None),
    "fp8 channels": ("fp8-channel", None),
    "fp8 blocks": ("fp8-b32x32", None),
    "nvfp4": ("nvfp4", None),
    "mxfp4": ("mxfp4", None),
    "mxfp6": ("mxfp6", None),
    "mxfp8": ("mxfp8", None),
    "W8A8": ("int8-channel", "int8-token"),
    "W4A8": ("int4-g32", "int8-token"),
    "FP8 dynamic": ("fp8-channel", "fp8-token"),
    "FP8 static": ("fp8-tensor", "fp8-tensor static"),
    "NVFP4": ("nvfp4", "nvfp4 static"),
}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [32, 32],
}
AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "data_type": "int",
}
DESC_ACT = {"gptq, desc_act": "gptq_desc_act", "gptq_v2, desc_act": "gptq_v2_desc_act"}


def _compressed(name):
    weights, rounded = COMPRESSED[name]
    codec = CODECS["compressed-tensors"]
    spec = parse_spec(weights)
    inputs = rounded and parse_input_spec(rounded)
    online = ()
    if inputs:
        scale = torch.tensor([[0.03]]) if inputs.static and not inputs.spec.outer else None
        outer = torch.tensor([700.0])
        online = (QuantizeInput(inputs.spec, scale, None, outer if inputs.spec.outer else None),)
    return (
        lambda path, W: codec.encode(
            path, encode(minmax, W, with_scale_dtype(spec, W.dtype)), online
        ),
        lambda paths: codec.config(
            dict.fromkeys(paths, spec) | {"lm_head": None}, dict.fromkeys(paths, inputs)
        ),
    )


def _desc_act(name):
    codec, spec = CODECS[DESC_ACT[name]], Int(4, Tile(1, 32), scale_dtype=torch.float16)
    perm = lambda k: torch.randperm(k, generator=torch.Generator().manual_seed(1))
    shuffled = lambda W: replace(encode(minmax, W, spec), perm=perm(W.shape[1]))
    return lambda path, W: codec.encode(path, shuffled(W)), lambda paths: codec.config(
        dict.fromkeys(paths, spec)
    )


def _auto_round(name):
    spec = Int(4, Tile(1, 32), scale_dtype=torch.float16)
    return lambda path, W: CODECS["gptq"].encode(
        path, encode(minmax, W, spec)
    ), lambda paths: AUTO_ROUND


def _fp8(path, W):
    q = encode(minmax, W, with_scale_dtype(parse_spec("fp8-b32x32"), torch.float32))
    return {f"{path}.weight": q.codes, f"{path}.weight_scale_inv": q.scales}


def _hqq(axis, path, W):
    """4 bits in groups of 16 along rows (axis 1), or down the columns of a matrix [16, o k / 16]
    (axis 0)."""
    generator = torch.Generator().manual_seed(2)
    shape = (W.numel() // 16, 16) if axis else (16, W.numel() // 16)
    grid = (shape[0], 1) if axis else (1, shape[1])
    codes = torch.randint(16, shape, generator=generator, dtype=torch.uint8)
    parts = {
        "W_q": codes[: shape[0] // 2] << 4 | codes[shape[0] // 2 :],
        "scale": torch.rand(grid, generator=generator) * 0.04,
        "zero": torch.rand(grid, generator=generator) * 4 + 6,
        "shape": torch.tensor(W.shape),
        "nbits": torch.tensor(4).int(),
        "group_size": torch.tensor(16).int(),
        "axis": torch.tensor(axis).int(),
    }
    return {f"{path}.{name}": part for name, part in parts.items()}


def _hqq_config(axis):
    weights = {"nbits": 4, "group_size": 16, "axis": axis, "view_as_float": False}
    return {"quant_method": "hqq", "quant_config": {"weight_quant_params": weights}}


def _torchao(path, W):
    q = encode(minmax, W, Int(8, Tile(1, None), scale_dtype=torch.float32))
    return {f"{path}._weight_qdata": q.codes, f"{path}._weight_scale": q.scales}


def _torchao_int4(path, W):
    generator, (o, k) = torch.Generator().manual_seed(3), W.shape
    scales, zeros = (torch.randn(k // 32, o, generator=generator) * 0.02 for _ in range(2))
    words = torch.randint(-128, 128, (o, k // 2), generator=generator, dtype=torch.int8)
    return {
        f"{path}._weight_qdata": words,
        f"{path}._weight_scale": scales,
        f"{path}._weight_zero_point": zeros,
    }


def _torchao_config(kind, **fields):
    return {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": kind, "_version": 2, "_data": fields}},
    }


PLAIN = {"_type": "Int4PackingFormat", "_data": "PLAIN"}
OTHERS = {  # name -> (tensors of a module, its config)
    "fp8, rounded inputs": (_fp8, FP8),
    "hqq": (lambda path, W: _hqq(1, path, W), _hqq_config(1)),
    "hqq, axis 0": (lambda path, W: _hqq(0, path, W), _hqq_config(0)),
    "torchao int8": (_torchao, _torchao_config("Int8WeightOnlyConfig", group_size=None)),
    "torchao int4": (
        _torchao_int4,
        _torchao_config("Int4WeightOnlyConfig", group_size=32, int4_packing_format=PLAIN),
    ),
}
DENSE = ("hqq, axis 0", "torchao int4")  # formats whose numbers are no grid of qlab's
FORMATS = (*COMPRESSED, *DESC_ACT, "auto-round", *OTHERS)


def directory(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model in this format; its numbers are exact in bfloat16."""
    if name in COMPRESSED:
        stored, config = _compressed(name)
    elif name in DESC_ACT:
        stored, config = _desc_act(name)
    elif name == "auto-round":
        stored, config = _auto_round(name)
    else:
        stored, said = OTHERS[name]
        config = lambda paths: said
    model = tiny("llama").bfloat16().to(dtype)
    linears = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]
    state = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in linears}
    for path in linears:
        state |= stored(path, model.get_submodule(path).weight.detach())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: t.contiguous() for n, t in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    said = model.config.to_dict() | {
        "quantization_config": config(linears),
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(said))
    GenerationConfig(eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    return folder
