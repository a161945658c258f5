"""The config cache: which configuration runs for a problem, looked up without ever timing anything.

The first of these that has a legal one decides:
    override            $QLAB_KERNEL_CONFIG: a config as JSON, '{"op": "int4_mm", "kind":
                        "dequant"}', or a file that `export` wrote
    user                the user's own entry for this problem and device
    shipped-device      an entry of this package for this device
    shipped-capability  the same for another device of the capability
    nearest             the closest entry of its capability, dtype, group and zeros, by log distance
                        in n, k, experts and rows of each
    heuristic           `config.heuristic`

The user's files lie in $QLAB_CACHE_DIR, else $QLAB_HOME/configs, else $XDG_CACHE_HOME/qlab/configs
or ~/.cache/qlab/configs. All files and the environment are read once, into a snapshot: lookups are
pure until `refresh`, and `snapshot_hash` names what they depend on. An entry of an older kernel,
Triton or torch is used where there is no newer (`Found.stale`); it is tuned anew only on request.
"""

import hashlib
import json
import math
import os
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

from qlab_kernels import entries
from qlab_kernels.config import (
    OPERATORS,
    Config,
    Problem,
    heuristic,
    kernel_revision,
    legal,
    rows_each,
)
from qlab_kernels.entries import MODEL, CacheError, Entry, Key, Table, file_name, key_of

Source = Literal["override", "user", "shipped-device", "shipped-capability", "nearest", "heuristic"]
OVERRIDE = "QLAB_KERNEL_CONFIG"
SHIPPED = Path(__file__).parent / "tuned"
# in log2: an entry for more than twice or less than half the rows per weight may belong to another
# regime
M_REACH = 1.0
REACH = 6.0  # in log2 over n, k, experts and rows of each together


@dataclass(frozen=True)
class Found:
    """A configuration, where it came from, the entry behind it (None for heuristic and inline
    override), and whether that was timed with other versions of the kernels, Triton or torch."""

    config: Config
    source: Source
    entry: Entry | None = None
    stale: bool = False


@dataclass(frozen=True)
class Snapshot:
    """Everything that lookups depend on. Tables by file name."""

    user: Mapping[str, Table]
    shipped: Mapping[str, Table]
    override: Mapping[str, Table] = field(default_factory=dict)
    inline: tuple[str | None, Config] | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)  # revisions by operator
    _found: dict[Problem, Found] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def hash(self) -> str:
        """16 hex digits over all of it."""
        digest = hashlib.sha256(f"{self.inline} {sorted(self.kernels.items())}".encode())
        for layer in (self.override, self.user, self.shipped):
            for name, table in sorted(layer.items()):
                entries = sorted(f"{key} {entry}" for key, entry in table.entries.items())
                digest.update(f"{name} {entries}".encode())
            digest.update(b"layer")
        return digest.hexdigest()[:16]

    def lookup(self, p: Problem) -> Found:
        """The configuration for `p`. KernelError when an override does not suit it, or when nothing
        computes it."""
        known = self._found.get(p)
        if known is None:
            known = self._found[p] = self._search(p)
        return known

    def _search(self, p: Problem) -> Found:
        if self.inline and self.inline[0] in (None, p.op):
            why = legal(p, self.inline[1])
            if why:
                raise CacheError(
                    f"${OVERRIDE} asks for {self.inline[1]}, which does not suit n={p.n}, "
                    f"k={p.k}, m={p.m}: {why}"
                )
            return Found(self.inline[1], "override")
        kernel = self.kernels.get(p.op, "")
        name, key_asked = file_name(p.op, p.cc), key_of(p, kernel)
        layers: tuple[tuple[Source, Mapping[str, Table], bool], ...] = (
            ("override", self.override, False),
            ("user", self.user, True),
            ("shipped-device", self.shipped, True),
            ("shipped-capability", self.shipped, False),
        )
        for source, layer, same_device in layers:
            table = layer.get(name)
            for key, entry in _exact(table, key_asked, same_device) if table else ():
                if legal(p, entry.config) is None:
                    return Found(entry.config, source, entry, stale(entry, key, kernel))
        return self._nearest(p, name, key_asked) or Found(heuristic(p), "heuristic")

    def _nearest(self, p: Problem, name: str, key_asked: Key) -> Found | None:
        tables = [layer[name] for layer in (self.user, self.shipped) if name in layer]
        near = [
            (*_distance(key_asked, key), str(key), entry)
            for table in tables
            for key, entry in table.entries.items()
            if _kind(key) == _kind(key_asked) and _distance(key_asked, key)[0] <= REACH
        ]
        for *_, text, entry in sorted(near, key=lambda row: row[:-1]):
            if legal(p, entry.config) is None:
                return Found(
                    entry.config,
                    "nearest",
                    entry,
                    stale(entry, entries.key_from(text), key_asked.kernel),
                )
        return None


