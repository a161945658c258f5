"""What the commands share: their options, a console, JSON results, and one sentence for whatever
qlab refuses."""

import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from qlab.errors import QlabError, printable, refusal_of

SEVERAL = ("--calib", "--images", "--text")  # options that take several files
STOPPED = 130  # the exit code of a command that Ctrl-C ended
WIDTH = 132  # of a table that no terminal shows

HELP_BY = {"help_option_names": ["-h", "--help"]}
# What the names below stand for is imported when a command runs; help lists them without waiting
# for torch.
METHODS = ("rtn", "rtn-weighted", "hqq", "awq", "gptq", "awq-gptq", "gptaq")
CODECS = ("compressed-tensors", "gptq", "gptq_desc_act", "gptq_v2", "gptq_v2_desc_act", "awq")
TARGETS = ("vllm", "lmdeploy", "transformers", "sglang")


def lower(name: str | None) -> str | None:
    """Names are meant without regard to case."""
    return name.lower() if name else name


Model = Annotated[str, typer.Argument(help="a model directory, or 'demo'")]
MethodName = Annotated[str, typer.Option("--method", callback=lower, help=", ".join(METHODS))]
SpecName = Annotated[
    str,
    typer.Option(
        "--spec",
        callback=lower,
        help=(
            "int<bits>-g<group>, -channel or -tensor; fp8-tensor, fp8-channel, fp8-b128x128, "
            "mxfp4, mxfp6, mxfp8, nvfp4"
        ),
    ),
]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="with a zero point per scale")]
Calib = Annotated[
    list[Path] | None, typer.Option("--calib", help="text or jsonl files (default: the demo text)")
]
Images = Annotated[
    list[Path] | None,
    typer.Option("--images", help="instead of --calib: jsonl samples of text and images"),
]
AllExperts = Annotated[
    bool, typer.Option("--calibrate-all-experts", help="statistics of experts from every token")
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples", min=1, help="calibration windows; time grows with --samples x --length"
    ),
]
Length = Annotated[int, typer.Option("--length", min=2, help="tokens per window")]
Seed = Annotated[int, typer.Option("--seed", help="chooses the calibration windows")]
Device = Annotated[
    str, typer.Option("--device", callback=lower, help="where one block at a time is worked on")
]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory", help="budget in GiB, for experts in parts; a plan above it is refused"
    ),
]
InputsName = Annotated[
    str,
    typer.Option("--inputs", callback=lower, help="calibrate on 'quantized' or 'reference' inputs"),
]
CodecName = Annotated[
    str, typer.Option("--codec", callback=lower, help=f"the format to write: {', '.join(CODECS)}")
]
TargetName = Annotated[
    str,
    typer.Option("--target", callback=lower, help=f"an engine to load it: {', '.join(TARGETS)}"),
]
Keep = Annotated[
    list[str] | None, typer.Option("--keep", help="GLOB of sites in blocks that stay as they are")
]
Outside = Annotated[
    list[str] | None,
    typer.Option("--outside", help="GLOB=SPEC: round linears around the blocks to nearest"),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="replace an output directory that qlab wrote and nobody changed"
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="continue a killed run of the same job, or start it")
]


def _writable(path: Path | None) -> Path | None:
    """Before the work, not after it."""
    from qlab.files.place import report_place

    return None if path is None else report_place(path)


Json = Annotated[
    Path | None,
    typer.Option("--json", help="also write the result to this file", callback=_writable),
]


def console(width: int = WIDTH) -> Console:
    """Of the width of the terminal or $COLUMNS, or wide enough for every table where there is
    neither."""
    plain: dict[str, Any] = {"markup": False, "emoji": False}  # paths and names are what they are
    shown = _Printable(**plain)
    known = shown.is_terminal or "COLUMNS" in os.environ
    return shown if known else _Printable(width=width, **plain)


class _Printable(Console):
    """Every string, in a cell of a table too, is shown as it reads, whatever file it comes from."""

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        return super().render_str(printable(text), **options)


@contextmanager
def loading() -> Iterator[None]:
    """Around a command's imports. What they make stays until the process ends, and the garbage
    collector would go through it again and again, at exit too: a fourth of the time that torch and
    transformers take to import."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def listed(text: str, separator: str = ",") -> list[str]:
    """The names in an option."""
    return [name.strip() for name in text.split(separator)]


def resolved(model: str) -> Path:
    """The directory that a name stands for."""
    from qlab.demo.hub import demo_model, is_demo_name

    return demo_model() if is_demo_name(model) else Path(model)


def report(value: Any, path: Path | None) -> None:
    """Write a result as JSON where the user asked for it."""
    if path is not None:
        from qlab.files.atomic import write_json
        from qlab.files.ownership import sealed

        write_json(path, sealed(value))


def output_place(
    out: Path,
    model: str,
    files: Sequence[Path],
    overwrite: bool,
    resume: bool,
    json_file: Path | None,
) -> None:
    """Refuse an output, and a report inside it, before anything is read; files: what is read beside
    the model."""
    from qlab.files.place import place, refuse_early, refuse_inside, working

    folder = place(out, resolved(model), files)
    refuse_early(folder, overwrite, resume)
    if json_file is not None:
        refuse_inside(json_file, [folder, working(folder)])


def run(typed: typer.Typer) -> None:
    """Run a command line; what qlab or the system refuses becomes one line on stderr and exit code
    2."""
    try:
        _run(typed)
    except BrokenPipeError:  # whoever read the output has enough of it
        _drop_output()
        sys.exit(1)
    except OSError as error:
        _drop_output()
        _end(refusal_of(error), 2)
    except (QlabError, RecursionError) as error:
        _end(error if isinstance(error, QlabError) else refusal_of(error), 2)
    except MemoryError:
        _end("this machine has too little memory for it; free some, or give less at a time", 2)
    except KeyboardInterrupt:
        _end("stopped before its end; quantize and convert go on from there with --resume", STOPPED)


def _run(typed: typer.Typer) -> None:
    try:
        with _printable_logs():
            typed(args=_spread(sys.argv[1:]))
    except SystemExit as end:
        if end.code == STOPPED:
            raise KeyboardInterrupt from end
        raise
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()


@contextmanager
def _printable_logs() -> Iterator[None]:
    """What other libraries log of a file's values reaches the terminal as it reads."""
    make = logging.getLogRecordFactory()

    def printable_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.msg = printable(record.msg) if isinstance(record.msg, str) else record.msg
        if isinstance(record.args, tuple):
            record.args = tuple(
                printable(arg) if isinstance(arg, str) else arg for arg in record.args
            )
        return record

    logging.setLogRecordFactory(printable_record)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)


def _drop_output() -> None:
    """What could not be written is not tried again when the process ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(why: object, code: int) -> NoReturn:
    with suppress(OSError):
        print(f"qlab: {why}", file=sys.stderr, flush=True)
    sys.exit(code)


def _spread(arguments: Sequence[str]) -> list[str]:
    """`--calib a b` as `--calib a --calib b`: files that follow the first one belong to the same
    option."""
    spread: list[str] = []
    option: str | None = None
    for before, argument in zip(["", *arguments], arguments):
        if argument.startswith("-"):
            option = argument if argument in SEVERAL else None
        elif option and before != option and Path(argument).is_file():
            spread.append(option)
        spread.append(argument)
    return spread
