"""The server to OpenAI's own client, to clients that send nonsense, and to those that leave."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
import servers
import torch
from model_folders import prose
from ports import free_port
from servers import PATIENCE, get, idle, post, served

import qlab
from qlab.generation.parallel import GroupEnded

TEXT = prose(5)
GREEDY = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def directory(saved, tmp_path_factory):
    out = tmp_path_factory.mktemp("served") / "out"
    qlab.quantize(saved("llama"), qlab.rtn("int8-channel"), None, out)
    return out


@pytest.fixture(scope="module")
def server(directory):
    with served(directory) as server:
        yield server


@pytest.fixture(scope="module")
def pipe(directory):
    with qlab.pipeline(directory, dtype=torch.float32) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def _every_page_comes_back(server):
    yield
    assert idle(server)


# ------------------------------------------------------------------ OpenAI's client
def test_completions_of_texts_and_ids_are_the_pipelines(client, pipe):
    expected = pipe(TEXT, temperature=0, max_tokens=6)
    both = client.completions.create(prompt=[TEXT, "word3"], max_tokens=6, n=2, **GREEDY)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == expected.text
    assert both.choices[0].finish_reason == expected.finish
    assert both.usage.prompt_tokens == expected.prompt_tokens + 1
    ids = client.completions.create(prompt=pipe.ids(TEXT), max_tokens=6, **GREEDY)
    assert ids.choices[0].text == expected.text
    assert client.completions.create(prompt=TEXT, **GREEDY).usage.completion_tokens <= 16


def test_a_stream_is_the_reply_in_pieces_with_its_usage(client, pipe):
    whole = client.completions.create(prompt=TEXT, max_tokens=12, **GREEDY)
    word = whole.choices[0].text.split()[3]
    for stop in (None, [word]):
        more = {"prompt": TEXT, "max_tokens": 12, "stop": stop, **GREEDY}
        whole = client.completions.create(**more)
        stream = client.completions.create(
            **more, stream=True, stream_options={"include_usage": True}
        )
        *pieces, last = list(stream)
        assert "".join(p.choices[0].text for p in pieces) == whole.choices[0].text
        assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert last.choices == [] and last.usage == whole.usage
    assert word not in whole.choices[0].text


def test_an_echo_has_the_log_probabilities_of_the_prompt(client, pipe):
    more = {"prompt": TEXT, "max_tokens": 2, "echo": True, "logprobs": 2, **GREEDY}
    choice = client.completions.create(**more).choices[0]
    reply = pipe(TEXT, temperature=0, max_tokens=2, logprobs=2, prompt_logprobs=2)
    expected = [d.logprob for d in (*reply.prompt_drawn, *reply.drawn)]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert choice.text.startswith(TEXT) and len(choice.logprobs.top_logprobs[1]) == 2
    streamed = list(client.completions.create(**more, stream=True))
    assert "".join(s.choices[0].text for s in streamed) == choice.text


def test_chats_stream_seeds_and_schemas(client, pipe):
    said = [{"role": "system", "content": "word1"}, {"role": "user", "content": TEXT}]
    more = {"model": "tiny", "messages": said, "max_tokens": 8}
    whole = client.chat.completions.create(**more, temperature=0, logprobs=True, top_logprobs=2)
    expected = pipe(said, temperature=0, max_tokens=8)
    message = whole.choices[0]
    assert message.message.content == expected.text and message.message.role == "assistant"
    assert len(message.logprobs.content) == len(expected.tokens)
    assert all(len(token.top_logprobs) == 2 for token in message.logprobs.content)
    drawn = [
        client.chat.completions.create(**more, temperature=1.5, seed=3).choices[0].message.content
        for _ in range(2)
    ]
    stream = list(client.chat.completions.create(**more, temperature=1.5, seed=3, stream=True))
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(s.choices[0].delta.content for s in stream) == drawn[0] == drawn[1]


def test_many_at_once_get_their_own(server, pipe):
    prompts = [prose(2 + i % 5, seed=i) for i in range(24)]
    expected = [reply.text for reply in pipe(prompts, temperature=0, max_tokens=8)]

    async def one(client, i):
        more = {"prompt": prompts[i], "max_tokens": 8, **GREEDY}
        if i % 3:
            return (await client.completions.create(**more)).choices[0].text
        stream = await client.completions.create(**more, stream=True)
        return "".join([piece.choices[0].text async for piece in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            return await asyncio.gather(*[one(client, i) for i in range(len(prompts))])

    assert asyncio.run(all_of_them()) == expected


def test_models_tokens_metrics_and_the_page(server, pipe):
    get = lambda path: servers.get(server.url + path)
    assert get("/v1/models").json()["data"][0]["id"] == "tiny"
    ids = post(f"{server.url}/tokenize", json={"prompt": TEXT}).json()["tokens"]
    assert ids == pipe.ids(TEXT)
    assert post(f"{server.url}/detokenize", json={"tokens": ids}).json() == {"prompt": TEXT}
    before = _metrics(get)
    post(f"{server.url}/v1/completions", json={"prompt": ids, "max_tokens": 3, "temperature": 0})
    after = _metrics(get)
    assert after["qlab_new_tokens_total"] - before["qlab_new_tokens_total"] == 3
    assert after["qlab_pages_free"] == after["qlab_pages"]
    assert [get(path).status_code for path in ("/health", "/ready", "/docs")] == [200] * 3
    server.is_draining = True  # it computes, and lets nobody in
    try:
        assert [get(path).status_code for path in ("/health", "/ready")] == [200, 503]
        assert post(f"{server.url}/v1/completions", json=OK).status_code == 503
    finally:
        server.is_draining = False
    assert "<title>qlab</title>" in get("/").text


def _metrics(get):
    lines = [line.split() for line in get("/metrics").text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in lines}


# ------------------------------------------------------------------ clients that send nonsense
OK = {"prompt": "word1", "max_tokens": 2, "temperature": 0}
BAD = {
    "no JSON": b"{",
    "no object": b"[1]",
    "nothing": b"",
    "no prompt": {"max_tokens": 2},
    "empty prompt": OK | {"prompt": ""},
    "empty list": OK | {"prompt": []},
    "list of an empty list": OK | {"prompt": [[]]},
    "no tokens": OK | {"max_tokens": 0},
    "negative tokens": OK | {"max_tokens": -1},
    "too many tokens": OK | {"max_tokens": 10**9},
    "tokens that do not fit": OK | {"max_tokens": 1000},
    "no choices": OK | {"n": 0},
    "negative choices": OK | {"n": -1},
    "too many choices": OK | {"n": 10**6},
    "negative temperature": OK | {"temperature": -1},
    "temperature NaN": b'{"prompt":"a","max_tokens":2,"temperature":NaN}',
    "top_p 0": OK | {"top_p": 0},
    "top_k -1": OK | {"top_k": -1},
    "empty stop": OK | {"stop": ""},
    "negative logprobs": OK | {"logprobs": -1},
    "too many logprobs": OK | {"logprobs": 10**6},
    "seed too large": OK | {"seed": 2**70},
    "negative seed": OK | {"seed": -1},
    "lone surrogate": b'{"prompt":"\\ud800","max_tokens":2}',
    "bias outside the vocabulary": OK | {"logit_bias": {"999999": 1}},
    "bias NaN": b'{"prompt":"a","max_tokens":2,"logit_bias":{"1":NaN}}',
    "repetition 0": OK | {"repetition_penalty": 0},
    "negative id": OK | {"prompt": [1, -1]},
    "id outside the vocabulary": OK | {"prompt": [1, 10**6]},
    "unknown field": OK | {"nonsense": 1},
    "more least tokens than most": OK | {"min_tokens": 5},
    "text for a number": OK | {"max_tokens": "many"},
}


@pytest.mark.parametrize("name", BAD)
def test_nonsense_is_a_4xx_of_openais_form_and_the_next_one_is_answered(server, name):
    body = BAD[name]
    sent = {"json": body} if isinstance(body, dict) else {"content": body}
    headers = {"content-type": "application/json"}
    answer = post(f"{server.url}/v1/completions", headers=headers, **sent)
    assert 400 <= answer.status_code < 500, answer.text
    assert {*answer.json()["error"]} == {"message", "type", "param", "code"}
    assert answer.json()["error"]["message"].isprintable()
    assert post(f"{server.url}/v1/completions", json=OK).status_code == 200


def test_other_doors_refuse_too(server):
    post = lambda path, body: servers.post(server.url + path, json=body).status_code
    chat = {"messages": [{"role": "user", "content": "word1"}], "max_tokens": 2}
    assert post("/v1/completions", OK | {"model": "other"}) == 404
    assert post("/v1/chat/completions", chat | {"messages": []}) == 400
    assert post("/v1/chat/completions", chat | {"functions": []}) == 400
    bad = {"type": "json_schema"}
    assert post("/v1/chat/completions", chat | {"response_format": bad}) == 400
    assert post("/detokenize", {"tokens": [10**6]}) == 400
    assert get(f"{server.url}/nowhere").status_code == 404
    huge = servers.post(f"{server.url}/v1/completions", content=b"x" * (2**25 + 1))
    assert huge.status_code == 413


def test_the_page_of_the_document_loads_nothing_from_elsewhere(directory):
    with served(directory, keys=["sesame"]) as server:
        page = get(f"{server.url}/docs").text
        loaded = re.findall(r'(?:src|href)="([^"]*)"', page) + re.findall(r"url: '([^']*)'", page)
        assert len(loaded) == 4 and "//" not in "".join(loaded)
        assert [get(server.url + path).status_code for path in loaded] == [200] * 4


# ------------------------------------------------------------------ clients that leave, and limits
def aborted(server):
    """How many replies ended because nobody wanted them."""
    read = _metrics(lambda path: get(server.url + path))
    return read.get('qlab_requests_total{finish="abort"}', 0)


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_ends_what_is_computed_for_it(server, stream, monkeypatch):
    engine, before, leaves = server.worker.pipe.engine, aborted(server), threading.Event()
    step = engine.step
    # none before it leaves, and then so slow that the server hears of it before the last
    monkeypatch.setattr(engine, "step", lambda: (leaves.wait(), time.sleep(0.1), step()))
    body = {"prompt": "word1", "max_tokens": 120, "ignore_eos": True, "stream": stream}

    async def leave():
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            request = client.build_request("POST", f"{server.url}/v1/completions", json=body)
            sending = asyncio.create_task(client.send(request, stream=True))
            while not server.worker.answers:
                await asyncio.sleep(0.01)
            sending.cancel()

    try:
        asyncio.run(leave())
    finally:
        leaves.set()
    assert idle(server) and aborted(server) == before + 1


def test_a_full_queue_and_a_key(directory):
    with served(directory, queue_tokens=130, keys=["sesame"]) as server:
        url, key = f"{server.url}/v1/completions", {"Authorization": "Bearer sesame"}
        assert post(url, json=OK).status_code == 401
        assert post(url, json=OK, headers={"Authorization": "Bearer no"}).status_code == 401
        assert get(f"{server.url}/health").status_code == 200
        assert post(url, json=OK, headers=key).status_code == 200
        long = OK | {"max_tokens": 100, "ignore_eos": True, "n": 2}
        full = post(url, json=long, headers=key)
        assert full.status_code == 429 and full.headers["retry-after"] and idle(server)


def test_what_takes_longer_than_the_timeout_is_ended(directory):
    with served(directory, timeout=0.2) as server:
        step = server.worker.pipe.engine.step
        server.worker.pipe.engine.step = lambda: (time.sleep(0.1), step())
        body = OK | {"max_tokens": 100, "ignore_eos": True}
        slow = post(f"{server.url}/v1/completions", json=body)
        assert slow.status_code == 408 and idle(server)


def test_a_reply_that_ends_before_its_answer_is_noted_is_sent(directory, monkeypatch):
    with served(directory) as server:
        ask = server.worker.pipe.ask

        def late(*arguments, **settings):
            asked = ask(*arguments, **settings)
            while asked.request.finish is None:
                time.sleep(0.01)
            return asked

        monkeypatch.setattr(server.worker.pipe, "ask", late)
        for stream in (False, True):
            answer = post(f"{server.url}/v1/completions", json=OK | {"stream": stream})
            assert answer.status_code == 200 and "finish_reason" in answer.text


def test_a_step_that_fails_is_an_error_and_the_next_one_is_answered(directory):
    with served(directory) as server:
        url, engine = f"{server.url}/v1/completions", server.worker.pipe.engine
        step, forward = engine.step, engine.model.forward
        for kind in ("model", "step"):
            if kind == "model":
                engine.model.forward = _boom
            else:
                engine.step = _boom
            answer = post(url, json=OK)
            assert answer.status_code == 500 and "boom" in answer.json()["error"]["message"]
            streamed = post(url, json=OK | {"stream": True}).text
            assert json.loads(streamed.splitlines()[0][6:])["error"]["type"] == "server_error"
            engine.step, engine.model.forward = step, forward
            assert post(url, json=OK).status_code == 200


def test_ranks_that_are_gone_leave_nobody_waiting(directory):
    with served(directory) as server:
        url, over = f"{server.url}/v1/completions", threading.Event()
        server.worker.on_end = over.set
        server.worker.pipe.engine.forward = _gone
        answer = post(url, json=OK)
        assert answer.status_code == 500 and "rank 1 is gone" in answer.json()["error"]["message"]
        assert over.wait(300) and "rank 1" in str(server.worker.ended) and idle(server)
        assert get(f"{server.url}/health").status_code == 503
        assert post(url, json=OK).status_code == 503


def _gone(*_, **__):
    raise GroupEnded("rank 1 is gone")


def _boom(*_, **__):
    raise RuntimeError("boom")


def test_the_command_serves_drains_and_ends_well(directory):
    port = free_port()
    command = [sys.executable, "-m", "qlab", "serve", directory, "--port", port]
    more = ["--drain-timeout", "0.5", "--dtype", "float32", "--activations", "none"]
    process = subprocess.Popen([*map(str, command), *more], stderr=subprocess.PIPE, text=True)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 600
        while not _answers(url):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.1)
        body = OK | {"max_tokens": 120, "ignore_eos": True, "stream": True, "n": 8}
        asked = httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE)
        with asked as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data: {")]
        ends = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest]
        assert len([e for e in ends if e in ("length", "abort")]) == 8
        assert process.wait(300) == 0
    finally:
        process.kill()


def _answers(url):
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.HTTPError:
        return False
