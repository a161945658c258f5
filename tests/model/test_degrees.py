"""Over how many ranks a model can be divided, by its plan, its heads and its scales."""

from dataclasses import replace

import pytest
import torch
from model_folders import refused
from safetensors.torch import load_file, save_file

from qlab.algebra.spec import parse_input_spec, parse_spec
from qlab.files.checkpoint import open_checkpoint
from qlab.model.parallel import degrees, limits, refuse_degree, styles_of
from qlab.model.skeleton import Skeleton

OUT = "model.layers.0.self_attn.o_proj"


def coded(path, spec, inputs=None, which=lambda name: True):
    """The directory as if its linears had codes of a spec, and their inputs were rounded."""
    model = open_checkpoint(path)
    linears = [name.removesuffix(".weight") for name in model.stored if "_proj.weight" in name]
    linears = [name for name in linears if which(name)]
    specs = dict.fromkeys(linears, parse_spec(spec))
    rounded = dict.fromkeys(linears, parse_input_spec(inputs)) if inputs else {}
    return replace(model, quantized=specs, inputs=rounded)


@pytest.mark.parametrize(
    "spec, group", [("int4-g16", 16), ("int4-g64-asym", 64), ("fp8-channel", 1)]
)
@pytest.mark.parametrize(
    "heads, shared, width", [(4, 2, 128), (6, 3, 96), (12, 12, 192), (8, 1, 64)]
)
def test_a_legal_degree_divides_heads_and_groups(saved, spec, group, heads, shared, width):
    sizes = {"hidden_size": 16 * heads, "intermediate_size": width}
    path = saved("llama", num_attention_heads=heads, num_key_value_heads=shared, **sizes)
    if any(size % group for size in sizes.values()):
        expected = [1]
    else:
        counts = [shared, heads, 16 * heads // group, width // group]
        expected = [n for n in range(1, heads + 1) if not any(count % n for count in counts)]
    assert degrees(coded(path, spec)) == tuple(expected)


def test_blocks_of_rows_stay_whole(saved):
    path = saved("llama")  # 4 heads and 2 of keys, of 16 channels
    assert degrees(coded(path, "fp8-b16x16")) == (1, 2)
    assert degrees(coded(path, "fp8-b32x32", which=lambda name: "mlp" in name)) == (1, 2)
    assert degrees(coded(path, "fp8-b32x32")) == (1,)  # k_proj has 32 rows
    assert degrees(coded(path, "fp8-tensor")) == (1, 2)


@pytest.mark.parametrize(
    "family, expected",
    [("gpt_neox", (1, 2, 4)), ("qwen3_moe", (1, 2)), ("deepseek_v3", (1, 2, 4, 8, 16, 32))],
)
def test_the_plan_says_which_limits_there_are(saved, family, expected):
    assert degrees(open_checkpoint(saved(family))) == expected


def test_experts_stay_whole_in_their_groups(saved):
    def is_expert(name):
        return ".experts." in name

    path = saved("qwen3_moe")  # experts of 32 channels
    assert degrees(coded(path, "int4-g16", which=is_expert)) == (1, 2)
    assert degrees(coded(path, "int4-g32", which=is_expert)) == (1,)


def test_inputs_that_are_rounded_together_stay_together(saved):
    path = saved("llama")
    for of_all in ("int8-token", "int8-token-asym", "int8-tensor", "int8-tensor static"):
        assert degrees(coded(path, "int8-channel", of_all)) == (1, 2)
    assert degrees(coded(path, "fp8-channel", "fp8-g32")) == (1, 2)
    assert degrees(coded(path, "fp8-channel", "fp8-g64")) == (1,)


@pytest.mark.parametrize("inputs", [None, "fp8-token", "fp8-g32"])
def test_reordered_channels_are_divided(folder, inputs):
    model = coded(folder, "int4-g32", inputs, which=lambda name: name == OUT)
    g_idx = torch.arange(64, dtype=torch.int32).flip(0) // 32
    tensors = load_file(folder / "model.safetensors") | {f"{OUT}.g_idx": g_idx}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = replace(open_checkpoint(folder), quantized=model.quantized, inputs=model.inputs)
    assert degrees(model) == (1, 2)


def test_an_illegal_degree_is_refused_with_the_legal_ones(saved):
    skeleton = Skeleton(open_checkpoint(saved("llama")), torch.float32)
    found = limits(skeleton, styles_of(skeleton))
    refuse_degree(found, 2)
    refused(lambda: refuse_degree(found, 4), "2 key-value heads", "4 ranks", "1, 2")
    skeleton = Skeleton(coded(saved("llama"), "int4-g64"), torch.float32)
    found = limits(skeleton, styles_of(skeleton))
    refused(lambda: refuse_degree(found, 2), "1 groups of 64 inputs", "o_proj", "run it on 1")


@pytest.mark.parametrize("family", ["opt", "gpt2", "lfm2"])
def test_models_without_a_plan_are_refused_by_name(saved, family):
    refused(lambda: degrees(open_checkpoint(saved(family))), family, "one process")


def test_unknown_styles_are_refused_by_name(saved):
    skeleton = Skeleton(open_checkpoint(saved("llama")), torch.float32)
    skeleton.model._tp_plan["model.layers.*.mlp.up_proj"] = "sequence_parallel"
    refused(lambda: styles_of(skeleton), "mlp.up_proj", "'sequence_parallel'")
    skeleton.model._tp_plan["model.layers.*.mlp.up_proj"] = "colwise"
    skeleton.model._tp_plan["model.layers.*.mlp"] = "rowwise"
    refused(lambda: styles_of(skeleton), "LlamaMLP")
