"""One file of tuned configurations per operator and capability: its entries, and writes that many
processes may do at once.

    {op}.sm90.json = {"schema": 1, "meta": {op, capability, ...}, "entries": {key: {config, us,
    gbps, trials, device, triton, torch, date, source}}}

A key is `dtype/group/zeros/NxK/mBUCKET/device/kernel revision`, where a group of whole rows is
`row`; the number of experts stands before their shape (`8x4096x14336`). Fields that all entries of
a shipped file share stand in its `meta`. Writers load, merge and replace the file under a lock on a
sidecar, so that no entry is lost; a reader never locks: the file is only ever replaced whole.
"""

import fcntl
import json
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from qlab_kernels.capability import KernelError
from qlab_kernels.config import Config, Kind, Problem

SCHEMA = 1
# stands for the kernel revision in keys of modelled entries, which no kernel's source decides
MODEL = "model"


class CacheError(KernelError):
    """The config cache cannot do what was asked: which file, why, and what would work."""


@dataclass(frozen=True)
class Entry:
    """A configuration and what is known of it. us: microseconds per call; gbps: true bytes over
    that time; trials: how many configurations were timed (0 when modelled); triton, torch: the
    versions it was timed with; date: YYYY-MM-DD."""

    config: Config
    us: float
    gbps: float
    trials: int
    device: str
    triton: str | None
    torch: str
    source: Literal["measured", "modelled"]
    date: str

    def json(self) -> dict[str, Any]:
        """The fields; those of the config that have their default are left out."""
        usual = asdict(Config(self.config.kind))
        config = {k: v for k, v in asdict(self.config).items() if k == "kind" or v != usual[k]}
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "config": config}


