"""The bodies that clients read: OpenAI's objects, whole and in pieces."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qlab.generation.sampling import Drawn
from qlab.serving.worker import Answer

DONE = "data: [DONE]\n\n"


def event(body: Mapping[str, Any]) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage(prompts: int, answers: Sequence[Answer]) -> dict[str, Any]:
    """How many tokens were read and written. The replies to one prompt read it once.

    prompts: how many prompts there are; the answers to each stand side by side.
    """
    each = len(answers) // prompts
    read = sum(len(answer.asked.request.prompt) for answer in answers[::each])
    cached = sum(answer.asked.request.cached for answer in answers[::each])
    new = sum(len(answer.asked.request.drawn) for answer in answers)
    return {
        "prompt_tokens": read,
        "completion_tokens": new,
        "total_tokens": read + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def completion_logprobs(tokenizer: Any, drawn: Sequence[Drawn | int], at: int) -> dict[str, Any]:
    """The log-probabilities of a completion. drawn: tokens, of which an id has none (the first of
    an echoed prompt). at: where the text of the first one begins."""
    tokens, offsets = [], []
    for item in drawn:
        tokens.append(_text(tokenizer, item if isinstance(item, int) else item.token))
        offsets.append(at)
        at += len(tokens[-1])
    known = [None if isinstance(item, int) else item for item in drawn]
    return {
        "tokens": tokens,
        "token_logprobs": [item.logprob if item else None for item in known],
        "top_logprobs": [_likeliest(tokenizer, item) if item else None for item in known],
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Any, drawn: Sequence[Drawn]) -> dict[str, Any]:
    """The log-probabilities of a message."""
    return {
        "content": [
            {
                **_of_token(tokenizer, item.token, item.logprob),
                "top_logprobs": [_of_token(tokenizer, *pair) for pair in item.likeliest],
            }
            for item in drawn
        ]
    }


def _of_token(tokenizer: Any, token: int, logprob: float | None) -> dict[str, Any]:
    text = _text(tokenizer, token)
    return {"token": text, "logprob": logprob, "bytes": [*text.encode()]}


def _likeliest(tokenizer: Any, item: Drawn) -> dict[str, float]:
    return {_text(tokenizer, token): logprob for token, logprob in item.likeliest}


def _text(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token]))


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """OpenAI's envelope of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
