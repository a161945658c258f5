"""The commands. Bad input is one sentence on stderr and exit code 2.

Modules import what they need when a command runs, so that `qlab --help` waits for neither torch nor
transformers.
"""

from typing import Annotated

import typer

from qlab import installed_version
from qlab.cli import kernels
from qlab.cli.chatting import chat
from qlab.cli.directories import convert, inspect, verify
from qlab.cli.evaluating import evaluate
from qlab.cli.generating import answer
from qlab.cli.options import HELP_BY
from qlab.cli.quantizing import plan, quantize
from qlab.cli.running import run
from qlab.cli.schemes import schemes
from qlab.cli.serving import serve
from qlab.cli.statistics import statistics
from qlab.cli.working import work_on

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=HELP_BY,
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"qlab {installed_version()}")
        raise typer.Exit


@app.callback()
def options_of_qlab(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_version, is_eager=True, help="say which qlab this is"
        ),
    ] = False,
) -> None:
    """Quantize language models: plan, quantize, evaluate, convert, verify and inspect."""


for command in (plan, quantize, convert, verify, inspect, schemes, kernels.tune):
    app.command()(command)
app.command("eval")(evaluate)
app.command("run")(answer)
app.command()(chat)
app.command()(serve)
app.command("work")(work_on)
app.add_typer(kernels.configs, name="cache")
app.add_typer(statistics, name="stats")


def main() -> None:
    """The `qlab` command."""
    run(app)
