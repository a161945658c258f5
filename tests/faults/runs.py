"""Every run that writes a model: quantize by each method, convert, model-free.

Models are tiny. What an untroubled run writes is made when it is first asked for.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from bytewise import model_folder, tokenizer
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

    name: of the run. write: write(out, **options), of which `resume` may be one. source: the folder
    that it reads. whole: a folder in which the untroubled run writes, and notes how long it took
    and how many events it had. output: the name of what it writes.
    """

    name: str
    write: Callable[..., object]
    source: Path
    whole: Path
    output: str = "out"

    def noted(self, kinds: tuple[str, ...] = WRITING) -> tuple[float, int]:
        """The seconds of the untroubled run, which is made here if nobody did, and the number of
        its events of these kinds: at what it writes, or at what it reads."""
        note = self.whole / f"{' '.join(kinds)}.json"
        if not note.exists():
            shutil.rmtree(self.whole / "place", ignore_errors=True)
            (self.whole / "place").mkdir(parents=True)
            out = self.whole / "place" / self.output
            events, began = self.whole / "events", time.monotonic()
            events.write_bytes(b"")

            def counted() -> None:
                each_event(self.place(out, kinds), kinds, counting(events))
                self.write(out)

            assert finish(start(quietly(counted))) == 0, f"{self.name} fails without a fault"
            note.write_text(json.dumps([time.monotonic() - began, events.stat().st_size]))
        return tuple(json.loads(note.read_text()))

    def place(self, out: Path, kinds: tuple[str, ...]) -> Path:
        """Where events of these kinds are looked for."""
        return out.parent if kinds == WRITING else self.source

    @cached_property
    def expected(self) -> dict[str, bytes]:
        """What the untroubled run writes."""
        assert self.noted()
        return there(self.whole / "place" / self.output)


def there(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of every file in a folder."""
    return {"": path.read_bytes()} if path.is_file() else contents(path)


def quietly(run: Callable[[], object], told: Path | None = None) -> Callable[[], None]:
    """`run` with what it prints dropped. What it raises goes to a file, if one is given, and is no
    failure then."""

    def silent() -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        # opened before `run`, which may lose the right to
        says = os.dup(2) if told is None else os.open(told, os.O_WRONLY | os.O_CREAT)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            run()
        except Exception as error:
            os.write(says, f"{type(error).__name__}: {error}".encode())
            if told is None:
                raise

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
    return [_quantizing(model, folder / "quantize", name) for name in METHODS]


def _quantizing(model: Path, folder: Path, method: str) -> Run:
    def write(out: Path, **options: Any) -> None:
        data = random_tokens(model, samples=2, length=16)
        qlab.quantize(qlab.open(model), METHODS[method](INT4), data, out, **options)

    whole = folder / method.replace(":", "")
    return Run(name=f"quantize {method}", write=write, source=model, whole=whole)


def model_free(folder: Path) -> list[Run]:
    """Rounding to nearest of a checkpoint whose architecture nobody knows."""
    folder = folder / "model-free"
    model = model_in(folder)
    config = json.loads((model / "config.json").read_text())
    unknown = {"model_type": "nobody_knows", "hidden_size": config["hidden_size"]}
    (model / "config.json").write_text(json.dumps(unknown))

    def write(out: Path, **options: Any) -> None:
        qlab.quantize_files(model, qlab.rtn(INT4), out, **options)

    return [Run(name="model-free", write=write, source=model, whole=folder / "whole")]


def converting(folder: Path) -> list[Run]:
    """Codes into other formats: directories, a GGUF file, and that back."""
    folder = folder / "convert"
    source, file = folder / "int4", folder / "gguf" / "model.gguf"
    if not file.exists():
        words = tokenizer("qwen2", begins=True)
        model = model_folder(folder / "model", "llama", torch.bfloat16, words)
        codes = replace(INT4, scale_dtype=torch.float16)
        qlab.quantize(qlab.open(model), qlab.rtn(codes), None, source)
        qlab.convert(source, "gguf", file)

    def run(codec: str, read: Path, output: str = "out") -> Run:
        def write(out: Path, **options: Any) -> None:
            qlab.convert(read, codec, out, **options)

        name = f"convert {read.name} to {codec}"
        return Run(
            name=name,
            write=write,
            source=read if read.is_dir() else read.parent,
            whole=folder / name,
            output=output,
        )

    formats = [run(codec, source) for codec in ("gptq", "compressed-tensors")]
    return [*formats, run("gguf", source, "out.gguf"), run("compressed-tensors", file)]
