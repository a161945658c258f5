"""A model directory on disk: its JSON files and where each of its tensors lies, from headers alone
and without torch.

A safetensors file is 8 bytes n (little-endian), n bytes of JSON {name: {dtype, shape,
data_offsets}}, and the data without gaps. Every header is read once, and all that it says is
checked. A file that is another one when its tensors are read is refused. Pickles are never read."""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import IO, Any

from qlab.errors import QlabError, Unreadable, first_line

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
LARGEST_JSON = 100_000_000  # bytes; also what the safetensors library accepts as a header
LONGEST_NAME = 255  # bytes of a file's name
MOST_AXES = 64  # of a tensor, as in torch
METADATA = "__metadata__"
# bits of one element, by the format's names
WIDTHS: Mapping[str, int] = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What tells a file from another one of its name. modified: in ns. header: sha256 of the length
    and the JSON at its beginning."""

    size: int
    modified: int
    number: int
    header: str

    def is_same(self, file: IO[bytes]) -> bool:
        """Whether an opened file is this one. Its number decides only together with its header:
        some network file systems number a file anew."""
        now = os.fstat(file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self.size, self.modified):
            return False
        if now.st_ino == self.number:
            return True
        file.seek(0)
        try:
            return _header_of(file)[1] == self.header
        except ValueError:  # it has none
            return False


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of a file: its dtype by the format's name, and the bytes [start, stop) of the file
    that hold it. seen: the file when its header was read."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    seen: Seen = field(compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def rows(self, expert: int, start: int, stop: int) -> "Stored":
        """The rows [start, stop) of one expert of a tensor [e, o, k], as a tensor [stop - start, k]
        in the same bytes."""
        experts, rows, k = self.shape
        row = self.nbytes // (experts * rows)
        first = self.start + row * (expert * rows + start)
        return replace(
            self, shape=(stop - start, k), start=first, stop=first + row * (stop - start)
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; refuses files of more than 100 MB and whatever is no object."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise QlabError(
                f"{path} has {path.stat().st_size} bytes, which no configuration needs; download "
                "it again"
            )
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise Unreadable(
            f"{path} cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise QlabError(
            f"{path} is not valid JSON ({first_line(error)[:200]}); repair or download it again"
        ) from error
    if not isinstance(value, dict):
        raise QlabError(
            f"{path} holds no JSON object but {type(value).__name__}; repair or download it again"
        )
    return value


@contextmanager
def opened(file: Path, seen: Seen) -> Iterator[IO[bytes]]:
    """A safetensors file, opened to read its tensors; refuses one that cannot be read, and one that
    is not the file whose header was read."""
    with reading(file), file.open("rb") as stream:
        refuse_another(file, stream, seen)
        yield stream
        refuse_another(file, stream, seen)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """A context for what reads a file: what the system refuses is said in one sentence."""
    try:
        yield
    except OSError as error:
        raise Unreadable(
            f"{file} cannot be read ({error.strerror}); check the disk, and --resume"
        ) from error


def refuse_another(file: Path, stream: IO[bytes], seen: Seen) -> None:
    """Refuse an opened file that is not the one whose header was read."""
    if not seen.is_same(stream):
        raise Unreadable(
            f"{file} was changed or replaced while the model was read; put the file back and "
            "--resume, or start again with the new one"
        )


def read_header(file: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file; refuses a file whose header and size do not describe each
    other exactly."""
    try:
        with file.open("rb") as f:
            status = os.fstat(f.fileno())
            text, digest = _header_of(f)
        # as text, since `json` takes bytes in other encodings too
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
        seen = Seen(
            size=status.st_size,
            modified=status.st_mtime_ns,
            number=status.st_ino,
            header=digest,
        )
        return _checked(file, header, 8 + len(text), seen)
    except OSError as error:
        raise Unreadable(
            f"{file} cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    except (ValueError, RecursionError, struct.error) as error:
        raise QlabError(
            f"{file} is truncated or not a safetensors file ({first_line(error)[:200]}); "
            "download it again"
        ) from error


def _header_of(file: IO[bytes]) -> tuple[bytes, str]:
    """The JSON at the beginning of a file, and sha256 of it and its length."""
    size = os.fstat(file.fileno()).st_size
    begin = file.read(8)
    length = int.from_bytes(begin, "little")
    if size < 8 or length > min(size - 8, LARGEST_JSON):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    text = file.read(length)
    return text, hashlib.sha256(begin + text).hexdigest()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice in its header")
    return value


def _checked(file: Path, header: Any, begin: int, seen: Seen) -> dict[str, Stored]:
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop(METADATA, None)
    if metadata is not None and not _texts(metadata):
        raise ValueError(f"its {METADATA} is no object of texts")
    # JSON writes halves of characters too, which other readers refuse
    "".join([*header, *(metadata or ()), *(metadata or {}).values()]).encode()
    tensors = {name: _entry(file, name, entry, begin, seen) for name, entry in header.items()}
    end = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise ValueError(
                f"{name!r} begins at byte {tensor.start} and what is before it ends at {end}"
            )
        end = tensor.stop
    if end != seen.size:
        raise ValueError(f"its tensors end at byte {end} of {seen.size}")
    return tensors


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _entry(file: Path, name: str, entry: Any, begin: int, seen: Seen) -> Stored:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name!r} is not a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r:.40}")
    if not _counts(shape) or len(shape) > MOST_AXES or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has no proper shape or data_offsets")
    if 8 * (offsets[1] - offsets[0]) != prod(shape) * WIDTHS[dtype]:
        raise ValueError(f"{name!r} is {dtype} {shape} and has {offsets[1] - offsets[0]} bytes")
    return Stored(
        file=file,
        dtype=dtype,
        shape=tuple(shape),
        start=begin + offsets[0],
        stop=begin + offsets[1],
        seen=seen,
    )


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def locate(folder: Path) -> dict[str, Stored]:
    """Every tensor of a directory, by name.

    The files are what transformers would load: the single file, else those of the index; without
    either, all there are. What a file holds is read wherever the index says that it lies, or if it
    says nothing. A tensor in two files is taken from where the index says, and refused otherwise.
    """
    listed = {} if (folder / SINGLE).is_file() else _listed(folder)
    by_name: dict[str, list[Stored]] = {}
    for shard in [folder / SINGLE] if (folder / SINGLE).is_file() else _shards(folder, listed):
        for name, tensor in read_header(shard).items():
            by_name.setdefault(name, []).append(tensor)
    return {name: _chosen(name, tensors, listed.get(name)) for name, tensors in by_name.items()}


