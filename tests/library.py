"""Directories that the compressed-tensors package itself writes: int8 weights, and what happens at
run time beside."""

import inspect
from functools import partial
from importlib.metadata import version

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.transform import TransformConfig, apply_transform_config
from packaging.version import Version

# transformers 5.24 calls the cache that attention is given `cache`; compressed-tensors 0.20.1 looks
# for `past_key_values`, and where it finds none it passes over a kv_cache_scheme, and turns queries
# (R3) without their keys.
CACHE_IS_MISSED = Version(version("transformers")) >= Version("5.24") and Version(
    version("compressed-tensors")
) <= Version("0.20.1")
MISSED = (
    "compressed-tensors 0.20.1 does not find the cache of transformers 5.24, whose argument has "
    "another name"
)
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def prepare_with_the_library(
    model, inputs=None, cache=None, transforms=None, weights=INT8, plain=()
):
    """The model with these transforms applied and its linears but lm_head rounded to `weights`
    while it runs.

    inputs, cache: QuantizationArgs of input_activations and of kv_cache_scheme. weights None, and
    linears that match one of `plain`: they stay as they are.
    """
    if CACHE_IS_MISSED:
        give_the_cache_its_old_name(model)
    if transforms:
        apply_transform_config(model, TransformConfig.model_validate({"config_groups": transforms}))
    if weights:
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        config = {
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", *plain],
            "kv_cache_scheme": cache,
        }
        apply_quantization_config(
            model, QuantizationConfig.model_validate(config), show_progress=False
        )
        for layer, module in enumerate(model.modules()):
            if hasattr(module, "weight_scale"):
                module.weight_scale.data = module.weight.abs().amax(1, keepdim=True) / 127.5
                module.weight_zero_point.data.zero_()
            for name in ("k_scale", "v_scale"):
                if hasattr(module, name):
                    getattr(module, name).data.fill_(0.01 * (layer + 1))
    return model


def give_the_cache_its_old_name(model):
    """The attention modules of a model take their cache as `past_key_values`."""

    def attend(forward, *args, past_key_values=None, cache=None, **kwargs):
        return forward(*args, cache=cache if past_key_values is None else past_key_values, **kwargs)

    for module in model.modules():
        if "cache" in inspect.signature(module.forward).parameters and hasattr(module, "q_proj"):
            module.forward = partial(attend, module.forward)


def write_with_the_library(model, folder, **options):
    """Prepare the model, write its directory, and return the logits that it computed."""
    prepare_with_the_library(model, **options)
    with torch.no_grad():
        logits = model(torch.arange(3, 35).reshape(2, 16)).logits
    compressor = ModelCompressor.from_pretrained_model(model)
    if compressor.quantization_config:
        compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return logits
