"""What a recipe leaves to run time as a directory: rotations, and roundings of what attention
reads, written and read back as the same model, by qlab and by compressed-tensors."""

import json
import warnings

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.transform import TransformConfig, apply_transform_config
from library import CACHE_IS_MISSED, give_the_cache_its_old_name
from model_folders import random_tokens
from rotations import assert_close, logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qlab
from qlab.algebra.qtensor import dense
from qlab.errors import QlabError

WEIGHTS = "int8-g16"
RECIPES = {
    "kv fp8": lambda: qlab.kv_cache("fp8-tensor"),
    "kv int8 head": lambda: qlab.kv_cache("int8-head"),
    "kv int4 group": lambda: qlab.kv_cache("int4-g8"),
    "kv turned": lambda: qlab.chain(qlab.rotate_scores(), qlab.kv_cache("int4-head")),
    "attention": lambda: qlab.attention_inputs("int8-head"),
    "R4": lambda: qlab.rotate_online(),
    "incoherence": lambda: qlab.incoherence(),
    "quarot": lambda: qlab.chain(qlab.quarot(), qlab.rotate_scores()),
}


def written(name, family, saved, out, **more):
    model, data = qlab.open(saved(family)), random_tokens(saved(family), 2, 24)
    recipe = qlab.chain(RECIPES[name](), qlab.rtn(WEIGHTS))
    value = qlab.apply(model, recipe, data)
    return model, data, value, qlab.write(value, out, **more)


@pytest.mark.parametrize(
    "name, family",
    [
        *((name, "llama") for name in RECIPES),
        ("kv turned", "gemma2"),
        ("quarot", "opt"),
        ("attention", "qwen3"),
        ("kv int8 head", "qwen3_moe"),
        ("kv turned", "deepseek_v3"),  # values have fewer channels than keys
        ("kv turned", "gemma4_text"),  # keys and values of other blocks
    ],
)
def test_a_directory_computes_what_its_recipe_makes(name, family, saved, tmp_path):
    model, data, value, result = written(name, family, saved, tmp_path / "out")
    assert not qlab.verify(result.path, model).faults
    ours, read = (qlab.evaluate(it, model, data).kl for it in (value, result.path))
    assert read == pytest.approx(ours, rel=1e-3, abs=1e-7)
    converted = qlab.convert(result.path, "compressed-tensors", tmp_path / "again")
    assert qlab.evaluate(converted.path, model, data).kl == pytest.approx(read, rel=1e-3, abs=1e-7)


def computed_by_the_library(folder):
    """The logits of a directory's weights in transformers' model, with what compressed-tensors
    makes of its configuration at run time."""
    directory = qlab.open(folder)
    model = AutoModelForCausalLM.from_config(directory.config).float()
    if CACHE_IS_MISSED:
        give_the_cache_its_old_name(model)
    said = directory.raw["quantization_config"]
    if said["transform_config"]:
        apply_transform_config(model, TransformConfig.model_validate(said["transform_config"]))
    attentions = {n: g for n, g in said["config_groups"].items() if g["weights"] is None}
    said = {"config_groups": attentions, "kv_cache_scheme": said["kv_cache_scheme"]}
    apply_quantization_config(model, QuantizationConfig.model_validate(said), show_progress=False)
    weights = {f"{n}.weight": dense(directory.leaf(f"{n}.weight")) for n in directory.quantized}
    beside = {name: directory.tensor(name) for name in directory.stored if name in directory.beside}
    left = {name: directory.tensor(name) for name in model.state_dict() if name in directory.stored}
    _, unexpected = model.load_state_dict(left | beside | weights, strict=False)
    assert not unexpected
    with torch.no_grad():
        return model(torch.arange(3, 35).reshape(2, 16)).logits


@pytest.mark.parametrize("name", RECIPES)
def test_the_library_computes_the_same(name, saved, tmp_path, monkeypatch):
    if name == "kv turned":  # where it would round queries too, with a scale that no file has
        at_queries = "compressed_tensors.modeling.attention.forward_quantize"
        monkeypatch.setattr(at_queries, lambda module, value, *args: value)
    _, _, _, result = written(name, "llama", saved, tmp_path / "out")
    config = json.loads((result.path / "config.json").read_text())["quantization_config"]
    QuantizationConfig.model_validate(config)
    assert_close(logits(result.path), computed_by_the_library(result.path), limit=1e-4)


