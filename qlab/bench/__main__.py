"""`python -m qlab.bench`: without a subcommand, the methods compared on the demo model."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from qlab.cli import Asymmetric, Calib, InputsName, Json, Length, Seed, SpecName, report, run

DEFAULT = "methods"
WIDTH = 132  # of a table that no terminal shows


class WithDefault(TyperGroup):
    """A group of commands; arguments that start with none of them go to DEFAULT."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=WithDefault, add_completion=False, pretty_exceptions_enable=False)


@app.callback(epilog=f"Without a command it is `{DEFAULT}`, which then takes the options: `{DEFAULT} --help` lists them.")
def group() -> None:
    """Measure qlab."""


@app.command()
def methods(
    model: Annotated[str, typer.Option("--model", help="a model directory, or 'demo'")] = "demo",
    names: Annotated[str, typer.Option("--methods", help="names of qlab.METHODS with commas between them")] = "rtn,awq,gptq",
    spec: SpecName = "int4-g64", asymmetric: Asymmetric = False, calib: Calib = None,
    text: Annotated[list[Path] | None, typer.Option("--text", help="text or jsonl files (default: held-out demo)")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="calibration windows")] = 32, length: Length = 512,
    seed: Seed = 0, windows: Annotated[int, typer.Option("--windows", min=2, help="evaluation windows")] = 16,
    inputs: InputsName = "quantized",
    out: Annotated[Path | None, typer.Option("--out", help="directory (default: one in $QLAB_HOME)")] = None,
    json_file: Json = None,
) -> None:  # fmt: skip
    """Compare quantization methods with each other and with the unquantized model on held-out text."""
    from qlab.bench.methods import compare_methods, table

    record = compare_methods(model, names.split(","), spec, asymmetric=asymmetric, calib=calib, text=text, samples=samples,
                             length=length, seed=seed, windows=windows, inputs=inputs, out=out)  # fmt: skip
    report(record, json_file)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table(record))
    console.print(f"models, bench.json, methods.png and layers.png are in {record['out']}", soft_wrap=True)


@app.command()
def generate(
    directories: Annotated[list[Path], typer.Argument(help="directories that qlab quantized")],
    engines: Annotated[str | None, typer.Option("--engines", help="names with semicolons between them (default: all)")] = None,
    prompt: Annotated[int, typer.Option("--prompt", help="tokens of the prompt")] = 512,
    new: Annotated[int, typer.Option("--new", help="tokens to generate")] = 128,
    repeat: Annotated[int, typer.Option("--repeat", help="turns that every engine takes")] = 3,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="of the CPU (default: torch's)")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda")] = "cpu", json_file: Json = None,
) -> None:  # fmt: skip
    """Prefill and decode rates of quantized directories, lowered, against the same models in bfloat16."""
    import torch

    from qlab.bench.generate import ENGINES, measure, table

    if threads:
        torch.set_num_threads(threads)
    names = [name.strip() for name in engines.split(";")] if engines else ENGINES
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    records = []
    for directory in directories:
        records.append(measure(directory, names, prompt=prompt, new=new, repeat=repeat, device=device))
        console.print(table(records[-1]))
    report(records, json_file)


def main() -> None:
    """The command line of the benches."""
    run(app)


if __name__ == "__main__":
    main()
