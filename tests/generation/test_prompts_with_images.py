"""Prompts with images: the tokens of `generate`, whatever runs beside them, by the models' own
positions; in chats, by the models' own processors."""

import sys

import pytest
import torch
from engines import asked, generated, small
from families import VISION, tiny
from model_folders import refused
from pictures import pictured
from transformers import AutoModelForImageTextToText, GenerationConfig

import qlab
from qlab.data.images import image_samples
from qlab.generation.images import part_of
from qlab.generation.sampling import Sampling
from qlab.generation.talk import Talk

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


# ------------------------------------------------------------------ chats
def chat(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "word5 word6"}]}]


def shown(path):
    return {"type": "image", "path": str(path)}


@pytest.fixture
def pipe(llava):
    with qlab.pipeline(llava, dtype=torch.float32) as pipe:
        yield pipe


def test_a_chat_is_what_its_own_processor_makes_of_it(pipe, llava):
    reply = pipe(chat(shown(llava / "1.png")), temperature=0, max_tokens=7)
    sample = image_samples(qlab.open(llava), [llava / "samples.jsonl"], samples=3).inputs
    (same,) = [s for s in sample if s["input_ids"].shape[1] == reply.prompt_tokens]
    model = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32).eval()
    expected = model.generate(**same, generation_config=SEVEN_NEW)[0, reply.prompt_tokens :]
    assert [*reply.tokens] == expected.tolist()
    part = part_of(llava / "1.png")
    assert part["image_url"]["url"].startswith("data:image/png;base64,")
    same, other = pipe([chat(part), chat(shown(llava / "0.png"))], temperature=0, max_tokens=7)
    assert same.tokens == reply.tokens != other.tokens
    text = pipe(chat(), temperature=0, max_tokens=7)
    assert text == pipe("word5 word6", temperature=0, max_tokens=7)


def test_a_quantized_model_sees_too(llava, tmp_path):
    qlab.quantize(llava, qlab.rtn("int8-channel"), None, tmp_path / "out")
    with qlab.pipeline(tmp_path / "out", dtype=torch.float32) as pipe:
        replies = pipe([chat(shown(llava / f"{i}.png")) for i in range(2)], max_tokens=7)
    assert replies[0].tokens != replies[1].tokens and replies[0].prompt_tokens > 4


def test_what_is_no_image_is_refused_by_name(pipe, llava, tmp_path, monkeypatch):
    from PIL import Image

    path = tmp_path / "no.png"
    url = lambda url: {"type": "image_url", "image_url": {"url": url}}
    refused(lambda: pipe(chat(shown(path))), "no.png", "No such file")
    path.write_bytes(b"no image")
    refused(lambda: pipe(chat(shown(path))), "no.png", "PNG")
    path.write_bytes((llava / "1.png").read_bytes()[:200])
    refused(lambda: pipe(chat(shown(path))), "no.png", "cannot be read")
    refused(lambda: pipe(chat(url("https://a/b.png"))), "https://a/b.png", "data")
    refused(lambda: pipe(chat(url("data:image/png;base64,*"))), "base64")
    refused(lambda: pipe(chat({"type": "video"})), "video", "image_url")
    refused(lambda: pipe(chat(*[shown(llava / "1.png")] * 17)), "at most 16")
    Image.new("1", (2**13, 2**12)).save(path)
    refused(lambda: pipe(chat(shown(path))), "8192 x 4096", "pixels")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    refused(lambda: pipe(chat(shown(llava / "1.png"))), "qlab[images]")


def test_a_model_of_text_reads_parts_of_text_and_refuses_images(saved, llava):
    with qlab.pipeline(saved("llama"), dtype=torch.float32) as pipe:
        refused(lambda: pipe(chat(shown(llava / "1.png"))), "takes no images")
        plain = pipe([{"role": "user", "content": "word5 word6"}], max_tokens=3)
        assert pipe(chat(), max_tokens=3) == plain


def test_a_talk_shows_images_and_keeps_them(pipe, llava, tmp_path):
    talk = Talk(pipe=pipe, settings={"max_tokens": 3, "temperature": 0})
    refused(lambda: talk.command(f"/image {tmp_path / 'no.png'}"), "no.png")
    assert ": 1" in talk.command(f"/image {llava / '1.png'}")
    seen = "".join(talk.reply("word5 word6"))
    assert seen == pipe(chat(shown(llava / "1.png")), temperature=0, max_tokens=3).text
    assert talk.pictures == [] and talk.messages[0]["content"][0]["type"] == "image_url"
    talk.command(f"/save {tmp_path / 'talk.json'}")
    again = Talk(pipe=pipe, settings=talk.settings)
    again.command(f"/load {tmp_path / 'talk.json'}")
    assert list(again.reply("word7")) == list(talk.reply("word7"))
