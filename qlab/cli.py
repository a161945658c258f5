"""The commands: plan, quantize, eval, inspect, tune, cache. Bad input is one sentence on stderr and exit code 2."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from qlab.errors import QlabError

SEVERAL = ("--calib", "--text")  # options that take several files
WIDTH = 132  # of a table that no terminal shows

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Quantize language models: plan, quantize, evaluate and inspect.")  # fmt: skip

Model = Annotated[str, typer.Argument(help="a model directory, or 'demo'")]
MethodName = Annotated[str, typer.Option("--method", help="rtn, awq, gptq or another name of qlab.METHODS")]
SpecName = Annotated[str, typer.Option("--spec", help="int<bits>-g<group>, -channel or -tensor; fp8-channel, mxfp4, nvfp4")]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="with a zero point per scale")]
Calib = Annotated[list[Path] | None, typer.Option("--calib", help="text or jsonl files (default: the demo text)")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="calibration windows")]
Length = Annotated[int, typer.Option("--length", min=2, help="tokens per window")]
Seed = Annotated[int, typer.Option("--seed", help="chooses the calibration windows")]
Device = Annotated[str, typer.Option("--device", help="where one block at a time is worked on")]
Memory = Annotated[float | None, typer.Option("--memory", help="budget in GiB; a plan above it is refused")]
InputsName = Annotated[str, typer.Option("--inputs", help="calibrate on 'quantized' or 'reference' inputs")]
Json = Annotated[Path | None, typer.Option("--json", help="also write the result to this file")]


def console(width: int = WIDTH) -> Console:
    """Of the width of the terminal or $COLUMNS, or wide enough for every table where there is neither."""
    shown = Console()
    return shown if shown.is_terminal or "COLUMNS" in os.environ else Console(width=width)


def report(value: Any, path: Path | None) -> None:
    """Write a result as JSON where the user asked for it."""
    if path is not None:
        from qlab.writer import write_json

        write_json(path, value)


def recipe_of(method: str, spec: str, asymmetric: bool) -> Any:
    """The transform that a method's name and a spec's name stand for."""
    from qlab.methods import METHODS
    from qlab.spec import parse_spec

    if method not in METHODS:
        raise QlabError(f"method {method!r} is unknown; known are {', '.join(METHODS)}")
    return METHODS[method](parse_spec(spec, symmetric=not asymmetric))


def _data(model: Any, recipe: Any, calib: list[Path] | None, samples: int, length: int, seed: int) -> Any:
    from qlab.calibration import tokens
    from qlab.hub import calibration_texts

    if not any(stage.needs for stage in recipe):
        return None
    return tokens(model, calibration_texts(calib), samples, length, seed)


@app.command()
def plan(
    model: Model, method: MethodName = "gptq", spec: SpecName = "int4-g64", asymmetric: Asymmetric = False,
    calib: Calib = None, samples: Samples = 128, length: Length = 2048, seed: Seed = 0, json_file: Json = None,
) -> None:  # fmt: skip
    """What a method would do to a model: stages, passes, peak memory, bits per weight. Runs and writes nothing."""
    import qlab

    opened, recipe = qlab.open(model), recipe_of(method, spec, asymmetric)
    made = qlab.plan(opened, recipe, _data(opened, recipe, calib, samples, length, seed))
    console().print(made)
    report(made.json(), json_file)


@app.command()
def quantize(
    model: Model, out: Annotated[Path, typer.Option("--out", help="the directory to write")],
    method: MethodName = "gptq", spec: SpecName = "int4-g64", asymmetric: Asymmetric = False,
    calib: Calib = None, samples: Samples = 128, length: Length = 2048, seed: Seed = 0, inputs: InputsName = "quantized",
    device: Device = "cpu", memory: Memory = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output directory")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue a killed run of the same job")] = False,
    json_file: Json = None,
) -> None:  # fmt: skip
    """Quantize a model directory into a compressed-tensors directory."""
    import qlab
    from qlab.quantize import Inputs

    if inputs not in ("quantized", "reference"):
        raise QlabError(f"--inputs {inputs!r} is unknown; it is 'quantized' or 'reference'")
    if overwrite and resume:
        raise QlabError("--overwrite starts anew and --resume continues; give one of them")
    opened, recipe = qlab.open(model), recipe_of(method, spec, asymmetric)
    data = _data(opened, recipe, calib, samples, length, seed)
    budget = None if memory is None else int(memory * 2**30)
    result = qlab.quantize(opened, recipe, data, out, inputs=cast(Inputs, inputs), device=device, memory=budget, overwrite=overwrite,
                           resume=resume)  # fmt: skip
    console().print(result.plan)
    console().print(f"{result.path}: {result.bits_per_weight:.3f} bits per weight, {result.bytes / 1e6:.1f} MB, "
                    f"{result.seconds:.1f} s, peak {result.peak_rss_bytes / 2**20:.0f} MiB, {inputs} inputs")  # fmt: skip
    report(result.json(), json_file)


@app.command("eval")
def evaluate(
    model: Model, against: Annotated[str, typer.Option("--against", help="the reference model")],
    text: Annotated[list[Path] | None, typer.Option("--text", help="text or jsonl files (default: held-out demo)")] = None,
    length: Length = 512, windows: Annotated[int | None, typer.Option(min=2, help="default: all full windows")] = None,
    json_file: Json = None,
) -> None:  # fmt: skip
    """Perplexity, KL divergence and top-1 agreement against a reference, over full windows of --length tokens."""
    import qlab
    from qlab.hub import evaluation_texts

    reference = qlab.open(against)
    data = qlab.first_windows(reference, evaluation_texts(text), length, windows)
    result = qlab.evaluate(qlab.open(model), reference, data)
    table = Table("", "value", "95 % interval", title=f"{model} against {against}: {result.windows} windows of {length}")
    table.add_row("perplexity", f"{result.perplexity:.4f}", _range(result.perplexity_ci))
    table.add_row("reference perplexity", f"{result.reference_perplexity:.4f}", "")
    table.add_row("perplexity / reference", f"{result.perplexity / result.reference_perplexity:.4f}", _range(result.ratio_ci))
    table.add_row("KL divergence (nats)", f"{result.kl:.5f}", _range(result.kl_ci))
    table.add_row("top-1 agreement", f"{result.top1_agreement:.4f}", _range(result.top1_ci))
    console().print(table)
    report({"model": model, "against": against, "data": data.describe(), **result.json()}, json_file)


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.4f} to {interval[1]:.4f}"


@app.command()
def inspect(directory: Annotated[Path, typer.Argument(help="a directory that qlab wrote")], json_file: Json = None) -> None:
    """The sites of a quantized model: spec, shape, weight error, calibration loss, tokens."""
    from qlab.checkpoint import open_checkpoint
    from qlab.report import read_report

    model, record = open_checkpoint(directory), read_report(directory)
    table = Table("site", "spec", "shape", "weight error", "loss", "tokens", "notes", title=str(directory))
    table.columns[0].overflow = "fold"  # a site is looked up by its whole name
    shown = ("spec", "shape", "bits_per_weight", "weight_error", "loss", "tokens")
    for name, row in record["sites"].items():
        rest = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k not in shown)
        table.add_row(name, row["spec"] or "-", "x".join(map(str, row["shape"])), _figure(row.get("weight_error")),
                      _figure(row.get("loss")), f"{row['tokens']:,}" if "tokens" in row else "-", rest)  # fmt: skip
    console().print(table)
    console().print(f"{len(model.quantized)} of {len(record['sites'])} weights quantized, {record['bits_per_weight']:.3f} bits per "
                    f"weight, {record['job']['inputs']} inputs")  # fmt: skip
    report(record, json_file)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3e}"


@contextmanager
def kernel_refusals() -> Iterator[None]:
    """What the kernels' package refuses is refused by qlab."""
    from qlab_kernels.capability import KernelError

    try:
        yield
    except KernelError as error:
        raise QlabError(str(error)) from error


