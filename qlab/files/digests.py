"""Hashes of what may be large. BLAKE3 takes a third of the time of SHA-256, and as much trust.

A hash is said as `blake3:<64 digits>`. One without a name is SHA-256's, as older versions wrote it.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from qlab.errors import QlabError

BLOCK = 1 << 20
SIZE = 32  # bytes of a hash
NEW = "blake3"
KINDS: Mapping[str, Callable[[], "Hasher"]] = {NEW: blake3, "sha256": hashlib.sha256}


class Hasher(Protocol):
    """A hash of the bytes that it was given until now. name: of its kind."""

    @property
    def name(self) -> str: ...

    def update(self, data: Any, /) -> object:
        """Add any buffer of bytes."""

    def digest(self) -> bytes: ...

    def hexdigest(self) -> str: ...


def hasher(like: str | None = None) -> Hasher:
    """A hash of no bytes yet. like: a hash as it is said, of whose kind it is; None for a new one.

    Refuses a kind that this version does not know.
    """
    kind = NEW if like is None else str(like).rpartition(":")[0] or "sha256"
    if kind not in KINDS:
        raise QlabError(
            f"the hash {like!r:.40} is of the kind {kind!r:.20}, and this version knows "
            f"{' and '.join(KINDS)}; use the version of qlab that wrote it"
        )
    return KINDS[kind]()


def said(hashed: Hasher) -> str:
    """A hash as records say it."""
    digits = hashed.hexdigest()
    return digits if hashed.name == "sha256" else f"{hashed.name}:{digits}"


def digest_of(path: Path, like: str | None = None) -> str:
    """The hash of a file's bytes. like: see `hasher`."""
    hashed, block = hasher(like), memoryview(bytearray(BLOCK))
    with path.open("rb") as file:
        while size := file.readinto(block):  # type: ignore[attr-defined]
            hashed.update(block[:size])
    return said(hashed)
