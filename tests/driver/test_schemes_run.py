"""No scheme is listed that was not run end to end: planned, quantized, verified, reopened, lowered
and evaluated. And what does not fit a model or an engine is refused by name."""

import shutil
import warnings

import pytest
import torch
from model_folders import random_tokens, refused

import qlab
from qlab.evaluation.perplexity import read
from qlab.methods.schemes import SCHEMES
from qlab.model.running import head

WIDE = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1, head_dim=32)
MIXTURE = dict(hidden_size=128, moe_intermediate_size=128, num_hidden_layers=1, head_dim=32)
OF_WEIGHTS = [name for name, scheme in SCHEMES.items() if scheme.weights]
# One scale for a tensor of weights has no place at fused experts. Widths that
# differ in bits alone are one case.
OF_EXPERTS = [
    name
    for name in OF_WEIGHTS
    if SCHEMES[name].weights.tile.rows is not None
    and name not in ("W2A16", "W3A16", "W5A16", "W6A16")
]


@pytest.fixture(scope="module")
def wide(saved):
    """A model whose widths every scheme divides, what it computes, and tokens."""
    folder = saved("llama", **WIDE)
    held_out = random_tokens(folder, 2, 16, seed=1)
    model = qlab.open(folder)
    return model, read(model, held_out), held_out, random_tokens(folder, 2, 16)


def computed(folder, ids):
    """The logits that evaluation computes of a directory."""
    reading = read(qlab.open(folder), qlab.from_ids(qlab.open(folder), ids))
    return head(reading.skeleton, ids, reading.hidden)


def lowered(folder, ids):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return qlab.lower(folder, dtype=torch.float32)(ids).logits


def run(model, reference, held_out, data, recipe, out):
    """Every step of a scheme's way; the KL divergence at its end."""
    planned = qlab.plan(model, recipe, data)
    result = qlab.quantize(model, recipe, data, out)
    assert not qlab.verify(out, model).faults
    assert planned.bits_per_weight == pytest.approx(result.bits_per_weight)
    expected = computed(out, held_out.ids)
    assert (lowered(out, held_out.ids) - expected).norm() < 2e-2 * expected.norm()
    return qlab.evaluate(qlab.open(out), reference, held_out).kl


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_a_scheme_of_weights_runs_end_to_end(name, method, wide, tmp_path):
    scheme, (model, reference, held_out, data) = qlab.scheme(name), wide
    kl = run(model, reference, held_out, data, scheme.recipe(method), tmp_path / "out")
    limit = 2.0 if scheme.sparsity or scheme.weights.bits == 2 else 0.6
    assert 0 < kl < (0.05 if scheme.weights.bits == 8 and not scheme.sparsity else limit)
    back = qlab.open(tmp_path / "out")
    assert {str(spec) for spec in back.quantized.values()} == {str(scheme.weights)}
    inputs = {str(spec) for spec in back.inputs.values()}
    assert inputs == ({str(scheme.inputs)} if scheme.inputs else set())
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("name", [name for name in SCHEMES if name not in OF_WEIGHTS])
def test_a_scheme_of_the_cache_runs_end_to_end(name, wide, tmp_path):
    scheme, (model, reference, held_out, data) = qlab.scheme(name), wide
    recipe = qlab.chain(qlab.scheme("W8A16").recipe(), scheme.recipe(static="least_error"))
    kl = run(model, reference, held_out, data, recipe, tmp_path / "out")
    assert 0 < kl < (0.2 if "INT4" in name else 0.02)
    args = qlab.open(tmp_path / "out").raw["quantization_config"]["kv_cache_scheme"]
    assert args["num_bits"] == scheme.cache.spec.bits and args["dynamic"] == ("TOKEN" in name)
    qlab.quantize(model, scheme.recipe(), data, tmp_path / "alone")
    assert not qlab.verify(tmp_path / "alone", model).faults
    alone = qlab.evaluate(qlab.open(tmp_path / "alone"), reference, held_out).kl
    assert 0 < alone < (0.2 if "INT4" in name else 0.02)