def stale(entry: Entry, key: Key, kernel: str) -> bool:
    """Whether an entry was measured with other kernels or versions than these. What was only
    modelled does not age."""
    return entry.source == "measured" and (key.kernel, entry.triton, entry.torch) != (
        kernel,
        *entries.versions(),
    )


def _exact(table: Table, key_asked: Key, same_device: bool) -> list[tuple[Key, Entry]]:
    """Entries for the very problem: this device and kernel first, then the newest."""
    same = [
        (key, entry)
        for key, entry in table.entries.items()
        if (*_kind(key), key.experts, key.n, key.k, key.m)
        == (*_kind(key_asked), key_asked.experts, key_asked.n, key_asked.k, key_asked.m)
        and (key.device == key_asked.device or not same_device)
    ]
    same.sort(key=lambda row: (row[1].date, str(row[0])), reverse=True)
    return sorted(
        same,
        key=lambda row: (
            row[0].device != key_asked.device,
            row[0].kernel != key_asked.kernel,
            row[1].source != "measured",
        ),
    )


def _kind(key: Key) -> tuple[str, str, bool]:
    return key.dtype, key.group, key.zeros


def _distance(key_asked: Key, key: Key) -> tuple[float, bool, bool]:
    """Log distance, then whether it is another device's and whether nobody timed it. Infinite where
    the rows that a weight multiplies are of another regime."""
    rows = _apart(rows_each(key_asked.m, key_asked.experts), rows_each(key.m, key.experts))
    sizes = (
        _apart(key_asked.n, key.n)
        + _apart(key_asked.k, key.k)
        + _apart(key_asked.experts, key.experts)
    )
    return (
        math.inf if rows > M_REACH else sizes + rows,
        key.device != key_asked.device,
        key.kernel == MODEL,
    )


def _apart(a: float, b: float) -> float:
    return abs(math.log2(max(a, 1) / max(b, 1)))


# ---------------------------------------------------------------- the snapshot of this process
_current: Snapshot | None = None
# Entries that could not be written to a read-only folder, by file name.
_unwritten: dict[str, dict[Key, Entry]] = {}


def snapshot() -> Snapshot:
    """The snapshot of this process, read on first use."""
    global _current
    if _current is None:
        _current = _load()
    return _current


def refresh() -> Snapshot:
    """Read the environment and all files anew."""
    global _current
    _current = None
    return snapshot()


def lookup(p: Problem) -> Found:
    """The configuration for `p` and where it came from; pure for a snapshot."""
    return snapshot().lookup(p)


def snapshot_hash() -> str:
    """A hash of all that lookups depend on. It is part of the key of anything that keeps a
    looked-up configuration."""
    return snapshot().hash


def folder() -> Path:
    """Where the user's own entries lie."""
    configured = os.environ.get("QLAB_CACHE_DIR")
    if configured:
        return _expanded(configured)
    home = os.environ.get("QLAB_HOME")
    if home:
        return _expanded(home) / "configs"
    try:
        return (
            Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qlab" / "configs"
        )
    except RuntimeError:
        # A process without a home, as in some containers, has no entries and no folder for them.
        return Path(os.devnull) / "qlab" / "configs"


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise CacheError(
            f"{path} names nobody's home; set the variable that holds it to a folder"
        ) from error


def _load() -> Snapshot:
    override, inline = _override()
    user = user_tables()
    for name, unwritten in _unwritten.items():
        table = user.get(name) or Table({}, {})
        user[name] = Table(table.meta, {**table.entries, **unwritten})
    revisions = {op: kernel_revision(op) for op in OPERATORS}
    return Snapshot(user, shipped_tables(), override, inline, revisions)


