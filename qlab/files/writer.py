"""A model directory written shard by shard, so that it appears whole or not at all and a killed run
can go on.

Each file is written under a temporary name, synced and renamed. The work folder beside the shards
says how far the run came: a segment is done when its notes are what was written and its shard has
the hash that they name.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.errors import QlabError, Unwritable
from qlab.files.atomic import digest_of
from qlab.files.carry import Carry
from qlab.files.directory import INDEX, read_header
from qlab.files.hashed import HashedFiles
from qlab.files.ownership import RECORD, read_sealed, sealed, with_files
from qlab.files.tensors import write
from qlab.files.work_folder import NAMES
from qlab.files.workplace import Workplace
from qlab.process.progress import say

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# Files in which GPTQ and AWQ say how the weights were quantized before.
FORMER = ("quantize_config.json", "quant_config.json")
# The one folder of a model directory that transformers looks into.
TEMPLATES = "additional_chat_templates"


class Writer(Workplace):
    """The shards of a job, the notes on each of them, and the files beside them."""

    def __init__(self, out: Path, overwrite: bool, resume: bool):
        self.shards = 0
        self.digests: dict[int, str] = {}  # of shards that await their notes
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

    # -------------------------------------------------------------- shards
    def shard(self, index: int) -> Path:
        """The file of segment `index`: 0 is what surrounds the blocks, i the i-th block (from
        1)."""
        return self.partial / f"model-{index + 1:05d}-of-{self.shards:05d}.safetensors"

    def shard_names(self) -> list[str]:
        """The files of all segments."""
        return [self.shard(index).name for index in range(self.shards)]

    def write_shard(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """One shard, atomically, one tensor at a time."""
        self.atomically(self.shard(index), lambda path: write(path, tensors))
        self.digests[index] = digest_of(self.shard(index))

    def write_notes(self, index: int, notes: Mapping[str, Mapping[str, Any]]) -> None:
        """What the report says of a segment, by section, kept until the end of the job; with the
        hash of its shard, written before."""
        record = {"segment": index, "shard": self.digests[index], "notes": notes}
        if self.source is not None:
            record["read"] = self.source.proof()
        self.write_json(self._notes_path(index), sealed(record))

    def _notes_path(self, index: int) -> Path:
        return self.work / f"notes-{index:05d}.json"

    def _record(self, index: int) -> dict[str, Any] | None:
        """What was written of a segment; None where that is damaged."""
        record = read_sealed(self._notes_path(index))
        return record if isinstance(record, dict) and record.get("segment") == index else None

    def _records(self) -> list[dict[str, Any]]:
        """What was written of every segment."""
        records = []
        for index in range(self.shards):
            record = self._record(index)
            if record is None:
                raise Unwritable(
                    f"{self._notes_path(index)} was damaged or removed during the run; make it "
                    "again with --resume"
                )
            records.append(record)
        return records

    def source_agrees(self) -> bool:
        if self.source is None:
            return True
        records = [self._record(index) for index in range(self.shards)]
        return self.source.agrees(record["read"] for record in records if record is not None)

    def notes(self) -> dict[str, dict[str, Any]]:
        """The notes of all segments: section -> its rows."""
        merged: dict[str, dict[str, Any]] = {}
        for record in self._records():
            for section, rows in record["notes"].items():
                merged.setdefault(section, {}).update(rows)
        return merged

    def has(self, index: int) -> bool:
        """Whether a segment is written, as its notes prove. Damage is printed, since that part is
        then made again."""
        if not os.path.lexists(self.shard(index)) and not os.path.lexists(self._notes_path(index)):
            return False
        damage = self._damage(index)
        if damage:
            say(f"{damage}; that part is made again")
        return damage is None

    def _damage(self, index: int) -> str | None:
        record, shard = self._record(index), self.shard(index)
        if not os.path.lexists(self._notes_path(index)):
            return f"{shard} lacks its notes ({self._notes_path(index)} is missing)"
        if record is None:
            return f"{self._notes_path(index)} is not what was written"
        if not shard.is_file():
            return f"{shard} is missing"
        return None if digest_of(shard) == record["shard"] else f"{shard} is not what was written"

    # -------------------------------------------------------------- the carry
    def carry(
        self, stream: str, index: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
    ) -> Carry:
        """The hidden states of a stream (of the quantized model, of the reference) that enter block
        `index` (from 0)."""
        path = self.work / f"carry-{stream}-{index:05d}.bin"
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
        digests = {self.shard(i).name: record["shard"] for i, record in enumerate(self._records())}
        digests |= {name: digest_of(self.partial / name) for name in (*others, INDEX, *plain)}
        self.write_json(self.partial / RECORD, with_files(files[RECORD], digests))

    def _index(self) -> dict[str, Any]:
        weight_map: dict[str, str] = {}
        size = 0
        for i in range(self.shards):
            weight_map |= dict.fromkeys(read_header(self.shard(i)), self.shard(i).name)
            size += self.shard(i).stat().st_size
        return {"metadata": {"total_size": size}, "weight_map": weight_map}


def beside(folder: Path) -> dict[str, Path]:
    """The files of a model directory that hold no weights and do not say how they are stored: name
    -> file."""
    files = {}
    for path in sorted([*folder.iterdir(), *(folder / TEMPLATES).glob("*")]):
        weights = path.suffix in WEIGHTS or path.name.endswith(".index.json") or path.name in FORMER
        if path.is_file() and not weights:
            files[str(path.relative_to(folder))] = path
    return files
