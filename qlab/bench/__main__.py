"""`python -m qlab.bench`: without a subcommand, the methods compared on the demo model."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qlab.cli import Asymmetric, Calib, InputsName, Json, Length, Seed, SpecName, console, report, run

DEFAULT = "methods"


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
    console().print(table(record))
    console().print(f"models, bench.json, methods.png and layers.png are in {record['out']}", soft_wrap=True)


def main() -> None:
    """The command line of the benches."""
    run(app)


if __name__ == "__main__":
    main()
