"""The main job on tiny models: the directory is complete, and transformers reads from it what qlab
reads."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, OTHERS, tiny
from logits import IDS, assert_read_alike, qlab_logits
from model_folders import bits_equal, contents, random_tokens, tensors
from packaging.version import Version
from quick import ROUNDING
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import keep, rules
from qlab.data.calibration import tokens
from qlab.driver.plan import plan
from qlab.driver.quantize import compare, quantize
from qlab.evaluation.perplexity import evaluate
from qlab.files.checkpoint import INDEX, open_checkpoint
from qlab.methods import METHODS
from qlab.methods.awq import awq
from qlab.methods.gptaq import gptaq
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn
from qlab.model.loading import load_outside
from qlab.model.running import record_blocks
from qlab.model.skeleton import Skeleton

# gpt2's Conv1D has no place in this format: see directories/test_transposed.
LINEAR = [family for family in FAMILIES if family != "gpt2"]
SHORT = {
    family: dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    for family in ("gemma2", "gemma3_text")
}
INT4 = parse_spec("int4-g16")
release = Version(transformers.__version__)


def assert_complete(path: Path, source: Path, sites: set[str]) -> None:
    """Every other file of the source as it was, an index that lists exactly what is there, and a
    row per site."""
    index = json.loads((path / INDEX).read_text())["weight_map"]
    assert set(index) == set(tensors(path)) and set(index.values()) == {
        f.name for f in path.glob("*.safetensors")
    }
    copied = [
        f
        for f in source.iterdir()
        if f.suffix != ".safetensors" and f.name not in ("config.json", INDEX)
    ]
    assert {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    } <= {f.name for f in copied}
    assert all((path / f.name).read_bytes() == f.read_bytes() for f in copied)
    assert not [f for f in path.iterdir() if f.name.startswith(".")]
    rows = json.loads((path / "qlab.json").read_text())["sites"]
    assert set(rows) == sites and all(
        row["spec"] == "int4-g16" and row["weight_error"] < 0.2 for row in rows.values()
    )


@pytest.mark.parametrize("family", OTHERS)
def test_blocks_of_other_makes_are_quantized_whole(family, saved, tmp_path):
    if family == "falcon" and release < Version("5.15"):
        pytest.skip(
            "falcon of transformers before 5.15 hands attention a symbolic is_causal, which "
            "torch.export does not take"
        )
    source = saved(family)
    result = quantize(
        open_checkpoint(source),
        METHODS["awq-gptq"](INT4),
        random_tokens(source, 8, 16),
        tmp_path / "out",
    )
    assert_complete(result.path, source, set(result.sites))
    assert set(plan(open_checkpoint(source), rtn(INT4)).unquantized) == {"lm_head"} | (
        {"model.layers.1.conv.conv"} if family == "lfm2" else set()
    )
    if family != "falcon" or release >= Version("5.23"):  # 5.17 reads no quantized falcon
        # Falcon's own linears look for a dense weight.
        assert_read_alike(result.path, dequantize=family == "falcon")


@pytest.mark.parametrize("family", LINEAR)
def test_transformers_reads_every_family_and_method_as_qlab_does(family, saved, tmp_path):
    """Every family after a method of each kind; every method on one of them."""
    methods = {
        name: method
        for name, method in ROUNDING.items()
        if family == "llama" or name in ("rtn", "gptq", "awq")
    }
    source = saved(family, **SHORT.get(family, {}))
    model = open_checkpoint(source)
    results = compare(
        model,
        {name: method(INT4) for name, method in methods.items()},
        random_tokens(source),
        tmp_path,
    )
    prefix = Skeleton(model, torch.float32).prefix
    sites = {
        name.removesuffix(".weight")
        for name, t in tensors(source).items()
        if name.startswith(prefix) and name.endswith(".weight") and t.ndim == 2
    }
    before = qlab_logits(source)
    assert torch.allclose(
        before, tiny(family, **SHORT.get(family, {}))(IDS).logits, rtol=1e-4, atol=1e-4
    )
    for name, result in results.items():
        assert_complete(result.path, source, sites)
        assert_read_alike(result.path)
        assert 0 < (qlab_logits(result.path) - before).norm() < 0.9 * before.norm(), name
        assert result.bits_per_weight == 4 + 32 / 16


@pytest.mark.parametrize("family", LINEAR)
def test_what_is_not_quantized_is_copied_bit_for_bit(family, saved, tmp_path):
    directory = saved(family, **SHORT.get(family, {}))
    result = quantize(open_checkpoint(directory), rtn(INT4), None, tmp_path / "out")
    source, written = tensors(directory), tensors(result.path)
    left = {name for name in source if name.removesuffix(".weight") not in result.sites}
    assert left == {
        name
        for name in written
        if not name.endswith(("weight_packed", "weight_scale", "weight_shape"))
    }
    assert all(bits_equal(written[name], source[name]) for name in left)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_in_several_shards_and_both_dtypes(
    family, dtype, tied, saved, tmp_path
):
    source = saved(family, dtype, "60KB", tie_word_embeddings=tied)
    assert len(list(source.glob("*.safetensors"))) > 2
    result = quantize(open_checkpoint(source), gptq(INT4), random_tokens(source), tmp_path / "out")
    written = tensors(result.path)
    assert ("lm_head.weight" in written) is not tied
    assert {t.dtype for name, t in written.items() if name.endswith("_scale")} == {dtype}
    assert_read_alike(result.path)


def test_bits_and_channels_read_alike(saved, tmp_path):
    recipes = {spec: rtn(parse_spec(spec)) for spec in ("int3-g16", "int8-g16", "int8-channel")}
    for result in compare(open_checkpoint(saved("qwen2")), recipes, None, tmp_path).values():
        assert_read_alike(result.path)


@pytest.mark.skipif(
    release < Version("5.15"), reason="transformers before 5.15 does not dequantize while it loads"
)
def test_zero_points_read_alike(saved, tmp_path):
    recipes = {spec: rtn(parse_spec(spec)) for spec in ("int4-g16-asym", "int3-g32-asym")}
    for result in compare(open_checkpoint(saved("qwen2")), recipes, None, tmp_path).values():
        assert_read_alike(result.path, dequantize=True)


def test_a_mixture_of_bits_groups_and_methods_reads_alike(saved, tmp_path):
    # symmetric throughout: transformers dequantizes zero points only where all modules share one
    # spec
    source = saved("qwen2")
    mixed = rules(
        {
            "*.layers.0.self_attn.*": awq(parse_spec("int4-g32")),
            "*.self_attn.o_proj": keep(),
            "*.self_attn.*": gptq(parse_spec("int8-channel")),
            "*.mlp.down_proj": rtn(parse_spec("int3-g16")),
            "*": gptq(parse_spec("int4-g64")),
        }
    )
    result = quantize(open_checkpoint(source), mixed, random_tokens(source), tmp_path / "out")
    assert_read_alike(result.path)
    specs = {name.removeprefix("model.layers."): row["spec"] for name, row in result.sites.items()}
    assert [specs[f"{i}.self_attn.{p}_proj"] for i in (0, 1) for p in "qo"] == [
        "int4-g32",
        "int4-g32",
        "int8-channel",
        None,
    ]
    assert [specs[f"{i}.mlp.{p}_proj"] for i in (0, 1) for p in ("down", "up")] == [
        "int3-g16",
        "int4-g64",
    ] * 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checkpoints_whose_names_lack_the_base_prefix_are_read(family, tmp_path):
    whole = tiny(family, tie_word_embeddings=True)
    whole.base_model.save_pretrained(tmp_path)
    assert not any(name.startswith(whole.base_model_prefix) for name in tensors(tmp_path))
    assert torch.allclose(qlab_logits(tmp_path), whole(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_quantized_checkpoint_without_the_base_prefix_reads_alike(tmp_path):
    source = tmp_path / "source"
    tiny("llama", tie_word_embeddings=True).base_model.save_pretrained(source)
    result = quantize(open_checkpoint(source), gptq(INT4), random_tokens(source), tmp_path / "out")
    assert_read_alike(result.path)


@pytest.mark.skipif(
    release < Version("5.4"),
    reason="gpt2 of transformers before 5.4 passes over the layer's index unless eager",
)
def test_blocks_that_differ_by_their_index_have_programs_of_their_own(tmp_path):
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True, n_layer=3)
    model.save_pretrained(tmp_path)
    skeleton = Skeleton(open_checkpoint(tmp_path), torch.float32)
    load_outside(skeleton, with_head=False)
    _, calls = record_blocks(skeleton, IDS)
    assert len({id(skeleton.programs.code(path, call)) for path, call in calls.items()}) == 3
    assert torch.allclose(qlab_logits(tmp_path), model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_blocks_of_one_structure_share_one_program(saved):
    skeleton = Skeleton(open_checkpoint(saved("gemma2")), torch.float32)
    load_outside(skeleton, with_head=False)
    _, calls = record_blocks(skeleton, IDS)
    # Sliding and full attention have a program each.
    assert len({id(skeleton.programs.code(path, call)) for path, call in calls.items()}) == 2


def test_errors_propagate_on_quantized_inputs_only(saved, tmp_path):
    source = saved()
    model, data = open_checkpoint(source), random_tokens(source)
    ours = tensors(quantize(model, gptq(INT4), data, tmp_path / "q", inputs="quantized").path)
    other = tensors(quantize(model, gptq(INT4), data, tmp_path / "r", inputs="reference").path)
    same = {name for name in ours if bits_equal(ours[name], other[name])}
    # Nothing is quantized before these.
    first = {name for name in ours if re.search(r"\.layers\.0\..*[qkv]_proj", name)}
    assert first and first <= same
    for later in (
        "layers.0.self_attn.o_proj",
        "layers.0.mlp.down_proj",
        "layers.1.self_attn.q_proj",
    ):
        assert f"model.{later}.weight_packed" in ours.keys() - same


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_aiming_at_the_reference_brings_the_model_nearer_to_it(family, tmp_path):
    tiny(family, num_hidden_layers=4).save_pretrained(tmp_path / "model")
    model = open_checkpoint(tmp_path / "model")
    data, int3 = random_tokens(tmp_path / "model", 16, 32), parse_spec("int3-g16")
    errors = []
    for method in (gptq, gptaq):
        logits = qlab_logits(quantize(model, method(int3), data, tmp_path / method.__name__).path)
        errors.append((logits - qlab_logits(model.path)).norm())
    assert errors[1] < errors[0]


def test_the_same_call_gives_the_same_bytes_and_another_seed_does_not(saved, text, tmp_path):
    model = open_checkpoint(saved())
    written = []
    for run, seed in enumerate([0, 0, 1]):
        torch.manual_seed(run)  # the global state of random numbers plays no part
        written.append(
            contents(
                quantize(
                    model, gptq(INT4), tokens(model, [text], 4, 32, seed), tmp_path / str(run)
                ).path
            )
        )
    assert written[0] == written[1]
    assert (
        written[0]["model-00002-of-00003.safetensors"]
        != written[2]["model-00002-of-00003.safetensors"]
    )


def test_stored_buffers_are_computed_with_in_the_dtype_of_the_model_around_them(tmp_path):
    """minimax keeps its decays in its files, as float32 here; the statistics are of a bfloat16
    model."""
    layers = {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4,
    }
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 64,
        "head_dim": 16,
        "block_size": 8,
    }
    MiniMaxForCausalLM(
        MiniMaxConfig(**sizes, **layers, num_attention_heads=4, num_key_value_heads=2)
    ).save_pretrained(tmp_path / "m")
    data = random_tokens(tmp_path / "m", 4, 16)
    result = quantize(
        open_checkpoint(tmp_path / "m"),
        gptq(parse_spec("int4-g16")),
        data,
        tmp_path / "q",
        dtype=torch.bfloat16,
    )
    assert all(row["loss"] < 0.1 for row in result.sites.values() if "loss" in row)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize(
    "method, spec",
    [
        ("rtn", "int4-g32"),
        ("rtn", "nvfp4"),
        ("awq", "int8-tensor"),
        ("awq-gptq", "int4-g32-asym"),
        ("gptaq", "int3-channel"),
        ("gptq", "mxfp4"),
    ],
)
def test_a_model_is_quantized_and_evaluated_on_a_gpu(family, method, spec, saved, tmp_path):
    """To the same bytes twice, and without data to those of the CPU."""
    if family == "mixtral" and spec.endswith("tensor"):
        pytest.skip("fused experts have no scale per tensor")
    model, recipe = open_checkpoint(saved(family)), METHODS[method](parse_spec(spec))
    data = random_tokens(saved(family))
    first, again = (
        quantize(model, recipe, data, tmp_path / name, device="cuda").path
        for name in ("first", "again")
    )
    written = tensors(first)
    assert all(bits_equal(tensor, written[name]) for name, tensor in tensors(again).items())
    if method == "rtn":
        here = tensors(quantize(model, recipe, None, tmp_path / "here").path)
        assert all(bits_equal(tensor, written[name]) for name, tensor in here.items())
    assert 0 <= evaluate(open_checkpoint(first), model, data, device="cuda").kl < 1
