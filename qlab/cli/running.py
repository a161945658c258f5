"""How a command line runs: what qlab or the system refuses becomes one sentence on stderr."""

import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import typer

from qlab.errors import QlabError, ToldElsewhere, printable, refusal_of

SEVERAL = ("--calib", "--images", "--text")  # options that take several files
STOPPED = 130  # the exit code of a command that Ctrl-C ended


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
    except ToldElsewhere:
        sys.exit(2)
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
