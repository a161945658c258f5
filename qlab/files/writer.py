"""A model directory written shard by shard, so that it appears whole or not at all and a killed run can go on.

Everything is built in `OUT.partial` and renamed to `OUT` at the end. Each file in it is written under a temporary name
and renamed, and the work folder beside the shards says how far the run came: block i is done when its shard and the
hidden states that enter block i + 1 are both in place.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.errors import QlabError, Unwritable
from qlab.files.directory import INDEX, read_header
from qlab.files.tensors import write

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
FORMER = ("quantize_config.json", "quant_config.json")  # they say how the weights were quantized before, in GPTQ's and AWQ's way
TEMPLATES = "additional_chat_templates"  # the one folder of a model directory that transformers looks into
WORK, JOB = ".work", "job.json"
OVERWRITE = "overwrite"  # in the work folder: the run may replace an existing output
REPLACED = "replaced"  # in the work folder: the output that is being replaced


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path) and rename the result to `path`; on failure nothing is left and `path` is as before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise Unwritable(f"{path} cannot be written ({error.strerror}); free some space or choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Sorted, indented JSON, atomically."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    atomically(path, lambda p: p.write_text(text))


def apart(out: str | Path, source: Path) -> None:
    """Refuse an output that is what it would be made from, or a folder around it, which goes when it is replaced."""
    place, model = Path(out).expanduser().resolve(), source.resolve()
    if place == model:
        raise QlabError(f"{source} is the model itself; choose another output directory")
    if place in model.parents:
        raise QlabError(f"the output directory {place} holds the model {source}; choose another one")


class Writer:
    """The output directory of one job. `job` is what identifies it: only the same job may resume."""

    def __init__(self, out: Path, job: Mapping[str, Any], shards: int, overwrite: bool, resume: bool):
        self.out = Path(os.path.abspath(out.expanduser()))
        self.partial, self.shards = self.out.with_name(self.out.name + ".partial"), shards
        self.work = self.partial / WORK
        self.overwrite = overwrite
        self.finished = self._start(json.loads(json.dumps(job)), resume)

    def _start(self, job: dict[str, Any], resume: bool) -> bool:
        """Make or take over the partial directory; True if the whole job was finished already."""
        if resume and not self.partial.exists() and _read_job(self.out / "qlab.json", "job") == job:
            shutil.rmtree(self.out / WORK, ignore_errors=True)  # killed just before its end
            return True
        self._undo_swap()
        begun = _read_job(self.work / JOB)
        if resume and begun == job:
            self.overwrite |= (self.work / OVERWRITE).exists()
            self._refuse_existing()
            return False
        if resume and begun is not None:
            raise QlabError(f"{self.partial} belongs to another job (model, recipe, data, seed or versions differ); "
                            "remove it or choose another directory")
        self._refuse_existing()
        try:
            self._clear()
            self.work.mkdir(parents=True)
            if self.overwrite:
                (self.work / OVERWRITE).touch()
        except OSError as error:
            raise QlabError(f"{self.partial} cannot be created ({error.strerror}); choose another output directory") from error
        write_json(self.work / JOB, job)  # from here on the run can be resumed
        return False

    def _refuse_existing(self) -> None:
        if self.out.exists() and not self.overwrite:
            raise QlabError(f"the output directory {self.out} exists and holds something else; choose another, or --overwrite it")

    def _undo_swap(self) -> None:
        """Put back what an earlier run, killed between the two renames of its end, had moved out of the way."""
        if (self.work / REPLACED).exists() and not self.out.exists():
            os.replace(self.work / REPLACED, self.out)

    def _clear(self) -> None:
        """Remove an earlier partial directory; the work folder, which says that it is one, goes last."""
        if not self.partial.exists():
            return
        found = [path for path in self.partial.iterdir() if path != self.work]
        if found and not self.work.exists():
            raise QlabError(f"{self.partial} was not made by qlab, which needs this name for a while; move it away")
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(self.partial)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Around the work: what refused input leaves behind goes, since with other input it is another job; what a full disk does,
        or whoever kills the process, stays to be resumed."""
        try:
            yield
        except Unwritable:
            raise
        except QlabError:
            self._clear()
            raise

    # -------------------------------------------------------------- shards
    def shard(self, index: int) -> Path:
        """The file of segment `index`: 0 is what surrounds the blocks, i the i-th block (from 1)."""
        return self.partial / f"model-{index + 1:05d}-of-{self.shards:05d}.safetensors"

    def write_shard(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """One shard, atomically, one tensor at a time."""
        atomically(self.shard(index), lambda path: write(path, tensors))

    def write_notes(self, index: int, notes: Mapping[str, Mapping[str, Any]]) -> None:
        """What the report says of a segment, by section, kept until the end of the job."""
        write_json(self._notes_path(index), notes)

    def _notes_path(self, index: int) -> Path:
        return self.work / f"notes-{index:05d}.json"

    def notes(self) -> dict[str, dict[str, Any]]:
        """The notes of all segments: section -> its rows."""
        merged: dict[str, dict[str, Any]] = {}
        for path in sorted(self.work.glob("notes-*.json")):
            for section, rows in json.loads(path.read_text()).items():
                merged.setdefault(section, {}).update(rows)
        return merged

    def has(self, index: int) -> bool:
        """Whether the shard of a segment and its notes are in place."""
        return self.shard(index).is_file() and self._notes_path(index).is_file()

    # -------------------------------------------------------------- the carry
    def carry_path(self, stream: str, index: int) -> Path:
        """The hidden states of a stream (of the quantized model, of the reference) that enter block `index` (from 0)."""
        return self.work / f"carry-{stream}-{index:05d}.bin"

    def blocks_done(self, blocks: int, carried: Callable[[int], bool]) -> int:
        """How many blocks are finished: the largest i whose shard and notes are in place, and what enters the next block."""
        for i in range(blocks, 0, -1):
            if (i == blocks or carried(i)) and self.has(i):
                return i
        return 0

    def finish(self, files: Mapping[str, Any], copied: Path) -> None:
        """Write index and JSON files, copy what else the model directory holds, and rename the whole into place."""
        try:
            self._finish(files, copied)
        except OSError as error:
            raise Unwritable(f"{self.out} cannot be put in place ({error}); make way for it and use --resume") from error

    def _finish(self, files: Mapping[str, Any], copied: Path) -> None:
        for path in sorted([*copied.iterdir(), *(copied / TEMPLATES).glob("*")]):
            weights = path.suffix in WEIGHTS or path.name.endswith(".index.json") or path.name in FORMER
            if path.is_file() and not weights and path.name not in files:
                place = self.partial / path.relative_to(copied)
                place.parent.mkdir(exist_ok=True)
                atomically(place, partial(shutil.copyfile, path))
        write_json(self.partial / INDEX, self._index())
        for name, value in files.items():
            write_json(self.partial / name, value)
        for leftover in self.partial.rglob(".*.tmp"):  # of a killed run
            leftover.unlink()
        if self.out.exists():
            if not self.overwrite:
                raise Unwritable(f"the output directory {self.out} appeared during the run; move it away and use --resume")
            os.replace(self.out, self.work / REPLACED)
        os.replace(self.partial, self.out)  # the work folder goes last: a run killed before can still resume
        shutil.rmtree(self.out / WORK)

    def _index(self) -> dict[str, Any]:
        weight_map: dict[str, str] = {}
        size = 0
        for i in range(self.shards):
            weight_map |= dict.fromkeys(read_header(self.shard(i)), self.shard(i).name)
            size += self.shard(i).stat().st_size
        return {"metadata": {"total_size": size}, "weight_map": weight_map}


def _read_job(path: Path, key: str | None = None) -> Any:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value.get(key) if key else value


class Carry:
    """Hidden states of all samples in a file: batches of the given shapes, written whole, renamed, and read one by one."""

    def __init__(self, path: Path, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype):
        self.path, self.shapes, self.dtype = path, shapes, dtype

    def write(self, batches: Iterable[Tensor]) -> None:
        """Fill the file with batches, in order."""

        def fill(temporary: Path) -> None:
            with temporary.open("wb") as file:
                for batch in batches:
                    file.write(_bytes_of(batch.detach().cpu().contiguous()))

        atomically(self.path, fill)

    def read(self) -> Iterator[Tensor]:
        """The batches; one at a time is in memory."""
        with self.path.open("rb") as file:
            for shape in self.shapes:
                batch = torch.empty(shape, dtype=self.dtype, device="cpu")
                if file.readinto(_bytes_of(batch)) < batch.numel() * batch.itemsize:
                    raise QlabError(f"{self.path} is shorter than the calibration data; remove its directory and start again")
                yield batch


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data
