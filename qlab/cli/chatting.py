"""chat: talk to a model in the terminal."""

from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

import typer

from qlab.cli.opening import (
    NONE,
    Activations,
    Compile,
    Dtype,
    Head,
    KvCache,
    opened,
    pipeline_of,
    roundings,
    say_cost,
)
from qlab.cli.options import Device, Model
from qlab.errors import QlabError, printable
from qlab.process.progress import say

if TYPE_CHECKING:
    from qlab.generation.talk import Talk

BLOCK = '"""'  # a line of it begins and ends a text of several lines
YOURS, MORE = "> ", "... "


def chat(
    model: Model,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    activations: Activations = "",
    head: Head = "",
    compile: Compile = NONE,
    kv_cache: KvCache = "",
    system: Annotated[str, typer.Option("--system", help="what the model is told first")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="of a reply")] = 512,
) -> None:
    """Talk to a model. /help lists the commands; Ctrl-C stops a reply and keeps the talk."""
    from qlab.generation.talk import Talk

    checkpoint = opened(model)
    rounded = roundings(checkpoint, device, activations, head)
    ready = pipeline_of(checkpoint, rounded, device, dtype, compile, kv_cache, rows=1)
    with suppress(ImportError):
        import_module("readline")  # gives `input` keys that edit, and the lines before
    with ready as pipe:
        if not pipe.answers:
            return
        say_cost(pipe)
        _talk(Talk(pipe=pipe, system=system, settings={"max_tokens": max_tokens}))


def _talk(talk: "Talk") -> None:
    """Read, answer, until /exit or the end of the input."""
    while True:
        try:
            text = _read()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/exit leaves")
            continue
        except UnicodeDecodeError:
            say("qlab: that was no text in UTF-8, and is not told; write it anew")
            continue
        if text.strip() == "/exit":
            return
        if text.strip():
            answer(talk, text.strip())


def _read() -> str:
    """A line, or the lines between two of three quotes."""
    line = input(YOURS)
    if line.strip() != BLOCK:
        return line
    lines: list[str] = []
    while True:
        line = input(MORE)
        if line.strip() == BLOCK:
            return "\n".join(lines)
        lines.append(line)


def answer(talk: "Talk", text: str) -> None:
    """Print the reply to a text, or what a command did. Ctrl-C stops it."""
    try:
        if text.startswith("/"):
            print(_shown(talk.command(text)))
            return
        pieces = talk.reply(text)
        try:
            for piece in pieces:
                print(_shown(piece), end="", flush=True)
        finally:
            pieces.close()
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
    except QlabError as error:
        say(f"qlab: {error}")


def _shown(text: str) -> str:
    """What a model writes, line by line, with escapes for what would steer the terminal."""
    return "\n".join(map(printable, text.expandtabs().split("\n")))
