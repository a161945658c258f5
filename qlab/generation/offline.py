"""Prompts of a file to answers in another, in the same order: `qlab run`.

A line of prompts is {"prompt": TEXT or IDS} or {"messages": [...]}, beside settings such as
"max_tokens" and "stop". A blank line is none. A line of answers is what was replied, beside a hash
of the line that asked and one of the model and the settings of all: what was answered before is
read back, checked and not asked again.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from qlab.errors import QlabError, first_line
from qlab.files.lock import take
from qlab.generation.grammar import KINDS
from qlab.generation.pipeline import SETTINGS, Pipeline, Reply
from qlab.process.progress import progress

TAKEN = (*sorted(SETTINGS), *KINDS, "stop", "tools")  # fields of a line beside its prompt
AHEAD = 64  # prompts that wait for each other, so that memory does not grow with the file


@dataclass(frozen=True, kw_only=True)
class Answered:
    """How many answers a file has now, how many of them were there before, and how many prompts
    failed in this run."""

    answers: int
    before: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What a file asks, in its order. path: of the file. lines: those that are not blank, as they
    are. rows: the same, a prompt under "prompt" beside its settings."""

    path: Path
    lines: tuple[bytes, ...]
    rows: tuple[dict[str, Any], ...]


def prompts_of(path: Path) -> Prompts:
    """The prompts of a file. Refuses a line that is none, with its number."""
    numbered = enumerate(path.read_bytes().splitlines(), 1)
    asked = [(number, line) for number, line in numbered if line.strip()]
    rows = tuple(_row(line, f"{path}, line {number}") for number, line in asked)
    return Prompts(path=path, lines=tuple(line for _, line in asked), rows=rows)


def answer_file(
    pipe: Pipeline,
    prompts: Prompts,
    answers: Path,
    settings: Mapping[str, Any],
    model: Mapping[str, Any],
) -> Answered:
    """Answer every prompt of a file.

    Args:
        pipe: what replies.
        prompts: of the file.
        answers: JSON lines. Answers are appended as they are ready; a line that was cut when a run
            ended is written again.
        settings: of all prompts, unless their line says otherwise.
        model: what tells the model and its arithmetic from others. With the settings it is part of
            what a line of answers is known by.

    Raises:
        QlabError: answers to other prompts, of another model or with other settings, a file that
            another run is writing to, and one that cannot be locked.
    """
    shared = json.dumps({"model": model, "settings": settings}, sort_keys=True).encode()
    asked = [
        {"prompt_sha256": _digest(line), "run_sha256": _digest(shared)} for line in prompts.lines
    ]
    failed = 0
    with open(answers, "ab") as file:
        take(file.fileno(), answers, "name another file")
        before = _answered(answers, asked, prompts.path)
        todo = asked[before:]
        replies = _replies(pipe, prompts.rows[before:], settings)
        for known_by in progress(todo, f"answering {prompts.path.name}"):
            reply = next(replies)
            failed += isinstance(reply, QlabError)
            _append(file, known_by, reply)
    return Answered(answers=len(asked), before=before, failed=failed)


def _row(line: bytes, where: str) -> dict[str, Any]:
    """A prompt under "prompt", and its settings."""
    try:
        row = json.loads(line, object_pairs_hook=partial(_once, where))
    except (ValueError, RecursionError) as error:
        if isinstance(error, QlabError):
            raise
        raise QlabError(f"{where} is no JSON ({first_line(error)}); repair it") from error
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise QlabError(f'{where} has no prompt; give {{"prompt": ...}} or {{"messages": [...]}}')
    for name in ("messages", "tools"):
        given = row.get(name, [])
        if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
            raise QlabError(f"{where} has {name} that are no list of objects; give one")
    prompt = row.pop("prompt") if "prompt" in row else row.pop("messages")
    if not isinstance(prompt, str | list) or not prompt:
        raise QlabError(f"{where} has an empty prompt; give a text, ids or messages")
    unknown = sorted({*row} - {*TAKEN})
    if unknown:
        raise QlabError(f"{where} has no setting {unknown[0]!r}; there are {', '.join(TAKEN)}")
    biases = row.get("logit_bias")
    if isinstance(biases, dict):  # keys of JSON are texts
        row["logit_bias"] = {int(key) if key.isdecimal() else key: b for key, b in biases.items()}
    return {"prompt": prompt, **row}


def _once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, each of whose fields is there once."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise QlabError(f"{where} has the field {twice!r} twice; give it once")
    return fields


def _answered(answers: Path, asked: Sequence[Mapping[str, str]], prompts: Path) -> int:
    """How many answers there are. A cut line at the end is taken away."""
    whole = answers.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    lines = kept.splitlines()
    known = [_known_by(line, f"{answers}, line {number}") for number, line in enumerate(lines, 1)]
    for number, (said, expected) in enumerate(zip(known, asked), 1):
        if said["prompt_sha256"] != expected["prompt_sha256"]:
            raise QlabError(
                f"{answers}, line {number} answers another prompt than the one in place {number} "
                f"of {prompts}; name another file"
            )
        if said["run_sha256"] != expected["run_sha256"]:
            raise QlabError(
                f"{answers}, line {number} is of another model or of other settings than these; "
                "give those again, or name another file"
            )
    if len(known) > len(asked):
        raise QlabError(
            f"{answers} has {len(known)} answers, and {prompts} {len(asked)} prompts; name another "
            "file"
        )
    if kept != whole:
        os.truncate(answers, len(kept))
    return len(known)


def _known_by(line: bytes, where: str) -> dict[str, str]:
    try:
        row = json.loads(line)
        return {name: str(row[name]) for name in ("prompt_sha256", "run_sha256")}
    except (ValueError, KeyError, TypeError) as error:
        raise QlabError(
            f"{where} is no answer of this version of qlab run; name another file"
        ) from error


def _replies(
    pipe: Pipeline, rows: Sequence[dict[str, Any]], settings: Mapping[str, Any]
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


def _append(file: BinaryIO, known_by: Mapping[str, str], reply: Reply | QlabError) -> None:
    answer: dict[str, Any] = {**known_by}
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
