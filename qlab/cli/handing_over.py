"""serve --engine: the same options, for another engine."""

from pathlib import Path
from typing import Annotated

import typer

from qlab.cli.choices import typed_in
from qlab.cli.options import lower, resolved
from qlab.errors import QlabError

EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        callback=lower,
        help="serve with vllm, lmdeploy or sglang: checks that it loads the directory, and runs it",
    ),
]
EnginePython = Annotated[
    Path | None,
    typer.Option("--engine-python", help="the interpreter of the engine's environment"),
]
PrintCommand = Annotated[
    bool, typer.Option("--print", help="with --engine: print its command, and run nothing")
]
TensorParallel = Annotated[
    int | None, typer.Option("--tensor-parallel", min=1, help="with --engine: devices")
]
# parameters that are no options of the engine's server
OWN = {"model", "engine", "engine_python", "print_command", "api_key", "api_key_file"}
NEED_ENGINE = {
    "engine_python": "--engine-python",
    "print_command": "--print",
    "tensor_parallel": "--tensor-parallel",
}


def refuse_without_engine(context: typer.Context) -> None:
    """Refuse options that say how an engine is run, where none is named."""
    given = [option for name, option in NEED_ENGINE.items() if name in typed_in(context)]
    if given:
        raise QlabError(f"{given[0]} goes with --engine, which was not given; name an engine")


def hand_over(context: typer.Context, keys: list[str]) -> None:
    """Run the engine on the directory in the place of this process, or print the command."""
    from qlab.files.checkpoint import open_checkpoint
    from qlab.serving.engines import command_for, refuse_missing

    given = context.params
    model = open_checkpoint(resolved(given["model"]))
    typed = typed_in(context) - OWN
    options = {
        "--host": given["host"],
        "--port": str(given["port"]),
        "--served-model-name": given["name"] or model.path.name,
    }
    for parameter in context.command.params:
        if parameter.name in typed:
            options[parameter.opts[0]] = str(given[parameter.name])
    python = given["engine_python"]
    command = command_for(given["engine"], model, options, keys, python)
    if given["print_command"]:
        print(command)
        return
    refuse_missing(given["engine"], python)
    command.run()
