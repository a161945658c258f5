"""Runs inside an environment with llm-compressor: `read DIR...` writes DIR.dense.safetensors, what
compressed-tensors makes of every quantized weight; `write MODEL OUT` quantizes a model in every way
of WAYS, each into OUT/<name>, and reads them."""

import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import (
    AWQModifier,
    QuIPModifier,
    SmoothQuantModifier,
    SpinQuantModifier,
)
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import CompressedTensorsConfig

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
TENSOR = TOKENS | {"strategy": "tensor", "dynamic": False}
CHANNEL = TOKENS | {"strategy": "channel", "dynamic": False}
FP8 = TENSOR | {"type": "float"}


def grouped(*pairs):
    """Config groups of (targets, weights, inputs)."""
    groups = {
        f"group_{i}": {"targets": t, "weights": w, "input_activations": x}
        for i, (t, w, x) in enumerate(pairs)
    }
    return {"config_groups": groups, "ignore": ["lm_head"]}


def alike(weights, inputs=None):
    return grouped((["Linear"], weights, inputs))


def preset(name):
    return {"scheme": name, "targets": ["Linear"], "ignore": ["lm_head"]}


WAYS = {
    "W4A16": lambda: QuantizationModifier(**alike(INT4)),
    "W4A16_asym": lambda: QuantizationModifier(**alike(INT4 | {"symmetric": False})),
    "W8A16": lambda: QuantizationModifier(**alike(CHANNEL)),
    "W8A8": lambda: QuantizationModifier(**preset("W8A8")),
    "W8A8_static": lambda: QuantizationModifier(**alike(CHANNEL, TENSOR)),
    "W8A8_static_asym": lambda: QuantizationModifier(
        **alike(CHANNEL, TENSOR | {"symmetric": False})
    ),
    "W4A8": lambda: QuantizationModifier(**alike(INT4, TOKENS)),
    "FP8": lambda: QuantizationModifier(**preset("FP8")),
    "FP8_DYNAMIC": lambda: QuantizationModifier(**preset("FP8_DYNAMIC")),
    "FP8_BLOCK": lambda: QuantizationModifier(**preset("FP8_BLOCK")),
    "NVFP4A16": lambda: QuantizationModifier(**preset("NVFP4A16")),
    "NVFP4": lambda: QuantizationModifier(**preset("NVFP4")),
    "MXFP4": lambda: QuantizationModifier(**preset("MXFP4")),
    "MXFP8": lambda: QuantizationModifier(**preset("MXFP8")),
    "GPTQ": lambda: GPTQModifier(**alike(INT4)),
    "GPTQ_unordered": lambda: GPTQModifier(**alike(INT4), actorder=None),
    "AWQ": lambda: [
        AWQModifier(duo_scaling="both"),
        QuantizationModifier(**alike(INT4 | {"symmetric": False})),
    ],
    "SmoothQuant": lambda: [
        SmoothQuantModifier(smoothing_strength=0.5),
        QuantizationModifier(**preset("W8A8")),
    ],
    "SpinQuant": lambda: [
        SpinQuantModifier(rotations=["R1", "R2"]),
        QuantizationModifier(**alike(INT4)),
    ],
    "SpinQuant_online": lambda: [
        SpinQuantModifier(rotations=["R1", "R2", "R3", "R4"]),
        QuantizationModifier(**alike(INT4)),
    ],
    "QuIP": lambda: [QuIPModifier(rotations=["v"]), QuantizationModifier(**alike(INT4))],
    "QuIP_outputs": lambda: [
        QuIPModifier(rotations=["v", "u"]),
        QuantizationModifier(**alike(INT4)),
    ],
    "mixed_groups": lambda: QuantizationModifier(
        **grouped(
            (["re:.*self_attn.*"], INT4, None),
            (["re:.*(gate|up)_proj"], CHANNEL, TOKENS),
            (["re:.*down_proj"], FP8, FP8),
        )
    ),
    "kv_cache": lambda: QuantizationModifier(**alike(INT4), kv_cache_scheme=FP8),
    "kv_cache_heads": lambda: QuantizationModifier(
        **alike(INT4), kv_cache_scheme=FP8 | {"strategy": "attn_head"}
    ),
}
# Their outputs in fp32 are written to OUT/<name>.logits.safetensors too.
ROTATED = ("SpinQuant", "SpinQuant_online", "QuIP", "QuIP_outputs")


def read(directory):
    settings = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=settings, dtype="auto"
    )
    modules = {
        path: m
        for path, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and hasattr(m, "quantization_scheme")
    }
    save_file(
        {path: m.weight.detach().contiguous() for path, m in modules.items()},
        f"{directory}.dense.safetensors",
    )


def write(source, out):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 128, (64,), generator=generator).tolist() for _ in range(8)]
    # AWQ pins memory for copies to an accelerator, and no number depends on it.
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda self, *args: None
    samples = Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    for name, recipe in WAYS.items():
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        quantized = oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=samples,
            recipe=recipe(),
            output_dir=f"{out}/{name}",
            num_calibration_samples=len(rows),
            max_seq_length=64,
        )
        if name in ROTATED:
            with torch.no_grad():
                logits = quantized.float()(torch.tensor(rows)).logits
            save_file(
                {"tokens": torch.tensor(rows), "logits": logits}, f"{out}/{name}.logits.safetensors"
            )
        read(f"{out}/{name}")


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(*sys.argv[2:])
    else:
        for path in sys.argv[2:]:
            read(path)
