"""Tensors in safetensors files: one read by its place, and a file written tensor by tensor.

Both touch the bytes of one tensor at a time and map nothing into memory, so that models larger than
memory pass through.
"""

import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlab.errors import QlabError, Unreadable
from qlab.files.digests import BLOCK, hasher, said
from qlab.files.directory import METADATA, Seen, Stored, opened, reading, refuse_another

if TYPE_CHECKING:
    from qlab_kernels.buffers import Buffers

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_of(name: str, stored: Stored) -> torch.dtype:
    """The torch dtype of a stored tensor; refuses by name the formats' dtypes that torch has no
    tensors of."""
    if stored.dtype not in DTYPES:
        raise QlabError(
            f"{stored.file}: {name} is stored as {stored.dtype}, which qlab does not read"
        )
    return DTYPES[stored.dtype]


class OpenFiles:
    """Files that stay open from one read to the next, so that each is opened once where tensors are
    read file by file. Of more than MOST the one that was read longest ago is closed."""

    MOST = 32

    def __init__(self) -> None:
        self._files: dict[Path, IO[bytes]] = {}
        weakref.finalize(self, _close, self._files)

    @contextmanager
    def at(self, path: Path, seen: Seen, start: int) -> Iterator[IO[bytes]]:
        """A file, of which the next byte that is read is that number; refuses one that cannot be
        read, and one that is not the file whose header was read (`seen`)."""
        with reading(path):
            file = self._files.pop(path, None) or path.open("rb")
            self._files[path] = file  # the last one that was read
            for oldest in list(self._files)[: -self.MOST]:
                self._files.pop(oldest).close()
            refuse_another(path, file, seen)
            file.seek(start)
            yield file
            refuse_another(path, file, seen)


def _close(files: Mapping[Path, IO[bytes]]) -> None:
    for file in files.values():
        file.close()


def read(
    name: str,
    stored: Stored,
    files: OpenFiles | None = None,
    buffers: "Buffers | None" = None,
    take: Callable[[memoryview], None] | None = None,
) -> Tensor:
    """The tensor itself, in memory of its own.

    Args:
        name: What it is called, for errors.
        stored: Where it lies.
        files: Those that stay open; None: it is opened for this tensor.
        buffers: Where memory is taken from; None: it is fresh.
        take: Gets its bytes, part by part, as they are read.
    """
    dtype, files = dtype_of(name, stored), files or OpenFiles()
    if buffers is None:
        data = torch.empty(stored.nbytes, dtype=torch.uint8, device="cpu")
    else:
        data = buffers.empty(stored.nbytes)
    whole, read_bytes = data.numpy().data, 0
    # what is to be taken is taken in blocks that stay in a core's cache
    step = BLOCK if take else max(1, stored.nbytes)
    with files.at(stored.file, stored.seen, stored.start) as file:
        for first in range(0, stored.nbytes, step):
            part = whole[first : first + step]
            read_bytes += file.readinto(part)  # type: ignore[attr-defined]
            if read_bytes < first + len(part):
                raise Unreadable(
                    f"{stored.file} became shorter while it was read; download it again"
                )
            if take:
                take(part)
    return data.view(dtype).reshape(stored.shape)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor: its own memory where that is contiguous and the processor's."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def same_bytes(a: Stored, b: Stored) -> bool:
    """Whether two stored tensors have one dtype, one shape and the same bytes; a part of them is in
    memory at a time."""
    if (a.dtype, a.shape, a.nbytes) != (b.dtype, b.shape, b.nbytes):
        return False
    with opened(a.file, a.seen) as one, opened(b.file, b.seen) as other:
        one.seek(a.start)
        other.seek(b.start)
        sizes = [min(BLOCK, a.nbytes - done) for done in range(0, a.nbytes, BLOCK)]
        return all(one.read(size) == other.read(size) for size in sizes)


class Spool:
    """Tensors on their way to a safetensors file.

    The header comes first in the file and is known last: data waits in nameless files beside
    `path`. There is one for each width of element, and the widest is joined first, since readers
    view the bytes in place and need them aligned.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header: dict[str, dict[str, Any]] = {}
        self._files: dict[int, IO[bytes]] = {}
        self._stack = ExitStack()  # closes them

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, which is let go of."""
        if tensor.dtype not in NAMES or name in self._header or name == METADATA:
            raise QlabError(
                f"{name} is {tensor.dtype}, which {self.path.name} cannot hold, or occurs twice; "
                "rename or cast it"
            )
        width = tensor.itemsize
        if width not in self._files:
            begun = TemporaryFile(dir=self.path.parent)  # noqa: SIM115
            self._files[width] = self._stack.enter_context(begun)
        file = self._files[width]
        self._header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [file.tell()],
        }
        if tensor.numel():
            file.write(bytes_of(tensor))
        self._header[name]["data_offsets"].append(file.tell())

    def write(self, path: Path) -> str:
        """Write the file. Returns its hash."""
        hashed, block = hasher(), memoryview(bytearray(BLOCK))
        with path.open("wb") as file:
            text = self._text()
            hashed.update(text)
            file.write(text)
            for width in sorted(self._files, reverse=True):
                part = self._files[width]
                part.seek(0)
                while size := part.readinto(block):  # type: ignore[attr-defined]
                    hashed.update(block[:size])
                    file.write(block[:size])
        return said(hashed)

    def _text(self) -> bytes:
        """The header and its length, behind which data begins at a multiple of 8 bytes."""
        begins, begin = {}, 0
        for width in sorted(self._files, reverse=True):
            begins[width] = begin
            begin += self._files[width].tell()
        header: dict[str, Any] = {METADATA: {"format": "pt"}}
        for name, entry in sorted(self._header.items()):
            begin = begins[DTYPES[entry["dtype"]].itemsize]
            offsets = [begin + offset for offset in entry["data_offsets"]]
            header[name] = {**entry, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def close(self) -> None:
        """Let go of all data, also of what a full disk did not take."""
        with suppress(OSError):
            self._stack.close()


def write(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A safetensors file of these tensors, each let go of before the next one is asked for
    (`Spool`). Returns the file's hash."""
    spool = Spool(path)
    try:
        for name, tensor in tensors:
            spool.add(name, tensor)
            del tensor
        return spool.write(path)
    finally:
        spool.close()


def refuse_overflow(where: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Refuse a tensor with finite numbers that would be Inf in a dtype of a smaller range."""
    most = torch.finfo(dtype).max
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if torch.finfo(tensor.dtype).max <= most:
        return
    finite = tensor.abs().nan_to_num(nan=0.0, posinf=0.0)
    largest = float(finite.max())
    if largest > most:
        raise QlabError(
            f"{where} holds {largest:.3g}, and {dtype} numbers end at {most:.3g}; run the model "
            "in bfloat16 or float32"
        )
