"""Requests to the server whose bodies are changed at random; the application runs in this
process."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import torch
from families import tiny
from model_folders import add_tokenizer

from faults import Trial
from faults.inputs import READ, REFUSED, case
from faults.mutations import any_value, changed_json, text_of
from qlab.algebra.spec import parse_spec
from qlab.directories.model_free import quantize_files
from qlab.generation.pipeline import pipeline
from qlab.methods.rtn import rtn
from qlab.serving.app import Server, Settings, application
from qlab.serving.worker import Worker

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "looks",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
COMPLETION = {
    "model": "tiny",
    "prompt": "word1 word2",
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "n": 2,
    "seed": 7,
    "stop": ["word3"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "presence_penalty": 0.5,
    "logit_bias": {"5": 1.5},
    "logprobs": 2,
    "echo": True,
}
CHAT = {
    "messages": [
        {"role": "system", "content": "word4"},
        {"role": "user", "content": [{"type": "text", "text": "word1"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "a",
                    "type": "function",
                    "function": {"name": "look", "arguments": '{"word": "x"}'},
                }
            ],
        },
        {"role": "tool", "content": "word5", "tool_call_id": "a"},
    ],
    "max_completion_tokens": 3,
    "temperature": 0,
    "tools": [TOOL],
    "tool_choice": "auto",
    "logprobs": True,
    "top_logprobs": 2,
}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {
                "a": {"type": "string", "pattern": "^[ab]{1,3}$", "maxLength": 4},
                "b": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
                "c": {"anyOf": [{"$ref": "#/$defs/d"}, {"enum": [1, None, "x"]}]},
            },
            "required": ["a"],
            "additionalProperties": False,
            "$defs": {"d": {"const": 1}},
        },
    },
}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [COMPLETION, {"prompt": [[1, 2], [3]], "max_tokens": 1}],
    "/v1/chat/completions": [
        CHAT,
        {"messages": CHAT["messages"][:1], "max_tokens": 2, "response_format": SCHEMA},
    ],
    "/tokenize": [{"prompt": "word1"}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
}
IMAGE = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}


def bodies(shared: Path) -> Trial:
    """Bodies of every route, headers and methods."""
    tiny("llama").save_pretrained(shared / "model")
    add_tokenizer(shared / "model")
    recipe = rtn(parse_spec("int8-channel"))
    made = quantize_files(shared / "model", recipe, shared / "quantized")
    pipe = pipeline(made.path, dtype=torch.float32, rows=4)

    def one(draw: random.Random, folder: Path) -> str:
        path = draw.choice([*BODIES])
        body = changed_json(draw, draw.choice(BODIES[path]))
        if path.startswith("/v1/chat") and isinstance(body, dict) and draw.random() < 0.1:
            body["messages"] = [
                {"role": "user", "content": [draw.choice([IMAGE, any_value(draw)])]}
            ]
        raw = text_of(draw, body)
        codes = asyncio.run(_asked(pipe, path, raw))
        assert pipe.engine.pages.available == pipe.engine.pages.count
        return REFUSED if codes[0] >= 400 else READ

    return one


async def _asked(pipe: Any, path: str, raw: bytes) -> list[int]:
    """The codes of a body, and of a good one behind it."""
    server = Server(Worker(pipe, 10_000), Settings(name="tiny", facts={}, timeout=60))
    transport = httpx.ASGITransport(app=application(server))
    server.worker.start()
    codes = []
    try:
        async with httpx.AsyncClient(
            transport=transport, base_url="http://x", timeout=60
        ) as client:
            for content in (raw, b'{"prompt": "word1", "max_tokens": 1, "temperature": 0}'):
                to = path if content is raw else "/v1/completions"
                answer = await client.post(
                    to, content=content, headers={"content-type": "application/json"}
                )
                codes.append(answer.status_code)
                assert answer.status_code < 500, answer.text[:500]
                if answer.status_code >= 400:
                    said = answer.json()["error"]
                    assert said["message"] and "\n" not in said["message"], said
                elif answer.headers["content-type"].startswith("application/json"):
                    json.loads(answer.text, parse_constant=lambda name: 1 / 0)
    finally:
        await asyncio.to_thread(server.worker.stop)
    assert codes[1] == 200
    return codes


CASES = [case("bodies of requests", bodies)]