@app.command()
def tune(
    model: Annotated[str | None, typer.Argument(help="a directory that qlab quantized: its shapes (or give --shapes)")] = None,
    shapes: Annotated[str | None, typer.Option("--shapes", help="NxK with commas between them: rows x columns of weights")] = None,
    m: Annotated[str, typer.Option("--m", help="numbers of tokens with commas between them")] = "1,2,4,8,16,32,64,128,256,512,1024",
    dtype: Annotated[str, typer.Option("--dtype", help="of the activations: bfloat16 or float16")] = "bfloat16",
    group: Annotated[int | None, typer.Option("--group", min=1, help="weights per scale of --shapes (default: 128)")] = None,
    asymmetric: Asymmetric = False,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda (default: cuda where there is one)")] = "",
    budget: Annotated[float, typer.Option("--budget", min=0, help="seconds for each shape and number of tokens")] = 30.0,
    retune: Annotated[bool, typer.Option("--retune", help="also what was measured before")] = False, json_file: Json = None,
) -> None:  # fmt: skip
    """Time the configurations of int4 products on this machine and keep the fastest in the config cache."""
    import torch

    from qlab.tuning import parse_shapes, parse_tokens, tune_shapes, weights_of

    if (model is None) == (shapes is None):
        raise QlabError("give either a directory that qlab quantized or --shapes")
    if model is not None and (group or asymmetric):
        raise QlabError(f"{model} has its own groups and zero points; --group and --asymmetric go with --shapes")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = {(group or 128, asymmetric): parse_shapes(shapes)} if shapes else weights_of(str(model), where)
    rows = [row for (per_scale, zeros), sizes in wanted.items() for row in tune_shapes(
        sizes, parse_tokens(m), dtype=dtype, group=per_scale, zeros=zeros, device=where, budget=budget, retune=retune,
        said=lambda line: print(line, file=sys.stderr, flush=True))]  # fmt: skip
    from qlab_kernels import cache

    timings = sum(row["timings"] for row in rows)
    console().print(f"{len(rows)} entries, {timings} timings; they are in {cache.folder()}", soft_wrap=True)
    report({"rows": rows, "folder": str(cache.folder())}, json_file)


