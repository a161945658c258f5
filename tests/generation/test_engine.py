"""What an engine says is what `generate` says: alone, in batches, in parts, preempted and with
pages shared; and every page comes back."""

import pytest
import torch
from engines import GREEDY, PROMPTS, asked, reference, small
from families import ALL, VISION, tiny
from model_folders import refused

import qlab
from qlab.generation.sampling import Sampling

FEW = ["llama", "gemma2", "qwen3_moe"]


@pytest.mark.parametrize("family", [family for family in ALL if family not in VISION])
def test_greedy_tokens_are_those_of_generate(family):
    model, expected = reference(family)
    engine = small(model)
    assert [r.new for r in asked(engine)] == expected
    assert engine.pages.available == engine.pages.count


@pytest.fixture(scope="module", params=FEW)
def known(request):
    return reference(request.param)


def test_parts_pages_and_rows_change_nothing(known):
    model, expected = known
    for settings in ({"page": 3, "chunk": 7}, {"rows": 1}, {"chunk": 64, "step_tokens": 3}):
        engine = small(model, **settings)
        assert [r.new for r in asked(engine)] == expected


def test_what_was_preempted_goes_on_as_if_nothing_had_happened(known, monkeypatch):
    model, expected = known
    preempted = []
    engine = small(model, pages=9, reuse=False)
    give_back = engine._give_back
    monkeypatch.setattr(engine, "_give_back", lambda r: (preempted.append(r.finish), give_back(r)))
    assert [r.new for r in asked(engine)] == expected
    assert None in preempted and engine.pages.available == engine.pages.count


def test_prompts_that_begin_alike_share_pages(known):
    model, expected = known
    engine = small(model)
    assert [r.cached for r in asked(engine)] == [0, 0, 0, 0]
    again = asked(engine)
    assert [r.new for r in again] == expected
    assert [r.cached for r in again] == [8, 0, 16, 0]


def test_logits_of_a_step_are_those_of_a_plain_pass(known):
    """Also of a prompt, whose log-probabilities no cached page takes away."""
    model, _ = known
    engine = small(model)
    sampling = Sampling(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1)
    for _ in range(2):
        for request in asked(engine, sampling=sampling):
            with torch.no_grad():
                logits = model(torch.tensor([request.tokens])).logits[0]
            expected = logits.log_softmax(-1)[:-1].gather(
                1, torch.tensor(request.tokens[1:])[:, None]
            )
            told = [d.logprob for d in (*request.prompt_drawn, *request.drawn)]
            assert torch.allclose(torch.tensor(told), expected[:, 0], atol=1e-4)
            best = logits[-2].log_softmax(-1).topk(2)
            assert [token for token, _ in request.drawn[-1].likeliest] == best.indices.tolist()


def test_a_seed_says_the_same_alone_and_beside_others(known):
    model, _ = known
    sampling = [Sampling(temperature=0.9, top_p=0.95, seed=i, max_tokens=8) for i in range(6)]
    together = small(model)
    requests = [together.submit(PROMPTS[i % 4], s) for i, s in enumerate(sampling)]
    together.run()
    for i, request in enumerate(requests):
        alone = small(model, rows=1)
        again = alone.submit(PROMPTS[i % 4], sampling[i])
        alone.run()
        assert again.new == request.new


@pytest.mark.parametrize("activations", [None, "int8", "dense"])
def test_in_bfloat16_a_request_has_the_same_bits_alone_and_beside_others(
    activations, saved, tmp_path
):
    if activations == "dense":
        model = tiny("llama").to(torch.bfloat16).eval()
    else:
        qlab.quantize(saved("llama"), qlab.rtn("int4-g32"), None, tmp_path / "out")
        model = qlab.lower(tmp_path / "out", activations=activations)
    sampling = Sampling(temperature=0, max_tokens=8, logprobs=1)
    together = asked(small(model, reuse=False), sampling=sampling)
    for prompt, expected in zip(PROMPTS, together):
        (alone,) = asked(small(model, reuse=False), [prompt], sampling)
        assert alone.drawn == expected.drawn


@pytest.mark.parametrize("steps", range(6))
def test_what_is_cancelled_anywhere_gives_its_pages_back(steps):
    model, expected = reference("llama")
    engine = small(model, step_tokens=5)
    requests = [engine.submit(prompt, GREEDY) for prompt in PROMPTS]
    for _ in range(steps):
        engine.step()
    requests[2].cancel()
    engine.run()
    assert requests[2].finish == "abort" and len(requests[2].new) < 12
    assert [r.new for r in requests if r is not requests[2]] == [*expected[:2], expected[3]]
    assert engine.pages.available == engine.pages.count


def test_a_step_that_fails_ends_the_guilty_request_alone(monkeypatch):
    """In the middle of its prompt, and as one row of several."""
    model, expected = reference("llama")
    for poison in (PROMPTS[2][7], expected[0][3]):
        engine = small(model)
        forward = model.forward

        def failing(ids, forward=forward, poison=poison, **more):
            if (ids == poison).any():
                raise RuntimeError("boom")
            return forward(ids, **more)

        monkeypatch.setattr(model, "forward", failing)
        requests = asked(engine)
        monkeypatch.setattr(model, "forward", forward)
        guilty = {i for i, r in enumerate(requests) if poison in (r.prompt + r.new)}
        assert {i for i, r in enumerate(requests) if r.finish == "error"} == guilty != set()
        assert all("boom" in str(requests[i].error) for i in guilty)
        assert all(
            r.new == e for i, (r, e) in enumerate(zip(requests, expected)) if i not in guilty
        )
        assert engine.pages.available == engine.pages.count


def test_a_cache_takes_a_quarter_of_the_memory_that_is_free(monkeypatch):
    model, expected = reference("llama")
    page = 4 * 2 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, channels, bytes
    monkeypatch.setattr("qlab.generation.engine.free_bytes", lambda device: 4 * 10 * page)
    engine = small(model, pages=None)
    assert engine.pages.count == 10 and engine.pool.nbytes() == 11 * page
    assert [r.new for r in asked(engine)] == expected


def test_what_cannot_be_answered_is_refused_before_it_waits():
    model, _ = reference("llama")
    engine = small(model, pages=8)
    refused(lambda: engine.submit([], GREEDY), "no tokens")
    refused(lambda: engine.submit([128], GREEDY), "128", "vocabulary of 128")
    refused(lambda: engine.submit([-1], GREEDY), "-1")
    bias = Sampling(logit_bias={500: 1.0})
    refused(lambda: engine.submit([5], bias), "500")
    refused(lambda: engine.submit([5] * 21, GREEDY), "21", "12", "33", "at most 32")
    refused(lambda: small(model, max_length=129), "129", "1 to 128")
    refused(lambda: small(model, rows=0), "rows is 0")
    assert engine.is_idle
