"""Keys, values and queries that a lowered model rounds where attention reads them: it computes what
evaluation computes, at once and token by token."""

import copy
import pickle
import warnings

import pytest
import torch
from model_folders import random_tokens, refused
from tolerances import MODEL
from transformers.cache_utils import DynamicCache

import qlab
from qlab.evaluation.perplexity import read
from qlab.lowering.around.attended import OfHeads
from qlab.model.running import head

IDS = torch.arange(3, 27).reshape(2, 12)  # data have this form too: blocks are traced once
WRITTEN = [
    ("llama", "fp8-tensor"),
    ("llama", "int4-g8"),
    ("qwen3", "int4-head"),
    ("gemma3_text", "int4-head"),
    ("deepseek_v3", "int4-g8"),
]
SOLVED = [
    ("gpt2", qlab.kv_cache("int4-head")),
    ("gpt_oss", qlab.attention_inputs("int4-token")),
    ("qwen3_moe", qlab.kv_cache("int4-token")),
    ("llama", qlab.chain(qlab.rotate_scores(), qlab.centre_keys(), qlab.kv_clipped("int4-token"))),
]


def written(saved, family, recipe, out):
    """A directory of 8-bit weights, with what a recipe puts on what attention reads."""
    folder = saved(family)
    steps = qlab.chain(qlab.rtn("int8-channel"), recipe)
    qlab.quantize(folder, steps, random_tokens(folder, *IDS.shape), out)
    return out


def computed(model):
    """The logits that evaluation computes."""
    checkpoint = model if not hasattr(model, "model") else model.model
    reading = read(model, qlab.from_ids(checkpoint, IDS))
    return head(reading.skeleton, IDS, reading.hidden)


def lowered(model, **more):
    """The model, lowered without a warning of its cache."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = qlab.lower(model, **({"dtype": torch.float32} | more))
    assert not [w for w in said if "keys and values" in str(w.message)]
    return model


def relative(y, expected):
    return ((y - expected).norm() / expected.norm()).item()


def of_most_tokens(y, expected):
    """The relative difference of a token's logits, in the median."""
    return ((y - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()


@torch.no_grad()
def token_by_token(model, **cache):
    """The logits behind a cache that grows by a token: a prefill of five, and then one at a
    time."""
    out = model(IDS[:, :5], use_cache=True, **cache)
    logits = [out.logits]
    for i in range(5, IDS.shape[1]):
        out = model(IDS[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


class OfNumbers(DynamicCache):
    """A cache that holds no codes."""


@torch.no_grad()
def check_reads(model):
    """Behind a cache of numbers the first block reads what it reads at once, and every token
    becomes the numbers that it becomes alone, bit for bit."""
    reads = {name: module for name, module in model.named_modules() if isinstance(module, OfHeads)}
    entered, left = {}, {}

    def note(name):
        def hook(module, args, y):
            entered[name], left[name] = args[0].clone(), y.clone()

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in reads.items()]
    model(IDS, use_cache=False)
    at_once = dict(entered)
    token_by_token(model, past_key_values=OfNumbers(config=model.config))
    for hook in hooks:
        hook.remove()
    for name, x in entered.items():
        alone = torch.cat([reads[name](token) for token in x.split(1, 2)], 2)
        assert torch.equal(alone, left[name])
    first = next(iter(reads)).rpartition(".")[0]
    for name in [name for name in entered if name.startswith(f"{first}.")]:
        last = at_once[name][:, :, -entered[name].shape[2] :]
        assert relative(entered[name], last) < MODEL[torch.float32]


@torch.no_grad()
def check(model, expected):
    """Keys and values that come in with another last bit may land on the neighbouring code, where
    an error of one code in thousands is still far below that of rounding. Such a code may send a
    token to another expert, so that this holds of most tokens."""
    bare = copy.deepcopy(model)
    for module in bare.modules():
        module._modules.pop("reads", None)
    logits, plain = model(IDS).logits, bare(IDS).logits
    effect = relative(plain, expected)
    assert relative(logits, expected) < effect / 10 < MODEL[torch.bfloat16]
    assert relative(token_by_token(bare), plain) < MODEL[torch.float32]
    assert of_most_tokens(token_by_token(model), logits) < min(effect / 4, MODEL[torch.bfloat16])
    check_reads(model)


@pytest.mark.parametrize("family, spec", WRITTEN)
def test_a_directory_computes_what_evaluation_computes(family, spec, saved, tmp_path):
    out = written(saved, family, qlab.kv_cache(spec), tmp_path / "out")
    check(lowered(out), computed(qlab.open(out)))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_directory_whose_cache_alone_is_rounded_computes_the_same(family, saved, tmp_path):
    folder, out = saved(family), tmp_path / "out"
    turned = qlab.chain(qlab.rotate_heads(), qlab.rotate_scores())
    qlab.quantize(folder, qlab.chain(turned, qlab.scheme("KV_INT4_TOKEN").on_cache()), None, out)
    check(lowered(out), computed(qlab.open(out)))


@pytest.mark.parametrize("family, recipe", SOLVED)
def test_what_a_recipe_makes_computes_what_evaluation_computes(family, recipe, saved):
    folder = saved(family)
    steps = qlab.chain(qlab.rtn("int8-channel"), recipe)
    made = qlab.apply(qlab.open(folder), steps, random_tokens(folder, *IDS.shape))
    check(lowered(made), computed(made))


def test_it_compiles_and_is_pickled_and_no_other_attention_takes_its_place(saved, tmp_path):
    out = written(saved, "llama", qlab.attention_inputs("int8-head"), tmp_path / "out")
    model = lowered(out, dtype=torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(IDS).logits
        logits = compiled(IDS, use_cache=False).logits
        again = pickle.loads(pickle.dumps(model))(IDS).logits
    assert relative(logits, expected) < MODEL[torch.bfloat16] and torch.equal(again, expected)
    assert not [name for name in model.state_dict() if "reads" in name]
    static = model.generate(IDS, max_new_tokens=3, do_sample=False, cache_implementation="static")
    assert torch.equal(static, model.generate(IDS, max_new_tokens=3, do_sample=False))
    model.set_attn_implementation("sdpa")
    refused(lambda: model(IDS), "sdpa", "does not round keys and values")


def test_attention_in_code_of_its_own_keeps_the_warning(saved, tmp_path):
    out = written(saved, "bloom", qlab.kv_cache("int4-g8"), tmp_path / "out")
    with pytest.warns(UserWarning, match=r"int4 .* do not do in .*h\.0\.self_attention,.* code of"):
        qlab.lower(out, dtype=torch.float32)
