"""The segments of an output while it is made: each is a shard, and notes that vouch for it.

A segment is done when its notes are what was written and its shard has the hash that they name.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qlab.errors import Unwritable
from qlab.files.atomic import unwritable
from qlab.files.digests import digest_of
from qlab.files.hashed import HashedFiles
from qlab.files.ownership import read_sealed, sealed
from qlab.files.tensors import Spool, write
from qlab.process.progress import say


class Segments(ABC):
    """The segments of a job in files, each of which appears whole.

    shards: the number of segments. digests: the hashes of shards that await their notes. source:
    what is hashed while it is read, or None.
    """

    shards: int
    digests: dict[int, str]
    source: HashedFiles | None

    @abstractmethod
    def shard(self, index: int) -> Path:
        """The file of segment `index`: 0 is what surrounds the blocks, i the i-th block (from
        1)."""

    @abstractmethod
    def notes_path(self, index: int) -> Path:
        """The file of the notes on a segment."""

    @abstractmethod
    def atomically(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write a file of the job, which appears whole."""

    @abstractmethod
    def write_json(self, path: Path, value: Any) -> None:
        """Write a JSON file of the job."""

    def write_shard(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """One shard, atomically, one tensor at a time."""
        self.atomically(
            self.shard(index),
            lambda path: self.digests.update({index: write(path, tensors)}),
        )

    def spooled(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> Spool:
        """The tensors of a shard, on their way to its file: `write_spool` ends it, in any
        thread."""
        spool = Spool(self.shard(index))
        try:
            with unwritable(self.shard(index)):
                for name, tensor in tensors:
                    spool.add(name, tensor)
                    del tensor
        except BaseException:
            spool.close()
            raise
        return spool

    def write_spool(self, index: int, spool: Spool) -> None:
        """One shard, atomically, of tensors that are on their way."""
        try:
            self.atomically(
                self.shard(index),
                lambda path: self.digests.update({index: spool.write(path)}),
            )
        finally:
            spool.close()

    def write_notes(self, index: int, notes: Mapping[str, Mapping[str, Any]]) -> None:
        """What the report says of a segment, by section, kept until the end of the job; with the
        hash of its shard, written before."""
        record = {"segment": index, "shard": self.digests[index], "notes": notes}
        if self.source is not None:
            record["read"] = self.source.proof()
        self.write_json(self.notes_path(index), sealed(record))

    def record(self, index: int) -> dict[str, Any] | None:
        """What was written of a segment; None where that is damaged."""
        record = read_sealed(self.notes_path(index))
        return record if isinstance(record, dict) and record.get("segment") == index else None

    def records(self) -> list[dict[str, Any]]:
        """What was written of every segment."""
        records = []
        for index in range(self.shards):
            record = self.record(index)
            if record is None:
                raise Unwritable(
                    f"{self.notes_path(index)} was damaged or removed during the run; make it "
                    "again with --resume"
                )
            records.append(record)
        return records

    def reads_agree(self) -> bool:
        """Whether the source still holds what was read of it for every segment."""
        if self.source is None:
            return True
        records = [self.record(index) for index in range(self.shards)]
        return self.source.agrees(record["read"] for record in records if record is not None)

    def notes(self) -> dict[str, dict[str, Any]]:
        """The notes of all segments: section -> its rows."""
        merged: dict[str, dict[str, Any]] = {}
        for record in self.records():
            for section, rows in record["notes"].items():
                merged.setdefault(section, {}).update(rows)
        return merged

    def has(self, index: int) -> bool:
        """Whether a segment is written, as its notes prove. Damage is printed, since that part is
        then made again."""
        if not os.path.lexists(self.shard(index)) and not os.path.lexists(self.notes_path(index)):
            return False
        damage = self._damage(index)
        if damage:
            say(f"{damage}; that part is made again")
        return damage is None

    def _damage(self, index: int) -> str | None:
        record, shard = self.record(index), self.shard(index)
        if not os.path.lexists(self.notes_path(index)):
            return f"{shard} lacks its notes ({self.notes_path(index)} is missing)"
        if record is None:
            return f"{self.notes_path(index)} is not what was written"
        if not shard.is_file():
            return f"{shard} is missing"
        return None if digest_of(shard) == record["shard"] else f"{shard} is not what was written"
