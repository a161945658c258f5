"""Prompts of a file to answers in another, in the same order: `qlab run`.

A line of prompts is {"prompt": TEXT or IDS} or {"messages": [...]}, beside settings such as
"max_tokens" and "stop". A line of answers is what was replied, beside a hash of the line that
asked: what was answered before is read back, checked and not asked again.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qlab.errors import QlabError
from qlab.generation.pipeline import Pipeline, Reply
from qlab.process.progress import progress

AHEAD = 64  # prompts that wait for each other, so that memory does not grow with the file


@dataclass(frozen=True, kw_only=True)
class Answered:
    """How many answers a file has now, how many of them were there before, and how many prompts
    failed in this run."""

    answers: int
    before: int
    failed: int


def answer_file(pipe: Pipeline, prompts: Path, answers: Path, settings: dict[str, Any]) -> Answered:
    """Answer every line of a file.

    Args:
        pipe: what replies.
        prompts, answers: JSON lines. Answers are appended as they are ready; a line that was cut
            when a run ended is written again.
        settings: of all prompts, unless their line says otherwise.

    Raises:
        QlabError: a line that is no prompt, with its number, before any is answered; answers to
            other prompts.
    """
    lines = prompts.read_bytes().splitlines()
    rows = [_row(line, number, prompts) for number, line in enumerate(lines, 1)]
    before = _answered(answers, lines, prompts)
    failed = 0
    with open(answers, "ab") as file:
        todo = [*zip(lines, rows)][before:]
        replies = _replies(pipe, [row for _, row in todo], settings)
        for line, _ in progress(todo, f"answering {prompts.name}"):
            reply = next(replies)
            failed += isinstance(reply, QlabError)
            _append(file, line, reply)
    return Answered(answers=len(lines), before=before, failed=failed)


def _row(line: bytes, number: int, path: Path) -> dict[str, Any]:
    """A prompt under "prompt", and its settings."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise QlabError(f"{path}, line {number} is no JSON ({error}); repair it") from error
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise QlabError(
            f'{path}, line {number} has no prompt; give {{"prompt": ...}} or {{"messages": [...]}}'
        )
    prompt = row.pop("prompt") if "prompt" in row else row.pop("messages")
    if not isinstance(prompt, str | list) or not prompt:
        raise QlabError(f"{path}, line {number} has an empty prompt; give a text, ids or messages")
    return {"prompt": prompt, **row}


def _answered(answers: Path, lines: list[bytes], prompts: Path) -> int:
    """How many answers there are. A cut line at the end is taken away."""
    if not answers.exists():
        return 0
    whole = answers.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    asked = [_asked_by(line, number, answers) for number, line in enumerate(kept.splitlines(), 1)]
    for number, (said, line) in enumerate(zip(asked, lines), 1):
        if said != _digest(line):
            raise QlabError(
                f"{answers}, line {number} answers another prompt than line {number} of {prompts}; "
                "name another file"
            )
    if len(asked) > len(lines):
        raise QlabError(
            f"{answers} has {len(asked)} answers, and {prompts} {len(lines)} prompts; name another "
            "file"
        )
    if kept != whole:
        os.truncate(answers, len(kept))
    return len(asked)


def _asked_by(line: bytes, number: int, answers: Path) -> str:
    try:
        return str(json.loads(line)["prompt_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise QlabError(
            f"{answers}, line {number} is no answer of qlab run; name another file"
        ) from error


def _replies(
    pipe: Pipeline, rows: list[dict[str, Any]], settings: dict[str, Any]
) -> Iterator[Reply | QlabError]:
    """The replies in order, some prompts ahead."""
    waiting: deque[Any] = deque()
    for row in rows:
        waiting.append(_asked(pipe, {**settings, **row}))
        if len(waiting) == AHEAD:
            yield _waited_for(pipe, waiting.popleft())
    while waiting:
        yield _waited_for(pipe, waiting.popleft())


def _asked(pipe: Pipeline, row: dict[str, Any]) -> Any:
    try:
        return pipe.ask(**row)
    except QlabError as error:
        return error


def _waited_for(pipe: Pipeline, asked: Any) -> Reply | QlabError:
    if isinstance(asked, QlabError):
        return asked
    try:
        return pipe.wait_for(asked)
    except QlabError as error:
        return error


def _append(file: BinaryIO, line: bytes, reply: Reply | QlabError) -> None:
    answer: dict[str, Any] = {"prompt_sha256": _digest(line)}
    if isinstance(reply, QlabError):
        answer |= {"error": str(reply)}
    else:
        answer |= {
            "text": reply.text,
            "finish": reply.finish,
            **({} if reply.is_whole is None else {"is_whole": reply.is_whole}),
            "prompt_tokens": reply.prompt_tokens,
            "new_tokens": len(reply.tokens),
        }
        if reply.drawn and reply.drawn[0].logprob is not None:
            answer["logprobs"] = [drawn.logprob for drawn in reply.drawn]
    file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
    file.flush()


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:16]
