"""Whether what a GGUF file says of itself fits into the file, before a reader believes it.

    magic "GGUF", version u32, tensors u64, keys u64
    keys      name, type u32, value; a list is a type u32, a count u64 and its values
    tensors   name, axes u32, sizes u64, kind u32, offset u64
    data      from the next multiple of the alignment on; so is each tensor in it, without gaps

A text, and a name, is its length u64 and its bytes in UTF-8. All numbers are little-endian.

A count is a promise: the package's reader goes on where a file has ended, and llama.cpp's refuses
tensors that overlap. Source: the format's description in ggml (docs/gguf.md), gguf.cpp.
"""

import mmap
import struct
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

MAGIC, VERSIONS = b"GGUF", (2, 3)
# type of a value -> its bytes
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
U32, TEXT, LIST = 4, 8, 9
ALIGNMENT = "general.alignment"
MOST_AXES = 4  # of a tensor, as in ggml
DEEPEST = 4  # lists inside each other


def check(path: Path, sizes: Mapping[int, tuple[int, int]]) -> None:
    """Raise ValueError for a file whose header does not describe it. sizes: kind of a tensor ->
    (numbers in a block, bytes of a block)."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        _Walk(data, sizes).walk()


class _Walk:
    """One pass over the header of a file."""

    def __init__(self, data: mmap.mmap, sizes: Mapping[int, tuple[int, int]]):
        self.data, self.sizes, self.at, self.alignment = data, sizes, 0, 32

    def walk(self) -> None:
        if self._bytes(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number(4)
        if version not in VERSIONS:
            raise ValueError(f"version {version}, where 2 and 3 of little-endian files are read")
        tensors, keys = self._number(8), self._number(8)
        self._distinct(keys, "key", self._key)
        places = self._distinct(tensors, "tensor", self._tensor)
        self.at += -self.at % self.alignment
        end = 0
        for name, (offset, size) in places.items():
            if offset != end:
                raise ValueError(f"{name!r:.60} begins at {offset} of the data and not at {end}")
            end += size + -size % self.alignment
            if self.at + offset + size > len(self.data):
                raise ValueError(f"{name!r:.60} ends behind the file")

    def _distinct(
        self, count: int, kind: str, read: Callable[[str], tuple[int, int]]
    ) -> dict[str, tuple[int, int]]:
        """Name -> what `read` finds behind it; the file may not hold as many as it says."""
        found: dict[str, tuple[int, int]] = {}
        for _ in range(count):
            name = self._text()
            if name in found:
                raise ValueError(f"the {kind} {name!r:.60} occurs twice")
            found[name] = read(name)
        return found

    def _key(self, name: str) -> tuple[int, int]:
        kind, start = self._number(4), self.at
        self._value(kind, DEEPEST)
        if name == ALIGNMENT:
            self.alignment = int.from_bytes(self.data[start : self.at], "little")
            if kind != U32 or self.alignment.bit_count() != 1:
                raise ValueError(f"its {ALIGNMENT} is no power of two")
        return start, self.at

    def _value(self, kind: int, depth: int) -> None:
        """Go behind a value."""
        if kind == TEXT:
            self._pass(self._number(8))
        elif kind == LIST and depth:
            inner, count = self._number(4), self._number(8)
            if inner in SCALARS:
                self._pass(SCALARS[inner] * count)
                return
            for _ in range(count):
                self._value(inner, depth - 1)
        elif kind in SCALARS:
            self._pass(SCALARS[kind])
        else:
            raise ValueError(f"a value of the unknown type {kind}")

    def _tensor(self, name: str) -> tuple[int, int]:
        """Where its data begin, and how many bytes they are."""
        axes = self._number(4)
        if not 1 <= axes <= MOST_AXES:
            raise ValueError(f"{name!r:.60} has {axes} axes")
        shape = struct.unpack(f"<{axes}Q", self._bytes(8 * axes))
        kind, offset = self._number(4), self._number(8)
        if kind not in self.sizes:
            raise ValueError(f"{name!r:.60} is of the unknown kind {kind}")
        numbers, size = self.sizes[kind]
        if 0 in shape or shape[0] % numbers:
            raise ValueError(f"{name!r:.60} is {shape}, in blocks of {numbers} numbers")
        return offset, prod(shape) // numbers * size

    def _text(self) -> str:
        return self._bytes(self._number(8)).decode()

    def _number(self, size: int) -> int:
        return int.from_bytes(self._bytes(size), "little")

    def _bytes(self, count: int) -> bytes:
        start = self.at
        self._pass(count)
        return self.data[start : self.at]

    def _pass(self, count: int) -> None:
        """Go behind so many bytes."""
        if count > len(self.data) - self.at:
            raise ValueError(f"{count} bytes follow byte {self.at} of {len(self.data)}, it says")
        self.at += count
