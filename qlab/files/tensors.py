"""Tensors in safetensors files: one read by its place, and a file written tensor by tensor.

Both touch the bytes of one tensor at a time and map nothing into memory, so that models larger than
memory pass through.
"""

import json
import shutil
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import torch
from torch import Tensor

from qlab.errors import QlabError, Unreadable
from qlab.files.directory import METADATA, Seen, Stored, opened, reading, refuse_another

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
BLOCK = 1 << 20


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


class Buffers:
    """Memory into which tensors are read, used again where no tensor of it is left: the system
    takes longer to hand out fresh memory than to read a file into it.

    Up to KEPT buffers wait for their next tensor, of which the largest are kept.
    """

    KEPT, LEAST = 3, 1 << 20  # LEAST: bytes of a tensor that is worth it

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Tensor] = []

    def empty(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of any numbers."""
        if nbytes < self.LEAST:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        with self._lock:
            # What comes back meanwhile is appended to the one list or to the other.
            free, self._free = self._free, []
            free.sort(key=len)
            fitting = [i for i, each in enumerate(free) if nbytes <= len(each) <= 2 * nbytes]
            buffer = free.pop(fitting[0]) if fitting else None
            self._free += free[-self.KEPT :]
        if buffer is None:
            buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        lent = buffer.numpy()[:nbytes]  # which a tensor holds as long as it lives
        weakref.finalize(lent, self._back, buffer).atexit = False
        return torch.from_numpy(lent)

    def _back(self, buffer: Tensor) -> None:
        self._free.append(buffer)  # without the lock: the collector may call this inside of it


def _close(files: Mapping[Path, IO[bytes]]) -> None:
    for file in files.values():
        file.close()


def read(
    name: str, stored: Stored, files: OpenFiles | None = None, buffers: Buffers | None = None
) -> Tensor:
    """The tensor itself, in memory of its own. files: those that stay open (None: it is opened for
    this tensor). buffers: where memory is taken from (None: it is fresh)."""
    dtype, files = dtype_of(name, stored), files or OpenFiles()
    data = (buffers or Buffers()).empty(stored.nbytes)
    with files.at(stored.file, stored.seen, stored.start) as file:
        size = file.readinto(data.numpy().data) if stored.nbytes else 0  # type: ignore[attr-defined]
    if size < stored.nbytes:
        raise Unreadable(f"{stored.file} became shorter while it was read; download it again")
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


def write(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """A safetensors file of these tensors, each let go of before the next one is asked for.

    The header comes first in the file and is known last: data waits in nameless files beside
    `path`. There is one for each width of element, and the widest is joined first, since readers
    view the bytes in place and need them aligned.
    """
    header: dict[str, dict] = {}
    with ExitStack() as stack:
        spools: dict[int, IO[bytes]] = {}
        for name, tensor in tensors:
            if tensor.dtype not in NAMES or name in header or name == METADATA:
                raise QlabError(
                    f"{name} is {tensor.dtype}, which {path.name} cannot hold, or occurs twice; "
                    "rename or cast it"
                )
            data = tensor.detach().cpu().contiguous()
            spool = spools.get(data.itemsize) or stack.enter_context(TemporaryFile(dir=path.parent))
            spools[data.itemsize] = spool
            header[name] = {
                "dtype": NAMES[data.dtype],
                "shape": list(data.shape),
                "data_offsets": [spool.tell()],
            }
            if data.numel():
                spool.write(bytes_of(data))
            header[name]["data_offsets"].append(spool.tell())
            del tensor, data
        begin = 0
        for width in sorted(spools, reverse=True):
            for entry in header.values():
                if DTYPES[entry["dtype"]].itemsize == width:
                    entry["data_offsets"] = [begin + offset for offset in entry["data_offsets"]]
            begin += spools[width].tell()
        _join(path, header, [spools[width] for width in sorted(spools, reverse=True)])


def _join(path: Path, header: dict[str, dict], parts: list[IO[bytes]]) -> None:
    text = json.dumps(
        {METADATA: {"format": "pt"}} | dict(sorted(header.items())), separators=(",", ":")
    ).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            part.seek(0)
            shutil.copyfileobj(part, file, BLOCK)


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
