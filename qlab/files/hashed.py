"""The files of a model, hashed while their tensors are read, so that no byte is read for its hash
alone.

sha256 takes the bytes of a file in their order. A tensor that is read in this order is hashed from
memory, in a thread beside the one that reads. One that is read before its turn is read a second
time when its turn comes: files list layer 10 before layer 2, and single experts in another order
than a model stacks them. What nobody reads is read once, for the hash of the whole file.
"""

import hashlib
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from qlab.errors import Unreadable
from qlab.files.directory import CONFIG, Seen, Stored, opened
from qlab.files.tensors import BLOCK, Buffers, OpenFiles, bytes_of, read
from qlab.process.later import Later

SAMPLE = 4096  # bytes of every tensor in a fingerprint
BESIDE = 1 << 16  # bytes that are hashed in a thread; one takes longer to start than fewer take


def fingerprint(folder: Path, stored: Mapping[str, Stored]) -> str:
    """sha256 over config.json, where each tensor lies, and some bytes from the middle of each: what
    tells two models apart without reading them."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    in_place = sorted(stored.items(), key=lambda item: (item[1].file, item[1].start))
    for file, tensors in groupby(in_place, key=lambda item: item[1].file):
        inside = list(tensors)
        with opened(file, inside[0][1].seen) as stream:
            for name, tensor in inside:
                place = (file.name, name, tensor.dtype, tensor.shape, tensor.start, tensor.stop)
                digest.update(repr(place).encode())
                stream.seek(tensor.start + max(0, tensor.nbytes - SAMPLE) // 2)
                digest.update(stream.read(min(SAMPLE, tensor.nbytes)))
    return digest.hexdigest()


class Behind:
    """sha256 of bytes that come in parts, of which the last one may still be hashed while the
    caller goes on. The caller writes to none of them.

    One part waits at a time, so that they take no more memory than the largest two.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._last: Later[None] | None = None

    def update(self, data: Any) -> None:
        """Add a part: any buffer of bytes."""
        self._settle()
        if len(data) < BESIDE:
            self._digest.update(data)
        else:
            self._last = Later(self._digest.update, data)

    def digest(self) -> bytes:
        """The hash of all parts until now."""
        self._settle()
        return self._digest.digest()

    def hexdigest(self) -> str:
        """`digest` in hexadecimal digits."""
        return self.digest().hex()

    def _settle(self) -> None:
        if self._last is not None:
            self._last.result()
            self._last = None


