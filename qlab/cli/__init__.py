"""The commands. Bad input is one sentence on stderr and exit code 2.

Modules import what they need when a command runs, so that `qlab --help` waits for neither torch nor transformers.
"""

import typer

from qlab.cli import kernels
from qlab.cli.directories import convert, inspect, verify
from qlab.cli.options import run
from qlab.cli.quantizing import evaluate, plan, quantize

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Quantize language models: plan, quantize, evaluate, convert, verify and inspect.")  # fmt: skip
for command in (plan, quantize, convert, verify, inspect, kernels.tune):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(kernels.configs, name="cache")


def main() -> None:
    """The `qlab` command."""
    run(app)