def test_two_runs_write_the_same_bytes_and_what_happens_is_recorded(saved, tmp_path):
    results = [written("kv turned", "llama", saved, tmp_path / name)[3] for name in "ab"]
    files = [
        {f.name: f.read_bytes() for f in result.path.glob("*.safetensors")} for result in results
    ]
    assert files[0] == files[1]
    record = json.loads((results[0].path / "qlab.json").read_text())["around"]
    steps = record["model.layers.0.self_attn"]["key"]
    assert [set(step) & {"rotated", "rounded"} for step in steps] == [{"rotated"}, {"rounded"}]


def test_lowering_says_nothing_of_a_cache_that_it_rounds(saved, tmp_path):
    _, _, _, result = written("kv fp8", "llama", saved, tmp_path / "out")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        qlab.lower(result.path)
    assert not [each for each in said if "cached as" in str(each.message)]


def test_engines_that_do_not_do_it_are_refused_before_any_work(saved):
    model, data = qlab.open(saved("llama", torch.float16)), random_tokens(saved("llama"), 2, 24)
    for name, target, words in (
        ("kv int8 head", "vllm", "caches keys and values as fp8-tensor or fp8-head alone"),
        ("kv fp8", "transformers", "caches keys and values as they are alone"),
        ("kv turned", "vllm", "vllm turns no key at run time"),
        ("attention", "vllm", "vllm caches keys and values as fp8-tensor or fp8-head alone"),
        ("R4", "transformers", "transformers turns no input at run time"),
    ):
        recipe = qlab.chain(RECIPES[name](), qlab.rtn("int4-g32"))
        with pytest.raises(QlabError, match=words):
            qlab.plan(model, recipe, data, target=target)


@pytest.mark.parametrize(
    "name, edit",
    [
        ("kv fp8", {"model.layers.1.self_attn.k_scale": lambda t: 2 * t}),
        (
            "R4",
            {
                "model.layers.0.mlp.down_proj.rotated_input_of_model_layers_0_mlp_down_proj_input"
                ".weight": lambda M: M.flip(0)
            },
        ),
    ],
)
def test_verify_finds_what_was_changed(name, edit, saved, tmp_path):
    model, _, _, result = written(name, "llama", saved, tmp_path / "out")
    for file in result.path.glob("*.safetensors"):
        tensors = load_file(file)
        for tensor, changed in edit.items():
            if tensor in tensors:
                save_file(tensors | {tensor: changed(tensors[tensor]).contiguous()}, file)
    (tensor,) = edit
    assert qlab.verify(result.path, model).faults == [f"{tensor} is not what the recipe wrote"]


def test_a_recipe_without_any_rounding_is_written_dense(saved, tmp_path):
    model, data = qlab.open(saved("llama")), random_tokens(saved("llama"), 2, 24)
    value = qlab.apply(model, qlab.wanda(0.5), data)
    result = qlab.write(value, tmp_path / "out")
    out = qlab.open(result.path)
    assert not qlab.verify(result.path, model).faults
    assert not out.quantized and "quantization_config" not in out.raw
    W = out.tensor("model.layers.0.mlp.up_proj.weight")
    assert float((W == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    ours, read = (qlab.evaluate(it, model, data).kl for it in (value, out))
    assert read == pytest.approx(ours, rel=1e-3)
    theirs = AutoModelForCausalLM.from_pretrained(result.path).float()
    with torch.no_grad():
        expected = theirs(torch.arange(3, 35).reshape(2, 16)).logits
    assert_close(logits(result.path), expected)


@pytest.mark.parametrize("pruned", [False, True])
def test_a_dense_model_with_a_rounded_cache_says_the_cache_alone(pruned, saved, tmp_path):
    model, data = qlab.open(saved("llama")), random_tokens(saved("llama"), 2, 24)
    recipe = qlab.chain(qlab.wanda("2:4") if pruned else (), qlab.kv_cache("fp8-head"))
    result = qlab.write(qlab.apply(model, recipe, data), tmp_path / "out")
    said = qlab.open(result.path).raw["quantization_config"]
    assert said["config_groups"] == {} and said["format"] == "dense" and said["kv_cache_scheme"]
    QuantizationConfig.model_validate(said)
    assert not qlab.verify(result.path, model).faults
    assert_close(logits(result.path), computed_by_the_library(result.path), limit=1e-4)
