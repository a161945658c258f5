"""A model directory rewritten file by file, a few tensors in memory at a time, or a single large
one, without a model definition."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from qlab.codecs import Codec
from qlab.files.checkpoint import Checkpoint
from qlab.files.readback import MARKS, refuse_misread
from qlab.files.segments import Segments
from qlab.files.tensors import Spool
from qlab.process.ahead import Ahead
from qlab.process.progress import progress

Notes = dict[str, dict[str, Any]]  # section of the report -> rows


class Rewriting(Protocol):
    """What becomes of the leaves of a directory."""

    def read(self, name: str) -> Any:
        """All that is read of the files for a leaf. One thread calls it, in their order."""

    def rewritten(self, name: str, leaf: Any, notes: Notes) -> Mapping[str, Tensor]:
        """The new tensors of a leaf that was read; what is to be reported goes into the notes.
        Several threads call it at once."""


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
    model: Checkpoint, writer: Segments, rewriting: Rewriting, doing: str, codec: Codec
) -> None:
    """Write every file that the writer lacks, with its notes, and read back by the codec what has a
    mark in them.

    The tensors of the next leaves are made meanwhile, and a file is synced and read back while
    those of the next one are.
    """
    files = leaves_by_file(model)
    lacking = [index for index in range(len(files)) if not writer.has(index)]
    _rewrite(
        model, writer, {i: files[i] for i in lacking}, rewriting, codec, progress(lacking, doing)
    )


def rewrite_file(
    model: Checkpoint, writer: Segments, index: int, rewriting: Rewriting, codec: Codec
) -> None:
    """Write one file as `rewrite_files` does."""
    _rewrite(model, writer, {index: leaves_by_file(model)[index]}, rewriting, codec, [index])


def _rewrite(
    model: Checkpoint,
    writer: Segments,
    files: Mapping[int, list[str]],
    rewriting: Rewriting,
    codec: Codec,
    order: Iterable[int],
) -> None:
    """order: the numbers of all files, one by one."""
    from qlab_kernels.buffers import reused

    leaves = [leaf for each in files.values() for leaf in each]
    with reused(), Ahead() as ahead:
        made = ahead.in_order(leaves, model.nbytes, rewriting.read, partial(_made, rewriting))
        ended: Future[None] = ahead.begin(lambda: None)
        try:
            for index in order:
                notes: Notes = {}
                spool = writer.spooled(index, _tensors(islice(made, len(files[index])), notes))
                ended.result()
                ended = ahead.begin(_end, writer, index, spool, notes, codec)
        finally:
            ended.result()  # what is done stays, also where the next file cannot be read


def _made(rewriting: Rewriting, name: str, leaf: Any) -> tuple[Mapping[str, Tensor], Notes]:
    notes: Notes = {}
    return rewriting.rewritten(name, leaf, notes), notes


def _tensors(
    made: Iterator[tuple[Mapping[str, Tensor], Notes]], notes: Notes
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of some leaves. Their notes go into the file's."""
    for tensors, of_leaf in made:
        for section, rows in of_leaf.items():
            notes.setdefault(section, {}).update(rows)
        yield from tensors.items()
        del tensors


def _end(writer: Segments, index: int, spool: Spool, notes: Notes, codec: Codec) -> None:
    """Write a file whose tensors are there, and what is reported of it."""
    writer.write_spool(index, spool)
    refuse_misread(writer.shard(index), notes.pop(MARKS, {}), codec)
    writer.write_notes(index, notes)