configs = typer.Typer(no_args_is_help=True, help="The config cache: which configuration of a kernel runs for which shape.")
app.add_typer(configs, name="cache")


@configs.command("list")
def cache_list(
    shipped: Annotated[bool, typer.Option("--shipped", help="also what this package ships")] = False, json_file: Json = None,
) -> None:  # fmt: skip
    """The entries, one a line."""
    with kernel_refusals():
        from qlab_kernels import cache, transfer
        from qlab_kernels.config import kernel_revision

        rows = [row for row in transfer.listing() if shipped or row[0] == "user"]
        table = Table("file", "product", "config", "us", "GB/s", "source", "device", "date", title=str(cache.folder()))
        for layer, name, key, entry in rows:
            old = ", stale" if cache.stale(entry, key, kernel_revision()) else ""
            config = " ".join(f"{k}={v}" for k, v in entry.json()["config"].items() if k != "kind")
            table.add_row(name.removesuffix(".json"), str(key).rsplit("/", 2)[0], f"{entry.config.kind} {config}", f"{entry.us:.1f}",
                          f"{entry.gbps:.0f}", f"{layer}, {entry.source}{old}", entry.device, entry.date)  # fmt: skip
        console(width=240).print(table)
        report([{"layer": layer, "file": name, "key": str(key), **entry.json()} for layer, name, key, entry in rows], json_file)


@configs.command("export")
def cache_export(file: Annotated[Path, typer.Argument(help="the JSON file to write")]) -> None:
    """Write the user's entries into one file."""
    with kernel_refusals():
        from qlab_kernels import transfer

        console().print(f"{transfer.export(file)} entries written to {file}", soft_wrap=True)


@configs.command("import")
def cache_import(file: Annotated[Path, typer.Argument(help="a file that `qlab cache export` wrote")]) -> None:
    """Merge the entries of a file into the user's; of two for the same key the later one stays."""
    with kernel_refusals():
        from qlab_kernels import cache, transfer

        console().print(f"{transfer.import_(file)} entries taken into {cache.folder()}", soft_wrap=True)


@configs.command("clear")
def cache_clear(
    op: Annotated[str, typer.Option("--op", help="only those of this operator")] = "",
    capability: Annotated[str, typer.Option("--capability", help="only those of this one: sm90, cpu-amx")] = "",
) -> None:
    """Remove the user's entries; what this package ships stays."""
    with kernel_refusals():
        from qlab_kernels import transfer

        console().print(f"{transfer.clear(op, capability)} entries removed")


def run(typed: typer.Typer) -> None:
    """Run a command line; what qlab refuses becomes one line on stderr and exit code 2."""
    try:
        typed(args=_spread(sys.argv[1:]))
    except QlabError as error:
        print(f"qlab: {error}", file=sys.stderr)
        sys.exit(2)


def _spread(arguments: Sequence[str]) -> list[str]:
    """`--calib a b` as `--calib a --calib b`: files that follow the first one belong to the same option."""
    spread: list[str] = []
    option: str | None = None
    for before, argument in zip(["", *arguments], arguments):
        if argument.startswith("-"):
            option = argument if argument in SEVERAL else None
        elif option and before != option and Path(argument).is_file():
            spread.append(option)
        spread.append(argument)
    return spread


def main() -> None:
    """The `qlab` command."""
    run(app)
