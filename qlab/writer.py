"""A model directory written shard by shard, so that it appears whole or not at all and a killed run can go on.

Everything is built in `OUT.partial` and renamed to `OUT` at the end. Each file in it is written under a temporary name
and renamed, and the work folder beside the shards says how far the run came: block i is done when its shard and the
hidden states that enter block i + 1 are both in place.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlab.checkpoint import INDEX
from qlab.errors import QlabError

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
JOB = "job.json"


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path) and rename the result to `path`; on failure nothing is left and `path` is as before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and "No space left" not in str(error):
            raise
        raise QlabError(f"{path} cannot be written ({error}); free some space or choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Sorted, indented JSON, atomically."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    atomically(path, lambda p: p.write_text(text))


class Writer:
    """The output directory of one job. `job` is what identifies it: only the same job may resume."""

    def __init__(self, out: Path, job: Mapping[str, Any], shards: int, overwrite: bool, resume: bool):
        self.out, self.partial, self.shards = out, out.with_name(out.name + ".partial"), shards
        self.work = self.partial / ".work"
        self.overwrite = overwrite
        self.finished = self._start(dict(job), resume)

    def _start(self, job: dict[str, Any], resume: bool) -> bool:
        """Make or take over the partial directory; True if the whole job was finished already."""
        job = json.loads(json.dumps(job))
        if resume and self.out.is_dir() and not self.partial.exists():
            if _read_job(self.out / "qlab.json", "job") != job:
                raise QlabError(f"{self.out} holds the result of another job; --resume continues only what it started: "
                                "choose another directory or --overwrite")
            shutil.rmtree(self.out / ".work", ignore_errors=True)  # killed just before its end
            return True
        if self.out.exists() and not self.overwrite and not resume:
            raise QlabError(f"the output directory {self.out} exists; choose another, or --overwrite it")
        if self.partial.exists():
            if resume and _read_job(self.work / JOB) == job:
                return False
            if resume:
                raise QlabError(f"{self.partial} belongs to another job (model, recipe, data, seed or versions differ); "
                                "remove it or choose another directory")
            shutil.rmtree(self.partial)
        try:
            self.work.mkdir(parents=True)
        except OSError as error:
            raise QlabError(f"{self.partial} cannot be created ({error.strerror}); choose another output directory") from error
        if self.overwrite:
            (self.work / "overwrite").touch()
        write_json(self.work / JOB, job)
        return False

    # -------------------------------------------------------------- shards
    def shard(self, index: int) -> Path:
        """The file of segment `index`: 0 is what surrounds the blocks, i the i-th block (from 1)."""
        return self.partial / f"model-{index + 1:05d}-of-{self.shards:05d}.safetensors"

    def write_shard(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """One shard, atomically."""
        whole = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
        atomically(self.shard(index), lambda p: save_file(whole, p, metadata={"format": "pt"}))

    def write_notes(self, index: int, notes: Mapping[str, Any]) -> None:
        """What the report says of a segment, kept until the end of the job."""
        write_json(self.work / f"notes-{index:05d}.json", notes)

    def notes(self) -> dict[str, Any]:
        """The notes of all segments."""
        merged: dict[str, Any] = {}
        for path in sorted(self.work.glob("notes-*.json")):
            merged |= json.loads(path.read_text())
        return merged

    # -------------------------------------------------------------- the carry
    def carry_path(self, index: int) -> Path:
        """The hidden states that enter block `index` (from 0)."""
        return self.work / f"carry-{index:05d}.bin"

    def blocks_done(self, blocks: int, carry_path: Callable[[int], Path] | None) -> int:
        """How many blocks are finished: the largest i whose shard, notes and following carry (if any) are in place."""
        for i in range(blocks, 0, -1):
            carried = i == blocks or carry_path is None or carry_path(i).is_file()
            if carried and self.shard(i).is_file() and (self.work / f"notes-{i:05d}.json").is_file():
                return i
        return 0

    def finish(self, files: Mapping[str, Any], copied: Path) -> None:
        """Write index and JSON files, copy what else the model directory holds, and rename the whole into place."""
        for path in sorted(copied.iterdir()):
            if path.is_file() and path.suffix not in WEIGHTS and path.name not in (INDEX, *files):
                atomically(self.partial / path.name, lambda p, path=path: shutil.copyfile(path, p))
        write_json(self.partial / INDEX, self._index())
        for name, value in files.items():
            write_json(self.partial / name, value)
        for leftover in self.partial.glob(".*.tmp"):  # of a killed run
            leftover.unlink()
        old = self.out.with_name(self.out.name + ".old")
        if self.out.exists():
            if not (self.work / "overwrite").exists():
                raise QlabError(f"the output directory {self.out} appeared during the run; move it away and use --resume")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.out, old)
        os.replace(self.partial, self.out)  # the work folder goes last: a run killed before can still resume
        shutil.rmtree(self.out / ".work")
        shutil.rmtree(old, ignore_errors=True)

    def _index(self) -> dict[str, Any]:
        weight_map, size = {}, 0
        for i in range(self.shards):
            with safe_open(self.shard(i), "pt") as file:
                weight_map |= dict.fromkeys(file.keys(), self.shard(i).name)
            size += self.shard(i).stat().st_size
        return {"metadata": {"total_size": size}, "weight_map": weight_map}


def _read_job(path: Path, key: str | None = None) -> Any:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value.get(key) if key else value


class Carry:
    """Hidden states [n, l, d] of all samples in a memory-mapped file, written whole and then renamed."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype):
        self.path, self.shape, self.dtype = path, shape, dtype

    def write(self, batches: Iterable[Tensor]) -> None:
        """Fill the file with batches along the first axis, in order."""

        def fill(temporary: Path) -> None:
            with temporary.open("wb") as file:
                for batch in batches:
                    file.write(batch.detach().cpu().contiguous().view(torch.uint8).numpy().data)

        atomically(self.path, fill)

    def read(self) -> Tensor:
        """The states, mapped and not loaded."""
        count = torch.Size(self.shape).numel()
        return torch.from_file(str(self.path), shared=False, size=count, dtype=self.dtype).view(self.shape)
