"""`python -m qlab.bench`: without a subcommand, the methods compared on the demo model."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qlab.bench.gpu.command import gpu
from qlab.cli.kernels import Activations, KernelDevice, kernel_device, kernel_refusals, tune
from qlab.cli.options import (
    HELP_BY,
    METHOD_HELP,
    Asymmetric,
    CacheName,
    Calib,
    InputsName,
    Json,
    Length,
    SchemeName,
    Seed,
    Seeds,
    SpecName,
    StaticName,
    listed,
)
from qlab.cli.output import console, report
from qlab.cli.recipes import is_file
from qlab.cli.running import run
from qlab.errors import QlabError
from qlab.process.extras import needed
from qlab.process.progress import say

DEFAULT = "methods"


class WithDefault(TyperGroup):
    """A group of commands, in which arguments that name none of them go to DEFAULT."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=WithDefault, add_completion=False, pretty_exceptions_enable=False, context_settings=HELP_BY
)


@app.callback(
    epilog=(
        f"Without a command it is `{DEFAULT}`, which then takes the options: `{DEFAULT} --help` "
        "lists them."
    )
)
def group() -> None:
    """Measure qlab."""


@app.command()
def methods(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", help="a model directory, or 'demo'")] = "demo",
    names: Annotated[
        str,
        typer.Option("--methods", help=f"with commas between them: {METHOD_HELP}; or FILE.py:NAME"),
    ] = "rtn,awq,gptq",
    spec: SpecName = "int4-g64",
    asymmetric: Asymmetric = False,
    scheme: SchemeName = "",
    kv_cache: CacheName = "",
    static: StaticName = "absmax",
    calib: Calib = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="text or jsonl files (default: held-out demo)"),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="calibration windows")] = 32,
    length: Length = 512,
    seed: Seed = 0,
    seeds: Seeds = 1,
    windows: Annotated[int, typer.Option("--windows", min=2, help="evaluation windows")] = 16,
    inputs: InputsName = "quantized",
    out: Annotated[
        Path | None, typer.Option("--out", help="directory (default: one in $QLAB_HOME)")
    ] = None,
    json_file: Json = None,
) -> None:
    """Compare quantization methods with each other and with the unquantized model on held-out
    text."""
    from qlab.algebra.bind import uses_data
    from qlab.bench.methods import compare_methods, table
    from qlab.cli.choices import recipe_of, refuse_unused, typed_in
    from qlab.cli.schemes import chosen_scheme, refuse_unfilled
    from qlab.files.place import refuse_inside

    filled = chosen_scheme(scheme, kv_cache, static, spec, typed_in(context))
    if filled:
        refuse_unfilled(filled, names, None)
    chosen = [name if is_file(name) else name.lower() for name in listed(names)]
    recipes = [recipe_of(name, spec, asymmetric, filled, static) for name in chosen]
    if not any(uses_data(recipe) for recipe in recipes):
        refuse_unused(calib, None, "none of these methods observes anything")
    if json_file and out:
        refuse_inside(json_file, [Path(out).expanduser().resolve()])
    record = compare_methods(
        model,
        chosen,
        spec,
        asymmetric=asymmetric,
        calib=calib,
        text=text,
        samples=samples,
        length=length,
        seed=seed,
        seeds=seeds,
        windows=windows,
        inputs=inputs,
        out=out,
        scheme=filled,
        static=static,
    )
    console().print(table(record))
    report(record, json_file)
    console().print(
        f"models, bench.json, methods.png and layers.png are in {record['out']}", soft_wrap=True
    )


@app.command()
def rows(
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", help="SPEC, or SPEC:INPUTS, with commas between them (default: several)"
        ),
    ] = None,
    shapes: Annotated[str, typer.Option("--shapes", help="NxK,...")] = "2048x2048",
    m: Annotated[str, typer.Option("--m", help="numbers of tokens")] = "1,4,16,128",
    device: KernelDevice = "",
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.01, help="spent on one product at most")
    ] = 0.3,
    json_file: Json = None,
) -> None:
    """One product by every kernel of qlab.lower's table that takes it, beside torchao's and the
    dense one."""
    from qlab.bench.rows import FORMS, measure, table
    from qlab.lowering.tuning.shapes import parse_shapes, parse_tokens

    forms = [_form(text) for text in listed(weights)] if weights else FORMS
    where = kernel_device(device)
    with kernel_refusals():
        record = measure(forms, parse_shapes(shapes), parse_tokens(m), where, seconds, say)
    console().print(table(record))
    report(record, json_file)


def _form(text: str) -> tuple[str, str | None]:
    """'int8-channel:int8-token' as weights and inputs."""
    from qlab.algebra.spec import parse_input_spec

    weights, _, inputs = text.lower().partition(":")
    return weights, str(parse_input_spec(inputs).spec) if inputs else None


