"""inspect, convert and verify: model directories in any format that qlab reads."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qlab.cli.kernels import KernelDevice, kernel_device
from qlab.cli.options import Asymmetric, CodecName, Json, Model, Overwrite, Resume, lower, resolved
from qlab.cli.output import console, output_place, report
from qlab.cli.running import loading
from qlab.errors import QlabError
from qlab.process.shown import some


def inspect(
    directory: Model,
    run: Annotated[
        bool, typer.Option("--run", help="which kernel multiplies each weight here, and why")
    ] = False,
    device: KernelDevice = "",
    activations: Annotated[
        str | None,
        typer.Option(
            "--activations", callback=lower, help="with --run: 'int8' lets kernels round them"
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """What a directory holds, in any format that qlab reads: specs, tensors, bytes, and what qlab
    measured if it wrote it. With --run, which kernel `lower` takes for each weight on this machine,
    and why the faster ones do not take it."""
    if not run and (device or activations):
        raise QlabError("--device and --activations say where weights run; give --run with them")
    with loading():
        from qlab.directories.inspect import inspect
        from qlab.lowering.rows import rows_of

    path = resolved(directory)
    inspection = inspect(path)
    rows = rows_of(path, kernel_device(device), activations=activations) if run else None
    divided = _divided(path)
    console().print(inspection if rows is None else rows)
    console().print(f"tensor parallel: {divided['says']}", soft_wrap=True)
    shown = {**inspection.json(), "tensor_parallel": divided}
    report(shown | ({} if rows is None else {"run": rows.json()}), json_file)


def _divided(path: Path) -> dict[str, Any]:
    """Over how many ranks a model can be divided, from headers alone; of one whose plan is not
    known why it is run by one process."""
    import qlab
    from qlab.model.parallel import degrees

    if path.is_file():
        return {"degrees": [1], "says": "a file in GGUF is run by one process"}
    try:
        legal = degrees(qlab.open(path))
    except QlabError as error:
        return {"degrees": [1], "says": str(error)}
    ranks = "ranks" if len(legal) > 1 else "rank"
    return {"degrees": [*legal], "says": f"over {', '.join(map(str, legal))} {ranks}"}


def convert(
    directory: Annotated[str, typer.Argument(help="a quantized model directory, or a GGUF file")],
    codec: CodecName,
    out: Annotated[Path, typer.Option("--out", help="the directory to write, or a .gguf file")],
    requantize: Annotated[
        str | None,
        typer.Option(
            "--requantize", callback=lower, help="a spec: round what the format cannot hold to it"
        ),
    ] = None,
    asymmetric: Asymmetric = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    json_file: Json = None,
) -> None:
    """The same codes in another format; refuses, with the sites, whatever would be lost.
    --requantize rounds anew instead."""
    with loading():
        from qlab.algebra.spec import parse_spec
        from qlab.directories.convert import convert

    if asymmetric and not requantize:
        raise QlabError(
            "--asymmetric says how --requantize rounds, which was not given; leave it out, or "
            "give both"
        )
    output_place(out, directory, [], overwrite, resume, json_file, codec)
    grid = parse_spec(requantize, symmetric=not asymmetric) if requantize else None
    result = convert(
        resolved(directory), codec, out, requantize=grid, overwrite=overwrite, resume=resume
    )
    kept = len(result.sites) - len(result.requantized)
    console().print(
        f"{result.path}: {kept} weights with the same codes, {len(result.requantized)} rounded "
        "anew",
        soft_wrap=True,
    )
    for kind in sorted(set(result.dequantized.values())):
        names = [name for name, was in result.dequantized.items() if was == kind]
        console().print(f"{kind} blocks dequantized to bfloat16: {some(names)}", soft_wrap=True)
    for name, error in result.requantized.items():
        console().print(f"{name}: {error:.3e} of its norm away from what it was", soft_wrap=True)
    report(result.json(), json_file)


def verify(
    directory: Model,
    against: Annotated[
        str, typer.Option("--against", help="the model it was made from, or 'demo'")
    ],
    json_file: Json = None,
) -> None:
    """Is a directory what it claims to be? Grids, certificates and the reference's tensors; exit
    code 1 if something is not."""
    with loading():
        from qlab.directories.verify import verify

    verdict = verify(resolved(directory), resolved(against))
    console().print(verdict)
    report(verdict.json(), json_file)
    if verdict.faults:
        raise typer.Exit(1)