class HashedFiles:
    """The files of a model, read through `read` and hashed on the way. Each stays open, so that a
    pass in their order opens it once.

    Args:
        folder: The model directory, which holds config.json.
        stored: Tensor name -> where it lies.
    """

    def __init__(self, folder: Path, stored: Mapping[str, Stored]) -> None:
        self.folder, self.stored = folder, stored
        self._files, self._buffers = OpenFiles(), Buffers()
        self._hashed = self._nothing_hashed()
        self._early: dict[str, str] = {}  # tensor that was read before its turn -> sha256

    def _nothing_hashed(self) -> dict[Path, "_HashedFile"]:
        """File -> its hash, before anything is read, in the order of their names."""
        starts: dict[Path, list[int]] = {}
        seen: dict[Path, Seen] = {}
        for tensor in self.stored.values():
            begins = starts.setdefault(tensor.file, [])
            seen[tensor.file] = tensor.seen
            if tensor.nbytes:
                begins.append(tensor.start)
        return {
            file: _HashedFile(file, seen[file], starts[file], self._files)
            for file in sorted(starts)
        }

    def read(self, name: str, stored: Stored) -> Tensor:
        """The tensor itself, as `qlab.files.tensors.read` reads it. It may still be hashed, so
        nobody writes to it."""
        tensor = read(name, stored, self._files, self._buffers)
        if stored.nbytes:
            data = bytes_of(tensor)
            was_hashed = self._hashed[stored.file].add(stored, data)
            if not was_hashed and name not in self._early:
                self._early[name] = hashlib.sha256(data).hexdigest()
        return tensor

    def sha256(self) -> str:
        """sha256 over config.json and the sha256 of every file, in the order of their names; reads
        what was not hashed yet."""
        digest = hashlib.sha256((self.folder / CONFIG).read_bytes())
        for file in self._hashed.values():
            digest.update(file.digest())
        return digest.hexdigest()

    # ------------------------------------------------------------------ several that read
    def whole_files(self) -> dict[str, bytes]:
        """The files that are hashed to their end: name -> hash."""
        whole = [file for file in self._hashed.values() if file.position == file.seen.size]
        return {file.path.name: file.digest() for file in whole}

    def know(self, whole: Mapping[str, bytes]) -> None:
        """Take over hashes of whole files that somebody else has read, as `whole_files` gives
        them."""
        for file in self._hashed.values():
            file.known = whole.get(file.path.name, file.known)

    # ------------------------------------------------------------------ resuming
    def proof(self) -> dict[str, Any]:
        """What was read up to now, as plain data: `files` is file -> [number of bytes from its
        beginning, their sha256], and `tensors` the sha256 of every tensor beyond these."""
        begun = {file.path.name: file for file in self._hashed.values() if file.position}
        ahead = {
            name: digest
            for name, digest in self._early.items()
            if self.stored[name].start >= self._hashed[self.stored[name].file].position
        }
        prefixes = {name: [file.position, file.hasher.hexdigest()] for name, file in begun.items()}
        return {"files": prefixes, "tensors": ahead}

    def agrees(self, proofs: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the files still hold what these proofs say that was read of them. Reads all files
        whole, after which their hash is known."""
        prefixes: dict[str, dict[int, str]] = {}
        tensors: dict[str, str] = {}
        for proof in proofs:
            for name, (position, digest) in proof["files"].items():
                if prefixes.setdefault(name, {}).setdefault(position, digest) != digest:
                    return False
            for name, digest in proof["tensors"].items():
                if tensors.setdefault(name, digest) != digest:
                    return False
        self._hashed = self._nothing_hashed()
        here = {file.path.name: file for file in self._hashed.values()}
        return (
            prefixes.keys() <= here.keys()
            and tensors.keys() <= self.stored.keys()
            and all(file.agrees(prefixes.get(name, {})) for name, file in here.items())
            and all(self._sha256_of(name) == digest for name, digest in tensors.items())
        )

    def _sha256_of(self, name: str) -> str:
        return hashlib.sha256(bytes_of(read(name, self.stored[name], self._files))).hexdigest()


class _HashedFile:
    """sha256 of a file, of which the bytes before `position` are hashed."""

    def __init__(self, path: Path, seen: Seen, starts: Iterable[int], files: OpenFiles) -> None:
        self.path, self.seen, self._files = path, seen, files
        self.position = 0
        self.known: bytes | None = None  # the hash of the whole file, by who has read it
        self.hasher = Behind()
        self._unread = sorted(starts, reverse=True)  # where tensors begin; the last comes first
        self._read: set[int] = set()

    def add(self, tensor: Stored, data: memoryview) -> bool:
        """Hash a tensor that was read, or leave it for later where an unread one lies before it;
        whether it is hashed now."""
        self._read.add(tensor.start)
        while self._unread and self._unread[-1] in self._read:
            self._unread.pop()
        if tensor.start < self.position:
            return True
        if self._unread and self._unread[-1] < tensor.start:
            return False
        self.hash_up_to(tensor.start)
        self.hasher.update(data)
        self.position = tensor.stop
        return True

    def hash_up_to(self, stop: int) -> None:
        """Read the file from `position` to `stop` for its hash."""
        if stop == self.position:
            return
        with self._files.at(self.path, self.seen, self.position) as stream:
            while self.position < stop:
                block = stream.read(min(BLOCK, stop - self.position))
                if not block:
                    raise Unreadable(
                        f"{self.path} became shorter while it was read; download it again"
                    )
                self.hasher.update(block)
                self.position += len(block)

    def digest(self) -> bytes:
        """The hash of the whole file, of which the rest is read where nobody else did."""
        if self.known is not None:
            return self.known
        self.finish()
        return self.hasher.digest()

    def finish(self) -> None:
        """Hash the rest of the file."""
        self.hash_up_to(self.seen.size)

    def agrees(self, prefixes: Mapping[int, str]) -> bool:
        """Whether the first bytes of the file have these hashes: number of bytes -> sha256."""
        for position in sorted(prefixes):
            if not self.position <= position <= self.seen.size:
                return False
            self.hash_up_to(position)
            if self.hasher.hexdigest() != prefixes[position]:
                return False
        self.finish()
        return True