def _chosen(name: str, tensors: list[Stored], listed: str | None) -> Stored:
    """The one of several tensors of a name that the model has."""
    there = (
        tensors
        if len(tensors) == 1
        else [tensor for tensor in tensors if tensor.file.name == listed]
    )
    if not there:
        raise QlabError(
            f"{name} is in {tensors[0].file} and in {tensors[1].file}; remove the file that does "
            "not belong"
        )
    return there[0]


def unheld(folder: Path, stored: Mapping[str, Stored]) -> dict[str, str]:
    """What the index lists and no file holds: tensor -> the file that should. Often nobody needs
    it: a head that is the embedding's, a buffer that is computed."""
    listed = {} if (folder / SINGLE).is_file() else _listed(folder)
    return {name: file for name, file in listed.items() if name not in stored}


def _listed(folder: Path) -> dict[str, str]:
    """The index: tensor name -> file name. Empty where there is no index."""
    if not (folder / INDEX).is_file():
        return {}
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise QlabError(f"{folder / INDEX} has no weight_map; download it again")
    for file in listed.values():
        refuse_leading_out(folder / INDEX, file)
    return listed


def refuse_leading_out(where: Path, file: Any) -> None:
    """Refuse what a file of a directory names as another file, unless it is the plain name of one
    beside it. A link is followed wherever it leads: hubs' snapshots are links to their blobs, and
    nothing that is downloaded makes one.

    Args:
        where: the file that names another.
        file: what it names.
    """
    is_plain = (
        isinstance(file, str)
        and not set(file) & set("/\\\0")
        and len(file.encode(errors="replace")) <= LONGEST_NAME
    )
    if not is_plain or file in ("", ".", ".."):
        raise QlabError(
            f"{where} lists the file {file!r:.100}, which is no plain name of a file beside it; "
            "download it again"
        )


def _shards(folder: Path, listed: Mapping[str, str]) -> list[Path]:
    shards = sorted(
        {folder / name for name in listed.values()} if listed else folder.glob("*.safetensors")
    )
    if not shards:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if not pickles:
            raise QlabError(
                f"{folder} holds no safetensors files, so it has no weights; add those of the "
                "model (a configuration alone can be planned)"
            )
        raise QlabError(
            f"{folder} holds no safetensors files but {pickles[0]}, a pickle, which qlab never "
            "loads; convert the model to safetensors first"
        )
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise QlabError(
            f"{folder / INDEX} lists {', '.join(missing)}, which is missing; download the model "
            "again"
        )
    return shards