def user_tables() -> dict[str, Table]:
    """The readable tables of the user's folder by file name; a corrupt file is set aside with a
    warning."""
    tables = {path.name: entries.read_or_set_aside(path) for path in _files(folder())}
    return {name: table for name, table in tables.items() if table}


def shipped_tables() -> dict[str, Table]:
    """The tables of this package by file name."""
    tables = {path.name: _shipped(path, path.stat().st_mtime_ns) for path in _files(SHIPPED)}
    return {name: table for name, table in tables.items() if table}


@cache
def _shipped(path: Path, written: int) -> Table | None:
    """A table of this package, parsed once for as long as its file stays as it was written: every
    entry that is stored makes a new snapshot, and none of them changes what is shipped."""
    return entries.read(path)


def _files(where: Path) -> list[Path]:
    return sorted(where.glob("[!.]*.*.json")) if os.access(where, os.R_OK | os.X_OK) else []


def _override() -> tuple[dict[str, Table], tuple[str | None, Config] | None]:
    """What $QLAB_KERNEL_CONFIG says: tables of a file, or one config."""
    text = os.environ.get(OVERRIDE)
    if not text:
        return {}, None
    try:
        if not text.lstrip().startswith("{"):
            return read_exported(_expanded(text)), None
        value = entries.load(text)
        op = value.pop("op", None)
        if op not in (None, *OPERATORS):
            raise ValueError(f"no operator {op!r}: there are {', '.join(OPERATORS)}")
        return {}, (op, entries.config_from(value))
    except (ValueError, OSError) as error:
        raise CacheError(
            f"${OVERRIDE} is neither a config as JSON nor a file that `qlab cache export` wrote: "
            f"{error}"
        ) from error


# ---------------------------------------------------------------- writes
def store(p: Problem, entry: Entry) -> None:
    """Keep the entry of a problem, in the user's file and for this process.

    Where the file cannot be written it lasts as long as the process, with a warning. KernelError
    for an illegal config.
    """
    why = legal(p, entry.config)
    if why:
        raise CacheError(f"{entry.config} is no entry for n={p.n}, k={p.k}, m={p.m}: {why}")
    name = file_name(p.op, p.cc)
    key = key_of(p, MODEL if entry.source == "modelled" else kernel_revision(p.op))
    try:
        entries.update(folder() / name, lambda kept: kept.update({key: entry}))
    except OSError as error:
        _unwritten.setdefault(name, {})[key] = entry
        warnings.warn(
            f"{folder() / name} cannot be written ({error.strerror}): the entry lasts as long as "
            "this process; set QLAB_CACHE_DIR to a folder that can be",
            stacklevel=2,
        )
    refresh()


def forget() -> None:
    """Drop the entries that a read-only folder could not take."""
    _unwritten.clear()


def require_writable() -> None:
    """CacheError when the user's folder cannot take entries: asked before time is spent on
    measuring them."""
    where = folder()
    probe = where / f".{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        where.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(
            f"{where} cannot be written ({error.strerror}), so nothing that is tuned could be "
            "kept: set QLAB_CACHE_DIR to a folder that can be"
        ) from error


def fresh(p: Problem) -> Entry | None:
    """The user's own measured entry for this very problem, device and versions, read from the disk;
    None when there is none."""
    try:
        table = entries.read(folder() / file_name(p.op, p.cc))
    except (ValueError, OSError):
        return None
    key = key_of(p, kernel_revision(p.op))
    entry = table.entries.get(key) if table else None
    usable = (
        entry
        and entry.source == "measured"
        and not stale(entry, key, key.kernel)
        and legal(p, entry.config) is None
    )
    return entry if usable else None


def read_exported(path: Path) -> dict[str, Table]:
    """The tables, by file name, of a file that `transfer.export` wrote, or of a single table.
    ValueError when it is neither."""
    value = entries.load(path.read_bytes())
    tables = [
        entries.parse(json.dumps(part)) for part in (value if isinstance(value, list) else [value])
    ]
    return {f"{table.meta['op']}.{table.meta['capability']}.json": table for table in tables}
