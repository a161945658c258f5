"""Many clients at once, of which most do what nobody should: nothing is lost, nobody reads the
tokens of another, and all pages come back."""

import asyncio
import gc
import json
import random
from collections import Counter

import httpx
import psutil
import pytest
import torch
from model_folders import prose
from servers import PATIENCE, get, idle, post, served

import qlab

CLIENTS, EACH, TOKENS = 32, 2, 10
PROMPTS = [prose(2 + i % 7, seed=i % 5) + f" word{i}" for i in range(12)]


def body(i, **more):
    return {"prompt": PROMPTS[i], "max_tokens": TOKENS, "temperature": 0, **more}


async def whole(client, i, expected):
    """Each kind of client says how many new tokens it read of a whole reply, or None."""
    answer = (await client.post("/v1/completions", json=body(i))).json()
    assert answer["choices"][0]["text"] == expected[i]
    return answer["usage"]["completion_tokens"]


async def streamed(client, i, expected, pause=0.0, most=10**6):
    """A stream that is read slowly, or left after some events."""
    text, tokens = "", None
    asked = body(i, stream=True, stream_options={"include_usage": True})
    async with client.stream("POST", "/v1/completions", json=asked) as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                text += "".join(choice["text"] for choice in event["choices"])
                tokens = event["usage"] and event["usage"]["completion_tokens"]
                most -= 1
                await asyncio.sleep(pause)
            if most == 0:
                assert expected[i].startswith(text)
                return None
    assert text == expected[i]
    return tokens


async def slow(client, i, expected):
    return await streamed(client, i, expected, pause=0.02)


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


async def soak(url, expected, seed):
    """(clients of each kind, the new tokens of each reply that was read to its end)."""
    kinds, read = Counter(), []

    async def one(number):
        draw = random.Random(f"{seed} {number}")
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            for _ in range(EACH):
                kind, i = draw.choice(KINDS), draw.randrange(len(PROMPTS))
                kinds[kind] += 1
                try:
                    read.append(await kind(client, i, expected))
                except pytest.fail.Exception:
                    assert kind is dropped  # it was answered before it was dropped

    await asyncio.gather(*[one(number) for number in range(CLIENTS)])
    return kinds, [tokens for tokens in read if tokens is not None]


def counted(url):
    """The server's counters."""
    lines = get(f"{url}/metrics").text.splitlines()
    return {n: float(v) for n, v in (line.split() for line in lines if line[0] != "#")}


def ended(counters, *finishes):
    """How many replies ended in one of these ways."""
    return sum(counters.get(f'qlab_requests_total{{finish="{f}"}}', 0) for f in finishes)


def test_nothing_is_lost_among_clients_that_cancel_wait_and_send_nonsense(saved, tmp_path):
    qlab.quantize(saved("llama"), qlab.rtn("int8-channel"), None, tmp_path / "out")
    with qlab.pipeline(tmp_path / "out", dtype=torch.float32) as pipe:
        replies = pipe(PROMPTS, temperature=0, max_tokens=TOKENS)
    with served(tmp_path / "out") as server:
        expected, memory = [reply.text for reply in replies], []
        for seed in range(3):
            before = counted(server.url)
            kinds, read = asyncio.run(soak(server.url, expected, seed))
            assert idle(server)
            after = counted(server.url)
            gc.collect()
            memory.append(psutil.Process().memory_info().rss)
            new = {name: after[name] - before.get(name, 0) for name in after}
            # what was left or dropped may have ended in either way, or not have come to the door
            unsure = kinds[left] + kinds[dropped]
            assert ended(new, "error") == 0
            assert len(read) <= ended(new, "stop", "length") <= len(read) + unsure
            assert ended(new, "stop", "length", "abort") <= len(read) + unsure
            assert sum(read) <= new["qlab_new_tokens_total"] <= sum(read) + unsure * TOKENS
        assert memory[2] <= 1.02 * memory[1]  # the first ones fill what is kept for later
        assert post(f"{server.url}/v1/completions", json=body(0)).status_code == 200
