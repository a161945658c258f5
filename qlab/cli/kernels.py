"""tune and cache: configurations of kernels."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qlab.cli.options import Asymmetric, Json
from qlab.cli.output import console, report
from qlab.errors import QlabError


@contextmanager
def kernel_refusals() -> Iterator[None]:
    """Around calls of the kernels' package: what it refuses is refused by qlab."""
    from qlab_kernels.capability import KernelError

    try:
        yield
    except KernelError as error:
        raise QlabError(str(error)) from error


Activations = Annotated[
    str,
    typer.Option("--dtype", help="of the activations: bfloat16 or float16, also bf16, fp16"),
]
KernelDevice = Annotated[
    str, typer.Option("--device", help="cpu or cuda (default: cuda where there is one)")
]


def kernel_device(name: str) -> str:
    """The device of an option `--device`: where it was left out, cuda where there is one."""
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def tune(
    model: Annotated[
        str | None,
        typer.Argument(help="a directory that qlab quantized: its shapes (or give --shapes)"),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option("--shapes", help="NxK with commas between them: rows x columns of weights"),
    ] = None,
    m: Annotated[
        str, typer.Option("--m", help="numbers of tokens (of experts: rows of all)")
    ] = "1,2,4,8,16,32,64,128,256,512,1024",
    dtype: Activations = "bfloat16",
    group: Annotated[
        int | None,
        typer.Option("--group", min=1, help="weights per scale of --shapes (default: 128)"),
    ] = None,
    kernel: Annotated[
        str,
        typer.Option(
            "--kernel",
            help="of --shapes: int4, or on a GPU int4_int8 or int4_fp8, or int8_int8 or fp8_fp8, "
            "in whole rows or a --group",
        ),
    ] = "int4",
    asymmetric: Asymmetric = False,
    experts: Annotated[
        int,
        typer.Option(
            "--experts", min=0, help="of each of --shapes, multiplied in one grouped product"
        ),
    ] = 0,
    device: KernelDevice = "",
    budget: Annotated[
        float, typer.Option("--budget", min=0, help="seconds for each shape and number of tokens")
    ] = 30.0,
    retune: Annotated[bool, typer.Option("--retune", help="also what was measured before")] = False,
    json_file: Json = None,
) -> None:
    """Time the configurations of int4 products on this machine and keep the fastest in the config
    cache."""
    from qlab.lowering.tuning.octet_pairs import WHOLE_ROWS
    from qlab.lowering.tuning.shapes import SHORT, Form, parse_shapes, parse_tokens, weights_of
    from qlab.lowering.tuning.tune import tune_shapes

    _refuse_both(model, shapes, bool(group or asymmetric or experts))
    if model is not None and kernel != "int4":
        raise QlabError(f"{model} has its own kernels; --kernel goes with --shapes")
    usual = 128 if kernel.startswith("int4") else WHOLE_ROWS
    where = kernel_device(device)
    with kernel_refusals():
        if shapes is None:
            sizes_of_form = weights_of(str(model), where)
        else:
            sizes_of_form = {Form(group or usual, asymmetric, experts): parse_shapes(shapes)}
    rows: list[dict[str, Any]] = []
    for form, sizes in sizes_of_form.items():
        rows += tune_shapes(
            sizes,
            parse_tokens(m),
            form,
            dtype=SHORT.get(dtype, dtype),
            device=where,
            kernel=kernel,
            budget=budget,
            retune=retune,
            said=lambda line: print(line, file=sys.stderr, flush=True),
        )
    _report_entries(rows, json_file)


def _refuse_both(model: str | None, shapes: str | None, describes_weights: bool) -> None:
    """Refuse options that describe weights beside a directory, which has its own."""
    if (model is None) == (shapes is None):
        raise QlabError("give either a directory that qlab quantized or --shapes")
    if model is not None and describes_weights:
        raise QlabError(
            f"{model} has its own groups, zero points and experts; --group, --asymmetric and "
            "--experts go with --shapes"
        )


def _report_entries(rows: list[dict[str, Any]], json_file: Path | None) -> None:
    from qlab_kernels import cache

    timings = sum(row["timings"] for row in rows)
    console().print(
        f"{len(rows)} entries, {timings} timings; they are in {cache.folder()}", soft_wrap=True
    )
    report({"rows": rows, "folder": str(cache.folder())}, json_file)


configs = typer.Typer(
    no_args_is_help=True,
    help="The config cache: which configuration of a kernel runs for which shape.",
)


@configs.command("list")
def cache_list(
    shipped: Annotated[
        bool, typer.Option("--shipped", help="also what this package ships")
    ] = False,
    json_file: Json = None,
) -> None:
    """The entries, one a line."""
    with kernel_refusals():
        from qlab_kernels import cache, transfer
        from qlab_kernels.config import OPERATORS, kernel_revision

        rows = [row for row in transfer.listing() if shipped or row[0] == "user"]
        table = Table(
            "file",
            "product",
            "config",
            "us",
            "GB/s",
            "source",
            "device",
            "date",
            title=str(cache.folder()),
        )
        for layer, name, key, entry in rows:
            op = name.split(".")[0]
            revision = kernel_revision(op) if op in OPERATORS else ""
            old = ", stale" if cache.stale(entry, key, revision) else ""
            values = entry.json()["config"].items()
            config = " ".join(f"{field}={value}" for field, value in values if field != "kind")
            table.add_row(
                name.removesuffix(".json"),
                str(key).rsplit("/", 2)[0],
                f"{entry.config.kind} {config}",
                f"{entry.us:.1f}",
                f"{entry.gbps:.0f}",
                f"{layer}, {entry.source}{old}",
                entry.device,
                entry.date,
            )
        console(width=240).print(table)
        records = [
            {"layer": layer, "file": name, "key": str(key), **entry.json()}
            for layer, name, key, entry in rows
        ]
        report(records, json_file)


@configs.command("export")
def cache_export(file: Annotated[Path, typer.Argument(help="the JSON file to write")]) -> None:
    """Write the user's entries into one file."""
    with kernel_refusals():
        from qlab_kernels import transfer

        console().print(f"{transfer.export(file)} entries written to {file}", soft_wrap=True)


@configs.command("import")
def cache_import(
    file: Annotated[Path, typer.Argument(help="a file that `qlab cache export` wrote")],
) -> None:
    """Merge the entries of a file into the user's; of two for the same key the later one stays."""
    with kernel_refusals():
        from qlab_kernels import cache, transfer

        console().print(
            f"{transfer.import_(file)} entries taken into {cache.folder()}", soft_wrap=True
        )


@configs.command("clear")
def cache_clear(
    op: Annotated[str, typer.Option("--op", help="only those of this operator")] = "",
    capability: Annotated[
        str, typer.Option("--capability", help="only those of this one: sm90, cpu-amx")
    ] = "",
) -> None:
    """Remove the user's entries; what this package ships stays."""
    with kernel_refusals():
        from qlab_kernels import transfer

        console().print(f"{transfer.clear(op, capability)} entries removed")
