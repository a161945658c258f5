"""Prompts with images: the tokens of `generate`, whatever runs beside them, by the models' own
positions; in chats, by the models' own processors."""

import pytest
from engines import asked, generated, small
from families import VISION, tiny
from pictures import pictured
from transformers import GenerationConfig

from qlab.generation.sampling import Sampling

SEVEN = Sampling(temperature=0, max_tokens=7)
SEVEN_NEW = GenerationConfig(max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=999)
TEXT = [7, 8, 9, 10]


def parted(sample):
    """Token ids, and what stands beside them."""
    rest = {name: value for name, value in sample.items() if name != "input_ids"}
    return sample["input_ids"][0].tolist(), rest


@pytest.fixture(scope="module", params=VISION)
def seen(request):
    """A model, prompts of which two differ in their image alone, and what `generate` says."""
    family = request.param
    samples = [pictured(family, seed) for seed in (1, 2)]
    samples.append(samples[0] | {"pixel_values": -samples[0]["pixel_values"]})
    model = tiny(family)
    replies = [model.generate(**s, generation_config=SEVEN_NEW)[0] for s in samples]
    expected = [r[s["input_ids"].shape[1] :].tolist() for r, s in zip(replies, samples)]
    assert expected[0] != expected[2]
    return tiny(family), [parted(s) for s in samples], [*expected, generated(model, TEXT, 7)]


@pytest.mark.parametrize("pages", [64, 12])
def test_greedy_tokens_are_those_of_generate_also_where_it_begins_anew(seen, pages, monkeypatch):
    model, prompts, expected = seen
    engine = small(model, pages=pages, max_length=40)
    anew, give_back = [], engine._give_back
    monkeypatch.setattr(
        engine, "_give_back", lambda r: (anew.append(r.finish is None), give_back(r))
    )
    requests = [engine.submit(ids, SEVEN, inputs=rest) for ids, rest in prompts]
    requests += [engine.submit(TEXT, SEVEN)]
    engine.run()
    assert [request.new for request in requests] == expected
    assert any(anew) == (pages == 12) and engine.pages.available == pages


def test_pages_of_an_image_are_nobody_elses(seen):
    model, prompts, _ = seen
    engine = small(model)
    (ids, rest), _, _ = prompts
    for _ in range(2):
        request = engine.submit(ids, SEVEN, inputs=rest)
        engine.run()
        assert request.cached == 0
    asked(engine, [TEXT * 3, TEXT * 3])
    assert asked(engine, [TEXT * 3])[0].cached == 8  # text finds its own


def test_positions_that_a_model_does_not_name_end_the_request_by_name(monkeypatch):
    model = tiny("qwen2_vl")
    monkeypatch.delattr(type(model.base_model), "get_rope_index")
    engine = small(model)
    ids, rest = parted(pictured("qwen2_vl", 1))
    request = engine.submit(ids, SEVEN, inputs=rest)
    engine.run()
    assert "Qwen2VLForConditionalGeneration" in str(request.error)
