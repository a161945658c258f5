"""Pages hold the codes of a cache that attentions round: a token becomes the numbers that the
attention makes of it, bit for bit, in batches, in parts, preempted and with pages shared."""

import pytest
import torch
from engines import PROMPTS, asked, generated, small
from families import tiny

from qlab.algebra.online import MatMul, QuantizeClipped, QuantizeInput, Subtract
from qlab.generation import cache as module
from qlab.generation.cache import Rows
from qlab.generation.sampling import Sampling
from qlab.lowering.around.attended import attend, attentions, channels_of
from qlab.methods.hadamard import hadamard
from qlab.methods.kv import parse_cache_spec

ALONE = Sampling(temperature=0, max_tokens=6, logprobs=1, stop_ids=(127,))
CASES = [
    ("llama", "int8-token-head"),
    ("llama", "int8-token-asym"),
    ("llama", "fp8-token"),
    ("llama", "fp8-tensor"),
    ("llama", "int4-g8"),
    ("llama", "int4-token-head-asym"),
    ("qwen3", "int4-head"),
    ("gemma3_text", "int8-head"),
    ("gemma3_text", "int4-token-head"),
    ("qwen3_moe", "int4-token"),
    ("gpt2", "int8-tensor"),
]


def rounding(text, heads, d):
    """As a directory has it; static scales are those of numbers up to 2, of later heads less."""
    cache_spec = parse_cache_spec(text)
    spec = cache_spec.of_heads(heads, heads * d)
    if not cache_spec.static:
        return QuantizeInput(spec)
    count = heads if cache_spec.per_head else 1
    return QuantizeInput(spec, torch.linspace(2, 1, count)[None] / spec.reach)


def rounds(family, key, value):
    """A tiny model whose attentions do operations of (heads, channels of a head) to keys and to
    values."""
    model = tiny(family).float().eval()
    ops = {}
    for name in attentions(model):
        d = channels_of(model.get_submodule(name))["key"]
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        ops[name] = {"key": key(heads, d), "value": value(heads, d)}
    attend(model, ops, torch.device("cpu"))
    return model


def rounded(family, text):
    op = lambda heads, d: (rounding(text, heads, d),)
    return rounds(family, op, op)


def told(engine):
    requests = asked(engine, sampling=ALONE)
    assert engine.pages.available == engine.pages.count
    return [[(d.token, d.logprob) for d in request.drawn] for request in requests]


def at_attentions(monkeypatch, model, **settings):
    """What an engine tells whose pages hold numbers, which attentions round in each step."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "coders_of", lambda model, shapes: {})
        return told(engine := small(model, **settings)), told(engine)


@pytest.mark.parametrize("family, text", CASES)
def test_a_token_becomes_the_numbers_that_its_attention_makes_of_it(family, text, monkeypatch):
    model = rounded(family, text)
    engine = small(model)
    layers = engine.pool.layers
    assert len(layers.coders) == 2 * len(layers.shapes)
    # the second time pages are known, and the passes that are left may have other last bits
    assert (told(engine), told(engine)) == at_attentions(monkeypatch, model)


def test_parts_rows_and_preemption_change_nothing(monkeypatch):
    model = rounded("llama", "int8-token-head")
    for settings in ({"page": 3, "chunk": 7}, {"rows": 1}, {"pages": 7, "reuse": False}):
        engine = small(model, **settings)
        assert (told(engine), told(engine)) == at_attentions(monkeypatch, model, **settings)


def test_generate_of_the_same_model_says_the_same_before_and_after():
    model = rounded("llama", "int8-token-head")
    expected = [generated(model, prompt, 6) for prompt in PROMPTS]
    assert [r.new for r in asked(small(model), sampling=ALONE)] == expected
    assert [generated(model, prompt, 6) for prompt in PROMPTS] == expected


def test_turned_centred_and_clipped_keys_are_coded_behind_it(monkeypatch):
    spec = parse_cache_spec("int4-token-head-asym")

    def ops(heads, d):
        of_heads = spec.of_heads(heads, heads * d)
        turn = MatMul((hadamard(d) / d**0.5).float())
        return turn, Subtract(torch.linspace(-1, 1, heads * d)), QuantizeClipped(of_heads, 0.9)

    model = rounds("llama", ops, lambda heads, d: ops(heads, d)[:1] + ops(heads, d)[2:])
    expected, _ = at_attentions(monkeypatch, model)
    for mine, theirs in zip(told(small(model)), expected):
        assert [token for token, _ in mine] == [token for token, _ in theirs]
        for (_, a), (_, b) in zip(mine, theirs):
            assert a == pytest.approx(b, abs=1e-3)


def test_codes_take_the_bytes_of_their_bits():
    layers = small(rounded("llama", "int4-token-head")).pool.layers
    # of a token, a layer and a head: 16 codes of 4 bits and a scale of fp32, for keys and values
    assert layers.bytes_of_token == 2 * 2 * 2 * (16 // 2 + 4)


@pytest.mark.parametrize("text", ["int4-token-head-asym", "fp8-tensor"])
def test_writing_and_reading_codes_is_one_graph(text):
    pool = small(rounded("llama", text)).pool
    table, start = torch.tensor([[3, 1], [2, 0]]), torch.tensor([2, 0])
    k, v = (torch.randn(2, 2, 3, 16, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    update = lambda k, v: Rows(pool, table, start, 3, []).update(k, v, 0)
    expected = update(k, v)
    for slots in (pool.keys[0], pool.values[0]):
        for t in slots.tensors:
            t.zero_()
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(k, v), expected))


def test_where_no_kernel_codes_new_tokens_a_warning_says_so(monkeypatch):
    monkeypatch.setattr(module, "why_not", lambda: "there is no compiler")
    with pytest.warns(
        UserWarning, match="tokens of a rounded cache are slow: there is no compiler"
    ):
        small(rounded("llama", "int8-token"))
