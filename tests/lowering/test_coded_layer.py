"""The cache of `generate()` holds codes where a model rounds keys and values: the same numbers as
attentions make of a cache of numbers."""

import copy
import pickle

import pytest
import torch
from families import tiny
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from qlab.algebra.online import QuantizeInput
from qlab.lowering.around.attended import attend, attentions, channels_of
from qlab.lowering.around.coded_layer import CodedLayer
from qlab.methods.kv import parse_cache_spec

IDS = torch.arange(3, 27).reshape(2, 12)
CASES = [
    ("llama", "int8-token-head"),
    ("llama", "int4-token-asym"),
    ("qwen3", "fp8-token"),
    ("gemma3_text", "int8-token-head"),
    ("gpt2", "int8-token"),
]


class OfNumbers(DynamicCache):
    """A cache that holds no codes."""


def rounded(family, text):
    model = tiny(family).float().eval()
    cache_spec, ops = parse_cache_spec(text), {}
    for name in attentions(model):
        d = channels_of(model.get_submodule(name))["key"]
        heads = getattr(model.config, "num_key_value_heads", None)
        heads = heads or model.config.num_attention_heads
        op = QuantizeInput(cache_spec.of_heads(heads, heads * d))
        ops[name] = {"key": (op,), "value": (op,)}
    attend(model, ops, torch.device("cpu"))
    return model


def generated(model, cache=None, **how):
    config = GenerationConfig(
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=127,
        return_dict_in_generate=True,
        output_logits=True,
        **how,
    )
    return model.generate(IDS, generation_config=config, cache=cache)


@pytest.mark.parametrize("family, text", CASES)
def test_generate_says_what_it_says_with_a_cache_of_numbers(family, text):
    model = rounded(family, text)
    coded = generated(model)
    expected = generated(model, OfNumbers(config=model.config))
    assert torch.equal(coded.sequences, expected.sequences)
    assert all(map(torch.equal, coded.logits, expected.logits))
    layers = coded.cache.layers
    layers = [layer for layer in layers if not layer.is_sliding]
    assert layers and all(isinstance(layer, CodedLayer) for layer in layers)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    d = channels_of(model.get_submodule(attentions(model)[0]))["key"]
    numbers = 2 * len(IDS) * layers[0].get_seq_length() * heads * d
    assert layers[0].nbytes() < 1.6 * numbers


def test_beams_static_caches_and_copies_of_the_model_say_the_same():
    model = rounded("llama", "int8-token-head")
    beams = generated(model, num_beams=3)
    expected = generated(model, OfNumbers(config=model.config), num_beams=3)
    assert torch.equal(beams.sequences, expected.sequences)
    expected = generated(model).sequences
    assert torch.equal(generated(model, cache_implementation="static").sequences, expected)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(generated(again).sequences, expected)


def test_a_cropped_layer_goes_on_as_if_nothing_had_come_behind():
    model = rounded("llama", "int4-token-asym")
    cache, more = DynamicCache(config=model.config), IDS[:, 6:]
    with torch.no_grad():
        model(IDS[:, :6], past_key_values=cache, use_cache=True)
        first = model(more, past_key_values=cache, use_cache=True).logits
        cache.crop(-more.shape[1])
        assert cache.get_seq_length() == 6
        assert torch.equal(model(more, past_key_values=cache, use_cache=True).logits, first)


def test_a_cache_that_holds_numbers_already_goes_on_holding_them():
    model = rounded("llama", "int8-token-head")
    cache = OfNumbers(config=model.config)
    with torch.no_grad():
        model(IDS[:, :6], past_key_values=cache, use_cache=True)
        begun = DynamicCache(config=model.config)
        begun.layers = copy.deepcopy(cache.layers)
        rest = model(IDS[:, 6:], past_key_values=begun, use_cache=True).logits
        assert not any(isinstance(layer, CodedLayer) for layer in begun.layers)
        expected = model(IDS[:, 6:], past_key_values=cache, use_cache=True).logits
    assert torch.equal(rest, expected)
