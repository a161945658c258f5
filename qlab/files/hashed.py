"""The files of a model, hashed while their tensors are read, so that no byte is read for its hash
alone.

A hash takes the bytes of a file in their order. A tensor that is read in this order is hashed part
by part, while each is in a core's cache. One that is read before its turn is read a second time
when its turn comes: files list layer 10 before layer 2, and single experts in another order
than a model stacks them. What nobody reads is read once, for the hash of the whole file.
"""

import threading
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from qlab.errors import Unreadable
from qlab.files.digests import BLOCK, hasher, said
from qlab.files.directory import CONFIG, Seen, Stored, opened
from qlab.files.tensors import OpenFiles, bytes_of, read

SAMPLE = 4096  # bytes of every tensor in a fingerprint


def fingerprint(folder: Path, stored: Mapping[str, Stored]) -> str:
    """The hash of config.json, where each tensor lies, and some bytes from the middle of each: what
    tells two models apart without reading them."""
    digest = hasher()
    digest.update((folder / CONFIG).read_bytes())
    in_place = sorted(stored.items(), key=lambda item: (item[1].file, item[1].start))
    for file, tensors in groupby(in_place, key=lambda item: item[1].file):
        inside = list(tensors)
        with opened(file, inside[0][1].seen) as stream:
            for name, tensor in inside:
                place = (file.name, name, tensor.dtype, tensor.shape, tensor.start, tensor.stop)
                digest.update(repr(place).encode())
                stream.seek(tensor.start + max(0, tensor.nbytes - SAMPLE) // 2)
                digest.update(stream.read(min(SAMPLE, tensor.nbytes)))
    return said(digest)


class HashedFiles:
    """The files of a model, read through `read` and hashed on the way. Each stays open, so that a
    pass in their order opens it once.

    Args:
        folder: The model directory, which holds config.json.
        stored: Tensor name -> where it lies.
    """

    def __init__(self, folder: Path, stored: Mapping[str, Stored]) -> None:
        from qlab_kernels.buffers import Buffers

        self.folder, self.stored = folder, stored
        self._files, self._buffers = OpenFiles(), Buffers()
        self._lock = threading.Lock()  # proofs are written while the next tensors are read
        self._hashed = self._nothing_hashed()
        self._early: dict[str, str] = {}  # tensor that was read before its turn -> hash

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
        """The tensor itself, as `qlab.files.tensors.read` reads it."""
        with self._lock:
            file = self._hashed[stored.file]
            is_next = stored.nbytes > 0 and file.is_next(stored)
            take = file.take if is_next else None
            tensor = read(name, stored, self._files, self._buffers, take)
            is_early = stored.nbytes > 0 and stored.start >= file.position
            if is_early and name not in self._early:
                self._early[name] = _hash_of(bytes_of(tensor))
            return tensor

    def digest(self) -> str:
        """The hash of config.json and the hash of every file, in the order of their names; reads
        what was not hashed yet."""
        digest = hasher()
        digest.update((self.folder / CONFIG).read_bytes())
        for file in self._hashed.values():
            digest.update(file.digest())
        return said(digest)

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
        beginning, their hash], and `tensors` the hash of every tensor beyond these."""
        with self._lock:
            begun = {file.path.name: file for file in self._hashed.values() if file.position}
            ahead = {
                name: digest
                for name, digest in self._early.items()
                if self.stored[name].start >= self._hashed[self.stored[name].file].position
            }
            prefixes = {name: [file.position, said(file.hasher)] for name, file in begun.items()}
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
            and all(self._digest_of(name) == digest for name, digest in tensors.items())
        )

    def _digest_of(self, name: str) -> str:
        return _hash_of(bytes_of(read(name, self.stored[name], self._files)))


def _hash_of(data: memoryview) -> str:
    digest = hasher()
    digest.update(data)
    return said(digest)


class _HashedFile:
    """The hash of a file, of which the bytes before `position` are hashed."""

    def __init__(self, path: Path, seen: Seen, starts: Iterable[int], files: OpenFiles) -> None:
        self.path, self.seen, self._files = path, seen, files
        self.position = 0
        self.known: bytes | None = None  # the hash of the whole file, by who has read it
        self.hasher = hasher()
        self._unread = sorted(starts, reverse=True)  # where tensors begin; the last comes first
        self._read: set[int] = set()

    def is_next(self, tensor: Stored) -> bool:
        """Whether the bytes of a tensor that is about to be read are those to be hashed next:
        neither hashed before, nor behind those of an unread one. What lies between is hashed."""
        self._read.add(tensor.start)
        while self._unread and self._unread[-1] in self._read:
            self._unread.pop()
        is_behind = self._unread and self._unread[-1] < tensor.start
        if is_behind or tensor.start < self.position:
            return False
        self.hash_up_to(tensor.start)
        return True

    def take(self, data: bytes | memoryview) -> None:
        """Hash the next bytes."""
        self.hasher.update(data)
        self.position += len(data)

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
                self.take(block)

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
        """Whether the first bytes of the file have these hashes: number of bytes -> hash."""
        for position in sorted(prefixes):
            if not self.position <= position <= self.seen.size:
                return False
            self.hash_up_to(position)
            if said(self.hasher) != prefixes[position]:
                return False
        self.finish()
        return True
