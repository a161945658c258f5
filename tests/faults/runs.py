"""Every run that writes a model: quantize by each method, convert, model-free.

Models are tiny. What an untroubled run writes is made when it is first asked for.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from families import tiny
from killing import finish, start
from model_folders import add_tokenizer, contents, random_tokens
from quick import QUICK

import qlab
from faults.events import WRITING, counting, each_event
from qlab.methods.kv import kv_cache, parse_cache_spec

INT4, INT8 = (qlab.parse_spec(name) for name in ("int4-g32", "int8-g32"))
# Low ranks have no place in any format: what uses these is refused before it begins.
UNWRITTEN = ("lqer", "l2qer", "eora")
METHODS = {
    **{name: method for name, method in QUICK.items() if name not in UNWRITTEN},
    "kv": lambda spec: kv_cache(parse_cache_spec("int8-g16")),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way to write an output.

    name: of the run. write: write(out, **options), of which `resume` and `overwrite` may be two.
    whole: a folder in which the untroubled run writes, and notes how long it took and how many
    events it had.
    """

    name: str
    write: Callable[..., object]
    whole: Path

    @property
    def noted(self) -> tuple[float, int]:
        """The seconds and the number of events of the untroubled run, which is made here if nobody
        did."""
        note = self.whole / "note.json"
        if not note.exists():
            self.whole.mkdir(parents=True, exist_ok=True)
            events, began = self.whole / "events", time.monotonic()

            def counted() -> None:
                each_event(self.whole / "out", WRITING, counting(events))
                self.write(self.whole / "out")

            assert finish(start(quietly(counted))) == 0, f"{self.name} fails without a fault"
            told = [time.monotonic() - began, events.stat().st_size]
            note.write_text(json.dumps(told))
        return tuple(json.loads(note.read_text()))

    @property
    def expected(self) -> dict[str, bytes]:
        """What the untroubled run writes."""
        assert self.noted
        return contents(self.whole / "out")


def quietly(run: Callable[[], object], told: Path | None = None) -> Callable[[], None]:
    """`run` with what it prints dropped; what it refuses goes to a file, if one is given, and is no
    failure then."""

    def silent() -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            run()
        except Exception as error:
            if told is None:
                raise
            told.write_text(f"{type(error).__name__}: {error}")

    return silent


def model_in(folder: Path) -> Path:
    """A llama of two blocks with a tokenizer, in several shards."""
    path = folder / "model"
    if not path.exists():
        tiny("llama").save_pretrained(path, max_shard_size="100KB")
        add_tokenizer(path)
    return path


def quantizing(folder: Path) -> list[Run]:
    """Every method of the command line, with few steps where it learns."""
    model = model_in(folder)

    def write(method: str, out: Path, **options: Any) -> None:
        data = random_tokens(model, samples=2, length=16)
        qlab.quantize(qlab.open(model), METHODS[method](INT4), data, out, **options)

    return [
        Run(
            name=f"quantize {name}",
            write=partial(write, name),
            whole=folder / name.replace(":", ""),
        )
        for name in METHODS
    ]
