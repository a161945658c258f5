"""run: answer the prompts of a file."""

from pathlib import Path
from typing import Annotated, Any

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
from qlab.cli.output import console
from qlab.errors import QlabError

UNSET = -1.0  # of numbers that may be left out, none of which is negative


def answer(
    model: Model,
    prompts: Annotated[
        Path,
        typer.Option(
            "--in", help='JSON lines: {"prompt": ...} or {"messages": [...]}, and settings'
        ),
    ],
    answers: Annotated[
        Path, typer.Option("--out", help="JSON lines; what is there already is not asked again")
    ],
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    activations: Activations = NONE,
    head: Head = NONE,
    compile: Compile = NONE,
    kv_cache: KvCache = "",
    rows: Annotated[int, typer.Option("--rows", min=1, help="prompts at a time")] = 16,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="of a reply")] = 256,
    temperature: Annotated[
        float,
        typer.Option("--temperature", help="0: the likeliest tokens (default: as the model says)"),
    ] = UNSET,
    top_p: Annotated[float, typer.Option("--top-p", help="(default: as the model says)")] = UNSET,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the draws of every prompt")] = 0,
) -> None:
    """Answer every prompt of a file, in order; a run that was stopped goes on where it was."""
    from qlab.generation.offline import answer_file, prompts_of

    settings: dict[str, Any] = {"max_tokens": max_tokens, "seed": seed}
    given = {"temperature": temperature, "top_p": top_p}
    settings |= {name: value for name, value in given.items() if value != UNSET}
    asked = prompts_of(prompts)
    if not answers.parent.is_dir():
        raise QlabError(f"{answers} would lie in no folder; make {answers.parent} first")
    if answers.exists() and not answers.is_file():
        raise QlabError(f"{answers} is no regular file, and answers are read back; name one")
    checkpoint = opened(model)
    rounded = roundings(checkpoint, device, activations, head)
    ready = pipeline_of(checkpoint, rounded, device, dtype, compile, kv_cache, rows=rows)
    with ready as pipe:
        if not pipe.answers:
            return
        say_cost(pipe)
        known_by = {"fingerprint": checkpoint.fingerprint(), "dtype": dtype, "kv_cache": kv_cache}
        done = answer_file(pipe, asked, answers, settings, {**known_by, **rounded})
    console().print(
        f"{answers}: {done.answers} answers, {done.before} of them from before, "
        f"{done.failed} failed",
        soft_wrap=True,
    )
    if done.failed:
        raise typer.Exit(1)
