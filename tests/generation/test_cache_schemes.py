"""A cache scheme named at run time computes what the same scheme of a directory computes, costs
what is said, and is refused where a model caches something else."""

import json

import pytest
import torch
from engines import PROMPTS, asked, generated, small
from model_folders import random_tokens, refused
from tolerances import MODEL
from torch._dynamo import lookup_backend
from transformers import AutoModelForCausalLM

import qlab
from qlab.cli import main
from qlab.generation import cache_schemes as module
from qlab.generation import compiled
from qlab.generation.cache_cost import through_pages
from qlab.generation.cache_schemes import SHORT, cache_scheme, put_cache
from qlab.lowering.around.attended import Shifted
from qlab.lowering.around.inputs import RoundedInput
from qlab.methods.schemes import SCHEMES

IDS = torch.arange(3, 27).reshape(2, 12)
TEXT = [*range(5, 69)]  # what is measured on
OF_CACHE = [name for name in SCHEMES if name.startswith("KV_")]


def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def kept(folder, name):
    """A dense model whose cache is rounded."""
    model = dense(folder)
    put_cache(model, qlab.open(folder), cache_scheme(name), TEXT)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def distance(y, expected):
    return ((y - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", [*SHORT, *OF_CACHE])
def test_pages_of_a_scheme_say_what_generate_says(name, saved):
    model = kept(saved("llama"), name)
    engine = small(model)
    assert len(engine.pool.layers.coders) == 4
    ids = PROMPTS[2]
    with torch.no_grad():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0]
    # a number with another last bit may land on the neighbouring code
    assert distance(through_pages(engine, ids), expected) < 0.1
    if "4" not in name:
        prompts = PROMPTS[:2]
        said = [generated(model, prompt, 6) for prompt in prompts]
        assert [r.new[:6] for r in asked(engine, prompts)] == said


@pytest.mark.parametrize("name", ["KV_INT8_TOKEN", "KV_FP8_TOKEN", "KV_INT4_TOKEN"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_scheme_by_its_name_is_that_of_a_directory(name, family, saved):
    folder = saved(family)
    made = qlab.apply(qlab.open(folder), qlab.scheme(name).on_cache(), None)
    expected = logits(qlab.lower(made, dtype=torch.float32))
    effect = distance(logits(dense(folder)), expected)
    assert distance(logits(kept(folder, name)), expected) < effect / 10


def test_what_int4_does_before_it_rounds_changes_nothing(saved):
    folder = saved("llama")
    model = kept(folder, "int4")
    expected = logits(dense(folder))
    effect = distance(logits(model), expected)
    removed = 0
    for part in model.modules():
        steps = getattr(part, "steps", None)
        if steps is not None and len(steps) and isinstance(steps[-1], RoundedInput):
            del steps[-1]
            removed += 1
    assert removed == 2 * model.config.num_hidden_layers
    assert distance(logits(model), expected) < MODEL[torch.float32] < effect


def test_keys_are_centred_where_the_softmax_alone_sees_their_scores(saved, monkeypatch):
    centred = lambda: sum(isinstance(m, Shifted) for m in kept(saved("llama"), "int4").modules())
    assert centred() == 2
    monkeypatch.setattr(module, "seen_shifts", lambda code: {"self_attn:key": None})
    assert centred() == 0


def test_turned_centred_and_clipped_int4_loses_less_than_plain_int4(saved):
    folder = saved("llama")
    expected = logits(dense(folder))
    loss = {name: distance(logits(kept(folder, name)), expected) for name in SHORT}
    plain = distance(logits(kept(folder, "KV_INT4_TOKEN")), expected)
    assert loss["int8"] < loss["k8v4"] < loss["int4"] < plain and loss["int8"] < loss["fp8"]


def test_blocks_with_codes_are_one_graph(saved, monkeypatch):
    made = lookup_backend("eager")
    monkeypatch.setattr(compiled, "inductor", lambda graph, inputs, options: made(graph, inputs))
    model = kept(saved("llama"), "int4")
    expected = [r.new for r in asked(small(model))]
    engine = small(model, compile="block", rows=1)
    engine.compiled.wait()
    assert [r.new for r in asked(engine)] == expected
    stats = engine.compiled.stats()
    assert (stats["graphs"], stats["recompiles"], len(stats["eager"])) == (4, 0, 0)


@pytest.fixture(scope="module")
def spoken(saved, tmp_path_factory):
    out = tmp_path_factory.mktemp("spoken") / "out"
    qlab.quantize(saved("llama"), qlab.rtn("int8-channel"), None, out)
    return out


def test_a_pipeline_says_what_its_cache_costs(spoken, saved, tmp_path):
    with qlab.pipeline(spoken, dtype=torch.float32) as pipe:
        assert pipe.cache_cost() is None
    costs = {}
    for name in ("int8", "int4", "KV_INT8_HEAD"):
        with qlab.pipeline(spoken, dtype=torch.float32, kv_cache=name) as pipe:
            costs[name] = pipe.cache_cost()
            assert pipe("the", max_tokens=3, temperature=0).finish
            assert pipe.engine.pages.available == pipe.engine.pages.count
    assert costs["int8"].share == (16 + 2 + 1) / 32 and costs["int4"].share == (8 + 2 + 1) / 32
    assert costs["KV_INT8_HEAD"].share == 0.5
    assert 0 < costs["int8"].kl < costs["int4"].kl and costs["int8"].tokens == 192
    assert "0.59 of 16 bits" in str(costs["int8"]) and "passage.txt" in str(costs["int8"])


@pytest.mark.parametrize(("channels", "groups"), [(16, 1), (64, 2), (80, 1), (128, 4)])
def test_int4_has_a_scale_for_32_channels_where_they_divide_a_head(channels, groups, saved):
    sizes = {"hidden_size": 2 * channels, "num_attention_heads": 2, "head_dim": channels}
    with qlab.pipeline(saved("llama", **sizes), dtype=torch.float32, kv_cache="int4") as pipe:
        assert pipe.cache_cost().share == (channels / 2 + groups * (2 + 1)) / (2 * channels)


def test_a_directory_that_rounds_its_cache_has_pages_of_codes_without_being_asked(saved, tmp_path):
    folder, out = saved("llama"), tmp_path / "out"
    recipe = qlab.scheme("KV_INT8_HEAD").on_cache()
    qlab.quantize(folder, recipe, random_tokens(folder, 2, 16), out)
    with qlab.pipeline(out, dtype=torch.float32) as pipe:
        assert pipe.cache_cost().share == 0.5
    refused(
        lambda: qlab.pipeline(out, kv_cache="int8"),
        "int8 with a stored scale per head",
        "int8 away",
    )


@pytest.mark.parametrize(
    "family, parts",
    [
        ("deepseek_v3", ("self_attn", "latent", "int8")),
        ("lfm2", ("model.layers.1", "state", "int8")),
        ("bloom", ("self_attention", "code of its own", "int8")),
        ("gemma4_text", ("another layer", "int8")),
    ],
)
def test_a_model_without_a_plain_cache_is_refused_by_name(family, parts, saved):
    few = {"num_hidden_layers": 1} if family == "deepseek_v3" else {}
    folder = saved(family, **few)
    refused(lambda: qlab.pipeline(folder, kv_cache="int8"), *parts)


def test_what_is_measured_on_no_tokens_is_refused(saved):
    folder = saved("llama")
    put = lambda name: put_cache(dense(folder), qlab.open(folder), cache_scheme(name), [])
    put("int8")
    refused(lambda: put("k8v4"), "k8v4", "no tokens", "int8")


def test_a_scheme_may_be_a_cache_spec():
    assert cache_scheme("int8-head").keys == cache_scheme("kv_int8_head").keys
    refused(lambda: cache_scheme("int8-b128x128"), "keys and values")


def test_an_unknown_scheme_is_refused_with_the_nearest(spoken):
    refused(lambda: cache_scheme("int5"), "'int5'", "INT4", "k8v4", "qlab schemes")
    refused(lambda: cache_scheme("KV_INT8_TOKN"), "KV_INT8_TOKEN")
    refused(lambda: cache_scheme("W4A16"), "'W4A16'")
    refused(lambda: qlab.pipeline(spoken, kv_cache="int5"), "'int5'")


def test_a_command_tells_the_cost_at_its_start(spoken, tmp_path, command):
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(json.dumps({"prompt": "the"}) + "\n")
    given = ("run", spoken, "--in", prompts, "--out", answers, "--max-tokens", 2)
    code, _, told = command(main, *given, "--dtype", "float32", "--kv-cache", "int4")
    assert code == 0 and "0.34 of 16 bits" in told
    assert len(answers.read_text().splitlines()) == 1
    code, _, told = command(main, *given, "--kv-cache", "int5")
    assert code == 2 and "int5" in told
