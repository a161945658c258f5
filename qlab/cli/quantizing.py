"""plan and quantize."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlab.cli.choices import Choices, job_of, with_choices
from qlab.cli.devices import (
    Call,
    DeviceMemory,
    Float32,
    Flops,
    Link,
    Read,
    devices_of,
    least_memory,
)
from qlab.cli.dividing import Words, add
from qlab.cli.model_free import quantize_without_model, refuse_site_choices
from qlab.cli.options import (
    ONE_FILE,
    Json,
    KeepStatistics,
    MethodName,
    Model,
    Overwrite,
    Resume,
    Statistics,
    statistics_folder,
)
from qlab.cli.output import console, output_place, report
from qlab.errors import QlabError

if TYPE_CHECKING:
    from qlab.driver.job import Job
    from qlab.driver.result import Result


@with_choices
def plan(
    model: Annotated[
        str, typer.Argument(help="a model directory, its config.json alone, or 'demo'")
    ],
    *,
    method: MethodName = "gptq",
    choices: Choices,
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, help="processes that share the run, as of torchrun")
    ] = 1,
    device_flops: Flops = None,
    device_float32: Float32 = None,
    device_read: Read = None,
    device_memory: DeviceMemory = None,
    link: Link = None,
    device_call: Call = None,
    blocks: Annotated[
        int | None,
        typer.Option(
            "--blocks", help="really quantize the first N blocks, for peak and time; keeps nothing"
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """What a method would do to a model: stages, passes, peak memory, bits per weight; what it
    would cost on devices of given figures. Runs and writes nothing, but for the blocks that
    --blocks asks for."""
    import qlab

    devices = devices_of(
        flops=device_flops,
        float32=device_float32,
        read=device_read,
        link=link,
        call=device_call,
        ranks=ranks,
    )
    job = job_of(model, method, choices, planning=True)
    memory = least_memory(job.memory, device_memory)
    planned = qlab.plan(**{**vars(job), "memory": memory}, ranks=ranks)
    console().print(planned)
    if devices is not None or ranks > 1 or not job.model.has_weights:
        console().print(*planned.costs(devices), sep="\n")
    console().print(f"written by the codec {job.codec}")
    times = {} if devices is None else planned.at(devices)
    shown = {**planned.json(), **times, "codec": job.codec}
    if planned.peak_bytes <= (memory or planned.peak_bytes) and blocks is not None:
        rehearsal = qlab.rehearse(**vars(job), blocks=blocks)
        console().print(str(rehearsal), soft_wrap=True)
        shown["rehearsal"] = rehearsal.json()
    report(shown, json_file)
    planned.check(memory)


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
    keep_statistics: KeepStatistics = False,
    statistics: Statistics = None,
    jobs: Annotated[
        Path | None,
        typer.Option(
            "--jobs",
            help="write nothing but this run into a shared folder, on which `qlab work` is started",
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Quantize a model directory into one that other engines load. The processes that torchrun
    starts do it together."""
    import qlab
    from qlab.process.ranks import agreed, is_first, join

    kept = statistics_folder(statistics) if keep_statistics or statistics else None
    if model_free:
        refuse_site_choices(choices)
        if kept:
            raise QlabError("--model-free runs no model and keeps no statistics; leave them out")
    elif include or exclude:
        raise QlabError(
            "--include and --exclude go with --model-free; leave sites as they are by --keep, or "
            "choose them in Python by qlab.rules and qlab.at"
        )
    is_joined = join()
    texts = [*(choices.calib or ()), *(choices.images or ())]

    def check_place() -> None:
        if is_first():  # others would see what it makes there
            output_place(out, model, texts, overwrite, resume, json_file, choices.codec or "")
        if jobs and is_joined:
            raise QlabError("--jobs is done by one process; start it without torchrun")

    agreed(check_place)
    if jobs is not None:
        words = Words(
            model=model,
            out=Path(os.path.abspath(out.expanduser())),
            method=method,
            choices=choices,
            model_free=model_free,
            include=include,
            exclude=exclude,
            overwrite=overwrite,
            kept=kept,
        )
        _add_run(words, Path(os.path.abspath(os.path.expanduser(jobs))), resume, json_file)
        return
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
    job = agreed(lambda: job_of(model, method, choices))
    options: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "keep_statistics": kept}
    result = (
        _as_file(job, out, **options)
        if job.codec in ONE_FILE
        else qlab.quantize(**vars(job), out=out, **options)
    )
    if not is_first():
        return
    console().print(result.plan)
    _show(result, job.codec)
    report(result.json(), json_file)


def _add_run(words: Words, jobs: Path, resume: bool, json_file: Path | None) -> None:
    """Add a run to a shared folder, and say how it is done."""
    if resume:
        raise QlabError("--resume would do nothing, since --jobs runs nothing; leave it out")
    run = add(words, jobs)
    count = run.said["pieces"]
    pieces = (
        f"{count} pieces, for any number of processes"
        if count
        else "one piece, since its blocks depend on each other (--inputs reference divides it)"
    )
    console().print(
        f"{words.out} is to be made in {pieces}; start "
        f"`qlab work {quote(str(jobs))} --shard i/n` wherever this folder is shared",
        soft_wrap=True,
    )
    report({"folder": str(run.folder), "out": str(words.out), "pieces": count}, json_file)


def _as_file(job: "Job", out: Path, overwrite: bool, **options: Any) -> "Result":
    """Quantize into a directory beside the file that is made of it; a killed run is continued
    there."""
    import qlab
    from qlab.directories.to_gguf import gguf_place, said_in_keys
    from qlab.driver.job import CODEC
    from qlab.process.ranks import is_first

    qlab.plan(**vars(job)).check(job.memory)  # refuses what the file would not hold
    file = gguf_place(out, job.model.path, overwrite)
    said_in_keys(job.model)
    folder = file.with_name(f"{file.name}.quantized")
    whole = {**vars(job), "codec": CODEC}
    result = qlab.quantize(**whole, out=folder, overwrite=overwrite, **options)
    if not is_first():
        return result
    made = qlab.convert(result.path, job.codec or CODEC, file, overwrite=overwrite)
    shutil.rmtree(folder)
    return replace(result, path=made.path)


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
    if result.ranks > 1:
        sent = result.sent_bytes_per_block / 1e6
        console().print(f"{result.ranks} ranks, which sent each other {sent:.1f} MB a block")
    for name, few in result.experts_with_few_tokens.items():
        console().print(
            f"{name}: experts {', '.join(map(str, few))} saw fewer tokens than input channels",
            soft_wrap=True,
        )
