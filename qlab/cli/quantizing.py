"""plan and quantize."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlab.cli.choices import Choices, job_of, with_choices
from qlab.cli.model_free import quantize_without_model, refuse_site_choices
from qlab.cli.options import Json, MethodName, Model, Overwrite, Resume
from qlab.cli.output import console, output_place, report
from qlab.errors import QlabError

if TYPE_CHECKING:
    from qlab.driver.result import Result


@with_choices
def plan(
    model: Model, *, method: MethodName = "gptq", choices: Choices, json_file: Json = None
) -> None:
    """What a method would do to a model: stages, passes, peak memory, bits per weight. Runs and
    writes nothing."""
    import qlab

    job = job_of(model, method, choices)
    planned = qlab.plan(**vars(job))
    console().print(planned)
    planned.check(job.memory)
    console().print(f"written by the codec {job.codec}")
    report({**planned.json(), "codec": job.codec}, json_file)


@with_choices
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="the directory to write")],
    *,
    method: MethodName = "",
    choices: Choices,
    overwrite: Overwrite = False,
    resume: Resume = False,
    model_free: Annotated[
        bool,
        typer.Option("--model-free", help="from files alone, by data-free methods (default: rtn)"),
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", help="with --model-free: globs of modules to quantize"),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", help="with --model-free: globs of modules to leave"),
    ] = None,
    json_file: Json = None,
) -> None:
    """Quantize a model directory into one that other engines load."""
    import qlab

    if model_free:
        refuse_site_choices(choices)
    texts = [*(choices.calib or ()), *(choices.images or ())]
    output_place(out, model, texts, overwrite, resume, json_file)
    if model_free:
        quantize_without_model(
            model,
            out,
            method=method,
            choices=choices,
            include=include,
            exclude=exclude,
            overwrite=overwrite,
            resume=resume,
            json_file=json_file,
        )
        return
    if include or exclude:
        raise QlabError(
            "--include and --exclude go with --model-free; leave sites as they are by --keep, or "
            "choose them in Python by qlab.rules and qlab.at"
        )
    job = job_of(model, method, choices)
    result = qlab.quantize(**vars(job), out=out, overwrite=overwrite, resume=resume)
    console().print(result.plan)
    _show(result, job.codec)
    report(result.json(), json_file)


def _show(result: "Result", codec: str | None) -> None:
    cost = (
        f"{result.bytes / 1e6:.1f} MB, {result.seconds:.1f} s, peak "
        f"{result.peak_rss_bytes / 2**20:.0f} MiB"
    )
    console().print(
        f"{result.path}: {codec}, {result.bits_per_weight:.3f} bits per weight, {cost}, "
        f"{result.inputs} inputs",
        soft_wrap=True,
    )
    for name, few in result.experts_with_few_tokens.items():
        console().print(
            f"{name}: experts {', '.join(map(str, few))} saw fewer tokens than input channels",
            soft_wrap=True,
        )