def entry_from(row: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> Entry:
    """The inverse of `Entry.json`; what `row` lacks comes from `meta`. ValueError when it is no
    entry."""
    merged = {**{k: v for k, v in (meta or {}).items() if k in _FIELDS}, **row}
    try:
        config = config_from(merged["config"])
        entry = Entry(
            **{**merged, "config": config, "us": float(merged["us"]), "gbps": float(merged["gbps"])}
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not an entry: {error}") from error
    texts = {type(text) for text in (entry.device, entry.date, entry.torch, entry.triton or "")}
    figures = type(entry.trials) is int and 0 <= entry.us < math.inf and 0 <= entry.gbps < math.inf
    if not figures or texts != {str} or entry.source not in ("measured", "modelled"):
        raise ValueError(f"an entry whose values are not what they should be: {row}")
    return entry


def config_from(row: Mapping[str, Any]) -> Config:
    """A configuration from its fields; those that are missing have their default. ValueError when
    it is none."""
    try:
        config = Config(**row)
    except TypeError as error:
        raise ValueError(f"not a configuration: {error}") from error
    sizes = (config.bm, config.bn, config.bk, config.split, config.warps, config.stages)
    named = config.kind in get_args(Kind) and config.scale_on in ("accumulator", "weight")
    if not named or any(type(size) is not int for size in sizes):
        raise ValueError(f"a configuration whose values are not what they should be: {row}")
    return config


def load(text: str | bytes) -> Any:
    """The value of a JSON text. ValueError when it is none."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


_FIELDS = {f.name for f in fields(Entry)}


# ---------------------------------------------------------------- keys
@cache
def versions() -> tuple[str | None, str]:
    """Of Triton (None where it is not installed), which is not imported for it, and of torch:
    (triton, torch)."""
    try:
        return version("triton"), torch.__version__
    except PackageNotFoundError:
        return None, torch.__version__


@dataclass(frozen=True)
class Key:
    """What an entry is for; op and capability are the file's."""

    dtype: str
    group: str
    zeros: bool
    n: int
    k: int
    m: int
    device: str
    kernel: str
    experts: int = 1

    def __str__(self) -> str:
        zeros = "zeros" if self.zeros else "symmetric"
        experts = "" if self.experts == 1 else f"{self.experts}x"
        product = f"{experts}{self.n}x{self.k}/m{self.m}"
        return f"{self.dtype}/{self.group}/{zeros}/{product}/{self.device}/{self.kernel}"


_KEY = re.compile(
    r"(\w+)/(g\d+|row)/(zeros|symmetric)/(?:([1-9]\d{0,8})x)?"
    r"(\d{1,9})x(\d{1,9})/m(\d{1,9})/([^/]+)/([^/]+)"
)


def key_of(p: Problem, kernel: str) -> Key:
    """The key of a problem; its m counts as the bucket."""
    group = "row" if p.group >= p.k else f"g{p.group}"
    return Key(
        p.dtype, group, p.zeros, p.n, p.k, p.bucket, device_name(p.device), kernel, p.experts
    )


def key_from(text: str) -> Key:
    """The inverse of `str(key)`. ValueError for anything else."""
    match = _KEY.fullmatch(text)
    if not match:
        raise ValueError(f"not a key: {text!r}")
    dtype, group, zeros, experts, n, k, m, device, kernel = match.groups()
    return Key(
        dtype, group, zeros == "zeros", int(n), int(k), int(m), device, kernel, int(experts or 1)
    )


def device_name(name: str) -> str:
    """'NVIDIA H200' -> 'nvidia-h200': lower case, everything else one dash."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") or "any"


def file_name(op: str, cc: tuple[int, int] | str) -> str:
    """int4_mm.sm90.json, int4_linear_cpu.cpu-amx.json."""
    return f"{op}.{capability_name(cc)}.json"


def capability_name(cc: tuple[int, int] | str) -> str:
    """'sm90' of (9, 0); a CPU's is its name."""
    return cc if isinstance(cc, str) else f"sm{cc[0]}{cc[1]}"


# ---------------------------------------------------------------- contents
@dataclass(frozen=True)
class Table:
    """The contents of one file. Entries with fields that are missing or unknown make the whole file
    unreadable."""

    meta: Mapping[str, Any]
    entries: Mapping[Key, Entry]

    def json(self) -> str:
        """One entry a line, sorted: small, and a change of one entry is one line of a diff."""
        rows = {str(key): entry.json() for key, entry in self.entries.items()}
        rows = {
            key: {k: v for k, v in row.items() if k not in self.meta or self.meta[k] != v}
            for key, row in rows.items()
        }
        lines = ",\n".join(
            f"{json.dumps(key)}: {json.dumps(rows[key], sort_keys=True)}"
            for key in sorted(rows, key=_order)
        )
        meta = json.dumps(self.meta, sort_keys=True)
        return f'{{"schema": {SCHEMA}, "meta": {meta},\n"entries": {{\n{lines}\n}}}}\n'


def _order(key: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def parse(text: str | bytes, op: str | None = None, capability: str | None = None) -> Table:
    """A file's contents. ValueError when they are not one table of this schema, or of another
    operator or capability."""
    value = load(text)
    try:
        schema, meta = value["schema"], value["meta"]
        if schema != SCHEMA:
            raise ValueError(f"schema {schema!r}, and this version reads {SCHEMA}")
        if (op or meta["op"], capability or meta["capability"]) != (meta["op"], meta["capability"]):
            raise ValueError(f"it is for {meta['op']} on {meta['capability']}")
        # Both become parts of a file's name.
        if not re.fullmatch(r"\w+", meta["op"]) or not re.fullmatch(r"[\w-]+", meta["capability"]):
            raise ValueError(
                f"an operator {meta['op']!r} or a capability {meta['capability']!r} that is no name"
            )
        return Table(
            meta, {key_from(key): entry_from(row, meta) for key, row in value["entries"].items()}
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} {error}: not a file of configurations") from error


def read(path: Path) -> Table | None:
    """The table in `path`, None when there is no such file. ValueError when it is corrupt."""
    op, capability = path.name.removesuffix(".json").split(".", 1)
    try:
        return parse(path.read_bytes(), op, capability)
    except (FileNotFoundError, NotADirectoryError):
        return None


# ---------------------------------------------------------------- writes
@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the sidecar of `path`. The kernel drops it when the holder dies."""
    with open(path.with_name(f".{path.name}.lock"), "a") as sidecar:
        fcntl.flock(sidecar, fcntl.LOCK_EX)
        yield


def update(path: Path, change: Callable[[dict[Key, Entry]], object]) -> None:
    """Load the entries of `path`, let `change` edit them, and replace the file: atomically, under
    its lock, durably.

    A corrupt file is renamed to `.bad` first, with a warning. Raises OSError where the folder
    cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        # A temporary file is that of a writer that was killed: under the lock there is no other
        # writer.
        for left in path.parent.glob(f".{path.name}.*.tmp"):
            left.unlink(missing_ok=True)
        table = _read_locked(path)
        op, capability = path.name.removesuffix(".json").split(".", 1)
        entries = dict(table.entries) if table else {}
        change(entries)
        replace_file(
            path,
            Table(
                {**(table.meta if table else {}), "op": op, "capability": capability}, entries
            ).json(),
        )


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old or the new contents, whole, even after a
    crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_or_set_aside(path: Path) -> Table | None:
    """The table in `path`; a corrupt file is renamed to `.bad` with a warning and counts as
    none."""
    try:
        return read(path)
    except OSError as error:
        warnings.warn(
            f"{path} cannot be read ({error.strerror}); its entries are not used", stacklevel=2
        )
        return None
    except ValueError as error:
        try:
            with locked(path):  # by now another process may have set it aside and written a new one
                return _read_locked(path)
        except OSError:
            warnings.warn(
                f"{path} cannot be read ({error}) nor renamed; its entries are not used",
                stacklevel=2,
            )
            return None


def _read_locked(path: Path) -> Table | None:
    try:
        return read(path)
    except ValueError as error:
        asides = (path.with_name(f"{path.name}.bad{i or ''}") for i in range(10**6))
        aside = next(path for path in asides if not path.exists())
        os.replace(path, aside)
        warnings.warn(
            f"{path} cannot be read ({error}); it is kept as {aside.name} and a new one begun",
            stacklevel=3,
        )
        return None