@pytest.mark.parametrize("name", OF_EXPERTS)
def test_a_scheme_runs_end_to_end_on_a_mixture(name, saved, tmp_path):
    folder = saved("qwen3_moe", **MIXTURE)
    held_out, data = random_tokens(folder, 2, 16, seed=1), random_tokens(folder, 2, 16)
    model = qlab.open(folder)
    recipe = qlab.scheme(name).recipe()
    assert run(model, read(model, held_out), held_out, data, recipe, tmp_path / "out") > 0


# ------------------------------------------------------------------ what does not fit
@pytest.mark.parametrize(
    "family, name, words",
    [
        ("llama", "W4A16", ("groups of 128 do not divide the 64 input", "16, 32, 64")),
        ("llama", "W4A16-g24", ("groups of 24", "legal groups here are 16, 32, 64")),
        ("qwen3_moe", "FP8", ("fused experts", "one per tensor")),
        ("deepseek_v3", "KV_FP8_TENSOR", ("layers.0.self_attn", "caches a latent", "fp8-tensor")),
        ("lfm2", "KV_INT8_HEAD", ("model.layers.1 caches a state", "qlab.kv_cache")),
        ("gemma4_text", "KV_INT8_TOKEN", ("heads of 16 and", "int8-token-head", "KV_INT8_HEAD")),
        ("olmo_hybrid", "KV_INT4_TOKEN", ("model.layers.0 caches a state",)),
    ],
)
def test_a_scheme_that_does_not_fit_the_model_is_refused_before_any_work(
    family, name, words, saved, tmp_path
):
    folder = saved(family)
    model, data, recipe = qlab.open(folder), random_tokens(folder), qlab.scheme(name).recipe()
    refused(lambda: qlab.plan(model, recipe, data), *words)
    refused(lambda: qlab.quantize(model, recipe, data, tmp_path / "out"), *words)
    assert not list(tmp_path.iterdir())


def test_static_scales_of_experts_that_an_engine_does_not_take_are_refused(saved):
    folder = saved("qwen3_moe", **MIXTURE)
    model, data = qlab.open(folder), random_tokens(folder)
    static = qlab.scheme("W8A8_STATIC").recipe()
    words = "vllm rounds inputs of experts by a stored scale in NVFP4 alone"
    refused(lambda: qlab.plan(model, static, data, target="vllm"), "experts", words)
    qlab.plan(model, qlab.scheme("NVFP4").recipe(), data, target="vllm")


@pytest.mark.parametrize("family", ["gpt2", "phi3", "mixtral"])
def test_a_plain_cache_is_taken(family, saved):
    folder = saved(family)
    recipe = qlab.scheme("KV_INT8_HEAD").recipe()
    assert qlab.plan(qlab.open(folder), recipe, random_tokens(folder)).passes > 0


def test_rows_that_two_of_four_does_not_divide_are_refused(saved, tmp_path):
    folder = saved("llama", intermediate_size=130)
    recipe = qlab.scheme("W8A8_2:4").recipe()
    refused(
        lambda: qlab.quantize(qlab.open(folder), recipe, None, tmp_path / "out"),
        "down_proj",
        "130 input channels are no multiple of 4",
    )


@pytest.mark.parametrize(
    "name, target, words",
    [
        ("W8A8", "lmdeploy", ("lmdeploy loads no int8-channel",)),
        ("W4A8", "lmdeploy", ("rounds no inputs to int8-channel", "16-bit inputs alone")),
        ("W4A8", "sglang", ("sglang rounds no inputs",)),
        ("W4AFP8-g64", "vllm", ("to fp8-channel beside int4-g64", "int8-token, int4-token")),
        ("KV_INT8_HEAD", "vllm", ("vllm caches keys and values as fp8-tensor or fp8-head",)),
    ],
)
def test_what_an_engine_does_not_take_is_refused(name, target, words, wide):
    model, _, _, data = wide
    recipe = qlab.scheme(name).recipe()
    refused(lambda: qlab.plan(model, recipe, data, target=target), *words)


@pytest.mark.parametrize("target", ["vllm", "transformers", "lmdeploy", "sglang"])
def test_the_table_says_what_plans_say_of_an_engine(target, wide):
    model, _, _, data = wide
    for row in qlab.schemes():
        codec = row.engines.get(target)
        act = lambda row=row, codec=codec: qlab.plan(
            model, row.scheme.recipe(), data, target=target, codec=codec or "compressed-tensors"
        )
        if codec in (None, "compressed-tensors"):
            act() if codec else refused(act, target)