@app.command()
def generate(
    directories: Annotated[list[Path], typer.Argument(help="directories that qlab quantized")],
    engines: Annotated[
        str | None,
        typer.Option("--engines", help="names with semicolons between them (default: all)"),
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", help="tokens of the prompt")] = 512,
    new: Annotated[int, typer.Option("--new", help="tokens to generate")] = 128,
    repeat: Annotated[int, typer.Option("--repeat", help="turns that every engine takes")] = 3,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="of the CPU (default: torch's)")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda")] = "cpu",
    json_file: Json = None,
) -> None:
    """Prefill and decode rates of quantized directories, lowered, against the same models in
    bfloat16."""
    import torch

    from qlab.bench.generate import ENGINES, measure, table

    if threads:
        torch.set_num_threads(threads)
    names = listed(engines.lower(), ";") if engines else ENGINES
    records = []
    for directory in directories:
        with kernel_refusals():
            record = measure(
                directory, names, prompt=prompt, new=new, repeat=repeat, device=device, said=say
            )
        records.append(record)
        console().print(table(record))
    report(records, json_file)


@app.command()
def matmul(
    shapes: Annotated[
        str | None,
        typer.Option("--shapes", help="NxK with commas between them (default: the common ones)"),
    ] = None,
    m: Annotated[
        str | None, typer.Option("--m", help="numbers of tokens (default: 1,2,4 to 4096)")
    ] = None,
    dtype: Activations = "bfloat16",
    group: Annotated[int, typer.Option("--group", min=1, help="weights per scale")] = 128,
    asymmetric: Asymmetric = False,
    contenders: Annotated[
        str | None,
        typer.Option("--contenders", help="names with commas between them (default: all)"),
    ] = None,
    device: KernelDevice = "",
    tuned: Annotated[
        bool, typer.Option("--tune", help="measure the configurations first and keep them")
    ] = False,
    budget: Annotated[
        float,
        typer.Option(
            "--budget", min=0, help="seconds of tuning for each shape and number of tokens"
        ),
    ] = 30.0,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="at most, for one median")
    ] = 1.0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="of the CPU (default: torch's)")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="also draw a figure (PNG)")] = None,
    json_file: Json = None,
) -> None:
    """One int4 product against the library's, the compiler's and other int4 kernels, for every
    shape and number of tokens."""
    from qlab.bench.contenders import CONTENDERS
    from qlab.bench.matmul import SHAPES, SHAPES_CPU, TOKENS, compare_matmuls
    from qlab.lowering.tuning.shapes import SHORT, parse_shapes, parse_tokens

    _prepare(plot, threads)
    where = kernel_device(device)
    with kernel_refusals():
        record = compare_matmuls(
            parse_shapes(shapes or (SHAPES_CPU if where == "cpu" else SHAPES)),
            parse_tokens(m or TOKENS),
            dtype=SHORT.get(dtype, dtype),
            group=group,
            zeros=asymmetric,
            device=where,
            names=list(dict.fromkeys(listed(contenders))) if contenders else list(CONTENDERS),
            tune=tuned,
            budget=budget,
            seconds=seconds,
            said=say,
        )
    _show_matmuls(record, json_file, plot)


def _prepare(plot: Path | None, threads: int | None) -> None:
    """Refuse a figure that could not be written, before anything is measured, and set the number of
    threads."""
    import torch

    from qlab.files.figures import refuse_foreign_figure

    if plot:
        needed("matplotlib", "bench")
        refuse_foreign_figure(plot)
        if not plot.absolute().parent.is_dir():
            raise QlabError(
                f"{plot} cannot be written; give --plot a file in a folder that is there"
            )
    if threads:
        torch.set_num_threads(threads)


def _show_matmuls(record: dict[str, Any], json_file: Path | None, plot: Path | None) -> None:
    """Print a comparison, then write it. A file that cannot be written takes no measured figure
    with it."""
    from qlab.bench.matmul_table import table, verdict
    from qlab.bench.plots import draw_matmuls

    console().print(table(record))
    for line in verdict(record):
        console().print(line, soft_wrap=True, highlight=False)
    report(record, json_file)
    if plot:
        draw_matmuls(record, plot.resolve())


@app.command()
def pack(
    n: Annotated[int, typer.Option("--n", min=32, help="rows of the weight")] = 4096,
    k: Annotated[int, typer.Option("--k", min=128, help="columns of the weight")] = 4096,
    reps: Annotated[int, typer.Option("--reps", min=3, help="calls for one median")] = 10,
    json_file: Json = None,
) -> None:
    """Codes to int32 words and back on one core, beside the packers of compressed-tensors and
    GPTQModel."""
    from qlab.bench.pack import compare_packers, table

    record = compare_packers(n, k, reps=reps, said=say)
    console().print(table(record))
    report(record, json_file)


app.command("tune")(tune)
app.command("gpu")(gpu)


@app.command()
def modelled(
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="the folder to write: the package's own is kernels/qlab_kernels/tuned"
        ),
    ],
    workers: Annotated[int, typer.Option("--workers", min=1, help="processes that compile")] = 1,
) -> None:
    """Write the shipped config tables of all capabilities from the cost model, every kernel in them
    compiled and checked."""
    with kernel_refusals():
        from qlab_kernels.modelled import write

        for path in write(out, workers):
            say(f"{path}: {path.stat().st_size} bytes")


def main() -> None:
    """The command line of the benches."""
    run(app)


if __name__ == "__main__":
    main()
