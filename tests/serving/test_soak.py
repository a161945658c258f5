"""Many clients at once, of which most do what nobody should: nothing is lost, nobody reads the
tokens of another, and all pages come back."""

import asyncio
import json
import random

import httpx
import pytest
import torch
from model_folders import prose
from servers import idle, served

import qlab

CLIENTS, EACH, TOKENS = 32, 4, 10
PROMPTS = [prose(2 + i % 7, seed=i % 5) + f" word{i}" for i in range(12)]


def body(i, **more):
    return {"prompt": PROMPTS[i], "max_tokens": TOKENS, "temperature": 0, **more}


async def whole(client, i, expected):
    answer = await client.post("/v1/completions", json=body(i))
    assert answer.json()["choices"][0]["text"] == expected[i]


async def streamed(client, i, expected, pause=0.0, most=10**6):
    """A stream that is read slowly, or left after some events."""
    text = ""
    async with client.stream("POST", "/v1/completions", json=body(i, stream=True)) as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                most -= 1
                await asyncio.sleep(pause)
            if most == 0:
                assert expected[i].startswith(text)
                return
    assert text == expected[i]


async def slow(client, i, expected):
    await streamed(client, i, expected, pause=0.02)


async def left(client, i, expected):
    await streamed(client, i, expected, most=1 + i % 4)


async def dropped(client, i, expected):
    with pytest.raises(httpx.TimeoutException):
        await client.post("/v1/completions", json=body(i), timeout=0.001 * (1 + i))


async def too_long(client, i, expected):
    answer = await client.post("/v1/completions", json=body(i, max_tokens=1000))
    assert answer.status_code == 400


async def nonsense(client, i, expected):
    assert (await client.post("/v1/completions", content=b'{"prompt"')).status_code == 400


KINDS = [whole, whole, streamed, slow, left, dropped, too_long, nonsense]


async def soak(url, expected):
    async def one(number):
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            for _ in range(EACH):
                kind, i = draw.choice(KINDS), draw.randrange(len(PROMPTS))
                try:
                    await kind(client, i, expected)
                except pytest.fail.Exception:
                    assert kind is dropped  # it was answered before it was dropped

    await asyncio.gather(*[one(number) for number in range(CLIENTS)])


def test_nothing_is_lost_among_clients_that_cancel_wait_and_send_nonsense(saved, tmp_path):
    qlab.quantize(saved("llama"), qlab.rtn("int8-channel"), None, tmp_path / "out")
    with qlab.pipeline(tmp_path / "out", dtype=torch.float32) as pipe:
        replies = pipe(PROMPTS, temperature=0, max_tokens=TOKENS)
    with served(tmp_path / "out") as server:
        asyncio.run(soak(server.url, [reply.text for reply in replies]))
        assert idle(server)
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        ended = [line for line in lines if line.startswith("qlab_requests_total")]
        assert ended and not [line for line in ended if "error" in line]
        assert httpx.post(f"{server.url}/v1/completions", json=body(0)).status_code == 200
