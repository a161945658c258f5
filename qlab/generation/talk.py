"""A conversation with a model: what was said, how replies are drawn, and the commands that change
either. Knows no terminal.
"""

import json
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlab.errors import QlabError, refusal_of
from qlab.files.atomic import write_json
from qlab.generation.images import as_text, has_images, part_of
from qlab.generation.pipeline import Pipeline, Prompt

# What /set takes.
NUMBERS: Mapping[str, type[int] | type[float]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_tokens": int,
    "seed": int,
}


@dataclass(kw_only=True)
class Talk:
    """A conversation.

    pipe: what replies. system: what the model is told first, or "". messages: what was said.
    pictures: parts of the next message. settings: of sampling. new_tokens, seconds: of all replies
    so far.
    """

    pipe: Pipeline
    system: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    new_tokens: int = 0
    seconds: float = 0.0

    def reply(self, text: str) -> Generator[str, None, None]:
        """The pieces of the model's reply to a text. What was told of it when the iteration ends,
        early or not, is part of the conversation."""
        said = [*self.pictures, {"type": "text", "text": text}] if self.pictures else text
        self.messages.append({"role": "user", "content": said})
        told: list[str] = []
        started = time.monotonic()
        stream = self.pipe.stream(self._prompt(), **self.settings)
        try:
            for piece in stream:
                told.append(piece)
                yield piece
        except QlabError:
            self.messages.pop()  # what cannot be answered was not said
            raise
        finally:
            stream.close()
            self.seconds += time.monotonic() - started
            if self.messages and self.messages[-1]["role"] == "user":
                reply = "".join(told)
                self.new_tokens += len(self.pipe.ids(reply)) if reply else 0
                self.messages.append({"role": "assistant", "content": reply})
                self.pictures.clear()

    def _prompt(self) -> Prompt:
        """The messages by the model's chat template; where it has none, their text."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self.messages]
        if self.pipe.tokenizer.chat_template or has_images(messages):
            return messages
        return "\n".join(message["content"] for message in as_text(messages))

    # -------------------------------------------------------------- commands
    def command(self, line: str) -> str:
        """What a line that begins with / does, in words. QlabError for one that does not fit."""
        name, _, argument = line[1:].partition(" ")
        if name not in COMMANDS:
            raise QlabError(f"there is no /{name}; /help lists what there is")
        return COMMANDS[name].run(self, argument.strip())

    def help(self, argument: str) -> str:
        rows = [f"/{name} {c.takes}".ljust(28) + c.says for name, c in COMMANDS.items()]
        return "\n".join([*rows, "/exit".ljust(28) + "leave; so does the end of the input"])

    def clear(self, argument: str) -> str:
        self.messages.clear()
        self.pictures.clear()
        return "forgotten"

    def show(self, argument: str) -> str:
        if self.pipe.images is None:
            raise QlabError("the model takes no images")
        self.pictures.append(part_of(_path(argument, "image")))
        return f"images of the next message: {len(self.pictures)}"

    def say_system(self, argument: str) -> str:
        self.system = argument
        return f"the model is told first: {argument}" if argument else "the model is told nothing"

    def set(self, argument: str) -> str:
        """A setting of sampling; without one, all."""
        name, _, value = argument.partition(" ")
        if not name:
            return ", ".join(f"{key} {value}" for key, value in self._all_settings().items())
        if name not in NUMBERS:
            raise QlabError(f"there is no setting {name!r}; there are {', '.join(NUMBERS)}")
        try:
            number = NUMBERS[name](value)
        except ValueError as error:
            raise QlabError(f"{name} is {value!r}; give a number") from error
        replace(self.pipe.defaults, **{**self.settings, name: number})
        self.settings[name] = number
        return f"{name} {number}"

    def _all_settings(self) -> Mapping[str, Any]:
        sampling = replace(self.pipe.defaults, **self.settings)
        return {name: getattr(sampling, name) for name in NUMBERS}

    def stats(self, argument: str) -> str:
        rate = self.new_tokens / self.seconds if self.seconds else 0.0
        tokens = len(self.pipe.ids(self._prompt())) if self.messages else 0
        return (
            f"{len(self.messages)} messages, {tokens} tokens; replies: {self.new_tokens} tokens, "
            f"{rate:.1f} a second"
        )

    def save(self, argument: str) -> str:
        path = _path(argument, "save")
        try:
            write_json(path, {"system": self.system, "messages": self.messages})
        except OSError as error:
            raise refusal_of(error) from error
        return f"saved in {path}"

    def load(self, argument: str) -> str:
        path = _path(argument, "load")
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            messages = [{key: m[key] for key in ("role", "content")} for m in saved["messages"]]
            system = saved["system"]
            said = [system, *(part for message in messages for part in _texts(message))]
            if not all(isinstance(text, str) for text in said):
                raise ValueError("a text is something else")
        except OSError as error:
            raise refusal_of(error) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise QlabError(f"{path} is no conversation that /save wrote") from error
        self.system, self.messages = system, messages
        return f"{len(messages)} messages"


@dataclass(frozen=True, kw_only=True)
class Command:
    """takes: what follows the name. says: what it does, for /help."""

    takes: str
    says: str
    run: Callable[[Talk, str], str]


COMMANDS: Mapping[str, Command] = {
    "help": Command(takes="", says="this list", run=Talk.help),
    "clear": Command(takes="", says="forget what was said", run=Talk.clear),
    "system": Command(takes="TEXT", says="what the model is told first", run=Talk.say_system),
    "image": Command(takes="FILE", says="show it with the next message", run=Talk.show),
    "set": Command(takes="NAME NUMBER", says="how replies are drawn", run=Talk.set),
    "save": Command(takes="FILE", says="write the conversation", run=Talk.save),
    "load": Command(takes="FILE", says="go on with a written one", run=Talk.load),
    "stats": Command(takes="", says="how long it is, and how fast", run=Talk.stats),
}


def _path(argument: str, name: str) -> Path:
    if not argument:
        raise QlabError(f"/{name} needs the name of a file")
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:  # of ~NAME
        raise QlabError(f"{argument} is in the home of nobody; name another file") from error


def _texts(message: Mapping[str, Any]) -> list[Any]:
    """What is written in a saved message, and who says it."""
    content = message["content"]
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return [message["role"], *(part["text"] for part in parts if part.get("type") == "text")]
