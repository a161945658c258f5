"""A model directory rewritten file by file, one tensor in memory at a time, without a model
definition."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qlab.codecs import Codec
from qlab.files.checkpoint import Checkpoint
from qlab.files.readback import MARKS, refuse_misread
from qlab.files.segments import Segments
from qlab.process.progress import progress

Notes = dict[str, dict[str, Any]]  # section of the report -> rows
# A leaf's name -> its new tensors; what is to be reported goes into the notes.
Rewrite = Callable[[str, Notes], Mapping[str, Tensor]]


def leaves_by_file(model: Checkpoint) -> list[list[str]]:
    """The leaves of each file in its order: the name of every plain tensor, and `module.weight` for
    a quantized module, whose tensors count where the first of them lies. A quantized module's bias
    is a plain tensor, and so are those of the model's extras."""
    return list(_by_file(model).values())


def sizes_by_file(model: Checkpoint) -> list[int]:
    """The bytes of the same files."""
    return [file.stat().st_size for file in _by_file(model)]


def _by_file(model: Checkpoint) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    seen: set[str] = set()
    places = {file: number for number, file in enumerate(dict.fromkeys(model.files.values()))}
    in_order = sorted(model.stored.items(), key=lambda each: (places[each[1].file], each[1].start))
    for name, stored in in_order:
        module, _, kind = name.rpartition(".")
        plain = kind == "bias" or name in model.beside
        leaf = f"{module}.weight" if module in model.quantized and not plain else name
        if leaf not in seen:
            files.setdefault(stored.file, []).append(leaf)
            seen.add(leaf)
    return files


def rewrite_files(
    model: Checkpoint, writer: Segments, rewrite: Rewrite, doing: str, codec: Codec
) -> None:
    """Write every file that the writer lacks (`rewrite_file`)."""
    for index, leaves in progress(list(enumerate(leaves_by_file(model))), doing):
        if not writer.has(index):
            rewrite_file(writer, index, leaves, rewrite, codec)


def rewrite_file(
    writer: Segments, index: int, leaves: list[str], rewrite: Rewrite, codec: Codec
) -> None:
    """Write a file with its notes, and read back by the codec what has a mark in them."""
    notes: Notes = {}
    writer.write_shard(index, _rewritten(leaves, rewrite, notes))
    refuse_misread(writer.shard(index), notes.pop(MARKS, {}), codec)
    writer.write_notes(index, notes)


def _rewritten(leaves: list[str], rewrite: Rewrite, notes: Notes) -> Iterator[tuple[str, Tensor]]:
    for leaf in leaves:
        yield from rewrite(leaf, notes).items()
