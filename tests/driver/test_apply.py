"""What a recipe makes of a model, as a value: its figures, and its bytes when it is written."""

import dataclasses

import pytest
import torch
from model_folders import contents, random_tokens, tensors
from transformers import AutoModelForCausalLM

from qlab import LowRank, Sum, apply, evaluate, insert, logits, lower, perplexity, quantize, write
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import Stage, at, chain, each_weight, outside
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods import METHODS
from qlab.methods.gptq import gptq
from qlab.methods.inputs import quantize_inputs
from qlab.methods.rtn import rtn
from qlab.methods.smoothquant import smoothquant

INT4 = parse_spec("int4-g16")
INT8 = parse_spec("int8-channel")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [  # a method, a family, and the dtype of its files
    ("rtn", "gpt2", FP16),
    ("gptq", "gemma2", BF16),
    ("gptq", "mixtral", FP32),
    ("gptaq", "qwen2", BF16),
    ("awq", "llama", FP32),
    ("awq", "qwen3_moe", BF16),
    ("awq", "opt", BF16),
]


def prune(W_ok, stats, spec):
    return W_ok.masked_fill(W_ok.abs() < W_ok.abs().median(), 0), {}


def figures(evaluation):
    return dataclasses.asdict(evaluation)


@pytest.mark.parametrize("method, family, dtype", CASES)
def test_figures_of_the_value_are_those_of_the_directory(method, family, dtype, saved, tmp_path):
    source = saved(family, dtype)
    model, data = open_checkpoint(source), random_tokens(source)
    windows = random_tokens(source, seed=1)
    recipe = METHODS[method](INT4)
    value = apply(model, recipe, data)
    # of the formats, gptq's alone holds weights that are stored as [k, o]
    codec = "gptq" if family == "gpt2" else "compressed-tensors"
    written = quantize(model, recipe, data, tmp_path / "out", codec=codec)
    directory = evaluate(written.path, model, windows)
    assert figures(evaluate(value, model, windows)) == figures(directory)
    assert perplexity(value, windows).perplexity == directory.perplexity
    assert value.bits_per_weight == written.bits_per_weight


