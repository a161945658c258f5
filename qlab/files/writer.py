"""A model directory written shard by shard, so that it appears whole or not at all and a killed run
can go on.

Each file is written under a temporary name, synced and renamed. The work folder beside the shards
says how far the run came.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlab.errors import QlabError, Unwritable
from qlab.files.carry import Carry
from qlab.files.digests import digest_of
from qlab.files.directory import INDEX, read_header
from qlab.files.hashed import HashedFiles
from qlab.files.offload import states_of
from qlab.files.ownership import RECORD, with_files
from qlab.files.place import folder_for
from qlab.files.segments import Segments
from qlab.files.work_folder import NAMES, delete
from qlab.files.workplace import Workplace

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# Files in which GPTQ and AWQ say how the weights were quantized before.
FORMER = ("quantize_config.json", "quant_config.json")
# The one folder of a model directory that transformers looks into.
TEMPLATES = "additional_chat_templates"


class Writer(Workplace, Segments):
    """The shards of a job, the notes on each of them, and the files beside them.

    offload: the folder in which hidden states are to lie, in one of this run's; None for the work
    folder."""

    def __init__(self, out: Path, overwrite: bool, resume: bool, offload: str | Path | None = None):
        self.shards = 0
        self.states = states_of(out, None if offload is None else Path(offload))
        self.digests = {}
        super().__init__(out, overwrite, resume)

    def begin(
        self,
        job: Mapping[str, Any],
        shards: int = 1,
        copied: Path | None = None,
        *,
        source: HashedFiles | None = None,
    ) -> None:
        """Begin a job of so many shards, or go on with it.

        Args:
            job: See `Workplace.begin`.
            shards: Number of segments, each of which becomes a file.
            copied: The model directory whose other files `finish` copies.
            source: See `Workplace.begin`.
        """
        for path in beside(copied).values() if copied else ():
            if not os.access(path, os.R_OK):
                raise QlabError(
                    f"{path} may not be read, and goes into the output; give it to whoever runs "
                    "this, or move it away"
                )
        self.shards = shards
        super().begin(job, source=source)
        if self.states is not None and not self.finished:
            with self._refused():
                folder_for("hidden states", self.states)

    def _clear(self) -> None:
        super()._clear()
        self._drop_states()

    def _drop_states(self) -> None:
        """Remove the offloaded states of this run."""
        if self.states is not None and self.states.is_dir():
            delete(self.states)

    # -------------------------------------------------------------- shards
    def shard(self, index: int) -> Path:
        return self.partial / f"model-{index + 1:05d}-of-{self.shards:05d}.safetensors"

    def shard_names(self) -> list[str]:
        """The files of all segments."""
        return [self.shard(index).name for index in range(self.shards)]

    def notes_path(self, index: int) -> Path:
        return self.work / f"notes-{index:05d}.json"

    def source_agrees(self) -> bool:
        return self.reads_agree()

    def take(self, index: int, parts: Segments) -> bool:
        """Take over a segment that others made; False where its shard is not what its notes say.
        The shard is linked where the file system can, and copied elsewhere."""
        record = parts.record(index)
        if record is None:
            return False
        self.atomically(self.shard(index), partial(_link_or_copy, parts.shard(index)))
        if digest_of(self.shard(index)) != record["shard"]:
            return False
        self.write_json(self.notes_path(index), record)
        return True

    # -------------------------------------------------------------- the carry
    def carry(
        self, stream: str, index: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
    ) -> Carry:
        """The hidden states of a stream (of the quantized model, of the reference) that enter block
        `index` (from 0)."""
        path = (self.states or self.work) / f"carry-{stream}-{index:05d}.bin"
        return Carry(
            path,
            shapes,
            dtype,
            json.dumps([stream, index, self.job], sort_keys=True),
            self.atomically,
        )

    def blocks_done(self, blocks: int, carried: Callable[[int], bool]) -> int:
        """How many blocks are finished: the largest i for which blocks 0 to i - 1 are written, and
        so are the hidden states that enter block i."""
        written = [self.has(i + 1) for i in range(blocks)]
        first = written.index(False) if False in written else blocks
        return next((i for i in range(first, 0, -1) if i == blocks or carried(i)), 0)

    # -------------------------------------------------------------- the end
    def finish(
        self,
        files: Mapping[str, Any],
        copied: Path,
        check: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Write index and JSON files, copy what else the model directory holds, and rename the
        whole into place; `check` may refuse the complete directory before that."""
        try:
            self._complete(files, copied)
            check(self.partial)
            self._drop_states()
            self.put_in_place()
        except OSError as error:
            raise Unwritable(
                f"{self.out} cannot be put in place ({error}); make way for it and use --resume"
            ) from error

    def _complete(self, files: Mapping[str, Any], copied: Path) -> None:
        """All files beside the shards; qlab.json, which names them all, comes last."""
        others = {name: path for name, path in beside(copied).items() if path.name not in files}
        self.write_json(self.work / NAMES, sorted(others))
        for name, path in others.items():
            (self.partial / name).parent.mkdir(exist_ok=True)
            self.atomically(self.partial / name, partial(shutil.copyfile, path))
        self.write_json(self.partial / INDEX, self._index())
        plain = {name: value for name, value in files.items() if name != RECORD}
        for name, value in plain.items():
            self.write_json(self.partial / name, value)
        digests = {self.shard(i).name: record["shard"] for i, record in enumerate(self.records())}
        digests |= {name: digest_of(self.partial / name) for name in (*others, INDEX, *plain)}
        self.write_json(self.partial / RECORD, with_files(files[RECORD], digests))

    def _index(self) -> dict[str, Any]:
        weight_map: dict[str, str] = {}
        size = 0
        for i in range(self.shards):
            weight_map |= dict.fromkeys(read_header(self.shard(i)), self.shard(i).name)
            size += self.shard(i).stat().st_size
        return {"metadata": {"total_size": size}, "weight_map": weight_map}


def _link_or_copy(file: Path, path: Path) -> None:
    try:
        os.link(file, path)
    except OSError:  # on another file system, or on one without links
        shutil.copyfile(file, path)


def beside(folder: Path) -> dict[str, Path]:
    """The files of a model directory that hold no weights and do not say how they are stored: name
    -> file."""
    files = {}
    for path in sorted([*folder.iterdir(), *(folder / TEMPLATES).glob("*")]):
        weights = path.suffix in WEIGHTS or path.name.endswith(".index.json") or path.name in FORMER
        if path.is_file() and not weights:
            files[str(path.relative_to(folder))] = path
    return files