@pytest.mark.parametrize(
    "recipe",
    [
        chain(smoothquant(), rtn(INT8), quantize_inputs(INT8)),
        chain(gptq(INT4), at("lm_head", outside(rtn(INT8)))),
    ],
    ids=["inputs", "head"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_rounded_inputs_and_heads_have_the_figures_of_the_directory(recipe, tied, saved, tmp_path):
    source = saved("llama", torch.bfloat16, tie_word_embeddings=tied)
    model, data = open_checkpoint(source), random_tokens(source)
    windows = random_tokens(source, seed=1)
    written = quantize(model, recipe, data, tmp_path / "out")
    value = apply(model, recipe, data)
    assert figures(evaluate(value, model, windows)) == figures(evaluate(written, model, windows))


@pytest.mark.parametrize("inputs", ["quantized", "reference"])
def test_writing_the_value_gives_the_bytes_of_quantize(inputs, saved, tmp_path):
    source = saved("llama")
    model, data = open_checkpoint(source), random_tokens(source)
    value = apply(model, gptq(INT4), data, inputs=inputs)
    write(value, tmp_path / "written")
    write(value, tmp_path / "again")
    quantize(model, gptq(INT4), data, tmp_path / "quantized", inputs=inputs)
    assert contents(tmp_path / "written") == contents(tmp_path / "quantized")
    assert contents(tmp_path / "again") == contents(tmp_path / "quantized")


@pytest.mark.parametrize("family", ["llama", "olmo_hybrid"])
def test_data_that_no_step_needs_changes_no_tensor(family, saved, tmp_path):
    """A program of filters over time is for one length, which is another one with data."""
    source = saved(family)
    model, data = open_checkpoint(source), random_tokens(source, 2, 24)
    write(apply(model, rtn(INT4), data), tmp_path / "with")
    write(apply(model, rtn(INT4), None), tmp_path / "without")
    with_data, without = tensors(tmp_path / "with"), tensors(tmp_path / "without")
    assert with_data.keys() == without.keys()
    assert all(torch.equal(tensor, without[name]) for name, tensor in with_data.items())


def test_the_value_gives_the_same_bits_each_time(saved):
    source = saved("mixtral")
    value = apply(open_checkpoint(source), gptq(INT4), random_tokens(source))
    first, second = list(value.segments()), list(value.segments())
    assert [path for path, _ in first] == ["model.layers.0", "model.layers.1"]
    for (_, one), (_, other) in zip(first, second):
        for name, leaf in one.params.items():
            parts, others = (
                torch.utils._pytree.tree_leaves(part) for part in (leaf, other.params[name])
            )
            assert all(torch.equal(a, b) for a, b in zip(parts, others) if a is not None)


def test_what_no_format_holds_has_figures(saved, tmp_path):
    source = saved("llama")
    model, windows = open_checkpoint(source), random_tokens(source)
    mask = each_weight("prune", prune, None)
    pruned = evaluate(apply(model, mask, None), model, windows)
    assert pruned.kl > 1e-4
    with pytest.raises(QlabError, match="rounds no weight, and gptq holds rounded ones"):
        write(apply(model, mask, None), tmp_path / "out", codec="gptq")
    int7 = parse_spec("int7-g16")
    rounded = evaluate(apply(model, chain(mask, rtn(int7)), None), model, windows)
    assert rounded.kl == pytest.approx(pruned.kl, rel=0.3)
    assert not (tmp_path / "out").exists()


def test_the_value_computes_nothing_and_shows_its_recipe(saved):
    source = saved("llama")
    value = apply(open_checkpoint(source), gptq(INT4), random_tokens(source))
    assert "gptq" in repr(value) and "int4-g16" in repr(value)
    assert f"{value.bits_per_weight:.3f} bits per weight" in repr(value)
    assert {*vars(value)} == {"job", "asked", "plan", "_skeleton"}


def test_bad_input_is_refused_before_any_work(saved, tmp_path):
    model = open_checkpoint(saved("llama"))
    with pytest.raises(QlabError, match="no calibration text"):
        apply(model, gptq(INT4), None)
    with pytest.raises(QlabError, match="groups of 48 do not divide"):
        apply(model, rtn(parse_spec("int4-g48")), None)
    with pytest.raises(QlabError, match="the budget is"):
        apply(model, rtn(INT4), None, memory=1 << 20)
    with pytest.raises(QlabError, match=r"give what qlab\.apply returns"):
        write(rtn(INT4), tmp_path / "out")
    with pytest.raises(QlabError, match="the codec 'paper' is unknown"):
        write(apply(model, rtn(INT4), None), tmp_path / "out", codec="paper")


@pytest.mark.parametrize(
    "method, family", [("gptq", "llama"), ("awq", "mixtral"), ("rtn", "qwen2"), ("gptq", "opt")]
)
def test_the_value_is_lowered_as_its_directory_is(method, family, saved, tmp_path):
    source = saved(family, BF16)
    model, data = open_checkpoint(source), random_tokens(source)
    recipe = METHODS[method](INT4)
    written = lower(quantize(model, recipe, data, tmp_path / "out"), dtype=FP32)
    lowered = lower(apply(model, recipe, data), dtype=FP32)
    ids = random_tokens(source, 2, 8).ids
    kinds = [[type(module) for module in each.modules()] for each in (lowered, written)]
    assert kinds[0] == kinds[1]
    assert torch.equal(lowered(ids).logits, written(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_mask_a_low_rank_rounded_inputs_and_a_head_are_lowered(tied, saved):
    source = saved("qwen2", BF16, tie_word_embeddings=tied)
    model, ids = open_checkpoint(source), random_tokens(source, 2, 8).ids

    def repaired(W_ok, stats, spec):
        thin = LowRank(W_ok[:, :1] * 0.1, W_ok[:1] * 0.1)
        return Sum((W_ok.bfloat16().float(), thin)), {}

    recipe = chain(
        at("*.up_proj", each_weight("prune", prune, None)),
        at("*.q_proj", each_weight("repaired", repaired, None)),
        at("*.down_proj", chain(rtn(INT8), quantize_inputs(INT8))),
        at("lm_head", outside(rtn(INT8))),
    )
    value = apply(model, recipe, None)
    lowered = lower(value, dtype=FP32)
    expected = logits(value, ids)
    assert (lowered(ids).logits - expected).norm() <= 1e-5 * expected.norm()


def test_logits_are_those_of_transformers(saved):
    source = saved("gemma2")
    ids = random_tokens(source).ids
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=FP32).eval()(ids).logits
    given = logits(open_checkpoint(source), ids)
    assert given.dtype == FP32 and given.shape == (4, 32, 128)
    assert (given - expected).norm() <= 1e-5 * expected.norm()
    with pytest.raises(QlabError, match="outside the vocabulary"):
        logits(open_checkpoint(source), [[128]])


def thin(W_ok, stats, spec):
    return LowRank(W_ok[:, :4], W_ok[:4]), {}


def turned(outputs):
    """A stage that leaves another order on the inputs, or on the outputs, of its sites."""

    def run(graph, stats):
        (site, *_) = graph.sites

        def op(x):
            return x.flip(-1)

        kind = "online_outputs" if outputs else "online"
        return dataclasses.replace(graph, **{kind: {site.path: (op,)}}), stats

    return (Stage("turned", frozenset(), run),)


@pytest.mark.parametrize(
    "family, recipe, named",
    [
        (
            "llama",
            at("*.o_proj", each_weight("thin", thin, None)),
            r"model\.layers\.0\.self_attn\.o_proj\.weight a LowRank",
        ),
        (
            "qwen2",
            at("*.down_proj", turned(True)),
            r"model\.layers\.0\.mlp\.down_proj still needs an operation on its output",
        ),
        (
            "qwen2",
            at("*.down_proj", turned(False)),
            r"model\.layers\.0\.mlp\.down_proj still needs an operation at run time",
        ),
    ],
    ids=["leaf", "output", "input"],
)
def test_what_the_format_does_not_hold_has_figures_and_is_refused_by_name_when_written(
    family, recipe, named, saved, tmp_path
):
    source = saved(family)
    model, windows = open_checkpoint(source), random_tokens(source)
    recipe = chain(at("*.up_proj", rtn(INT4)), recipe)
    value = apply(model, recipe, None)
    assert evaluate(value, model, windows).kl > 1e-4
    with pytest.raises(QlabError, match=named):
        write(value, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_insert_on_keys_is_evaluated_and_refused_by_name_when_lowered(saved):
    source = saved("llama")
    model, windows = open_checkpoint(source), random_tokens(source)
    halved = insert("halve", "*self_attn:key", lambda wire, stats: lambda x: x / 2)
    value = apply(model, chain(halved, rtn(INT4)), None)
    assert evaluate(value, model, windows).kl > 1e-4
    with pytest.raises(QlabError, match=r"model\.layers\.0\.self_attn:key still needs"):
        lower(value)
