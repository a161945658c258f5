"""C++ sources of this package as loaded libraries, compiled on first use.

The compiler is the one that torch.compile uses. An object lies in the folder `compiled` beside the
config cache, under a name of two hashes: of all that it was made of (source, headers, compiler,
options, torch), and of its own bytes. So one of an older source is not found, a truncated one is
not loaded, and processes that compile at the same time write the same file or different ones, each
by a rename.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

from qlab_kernels import cache
from qlab_kernels.capability import KernelError

# No option names a processor: functions that need one carry its name as an attribute, and are
# chosen when they run. Products and sums are not fused but where the source says so.
OPTIONS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-pthread",
    "-shared",
    "-w",
)
MACHINES = ("x86_64", "AMD64")
# Of sources that include paths.h. The best is the last one that the processor runs.
PATHS = ("best", "portable", "avx2", "avx512")
SECONDS = 300  # a compiler that takes longer is stopped
_lock = threading.Lock()
_opened: dict[Path, "ctypes.CDLL | Uncompiled"] = {}  # by their sources
_registered: dict[Path, str | None] = {}  # source -> why it gave torch no operators, or None


class Uncompiled(KernelError):
    """Why a library is not there: the reason in one clause."""


def library(source: Path) -> ctypes.CDLL:
    """The library of a C++ source, compiled unless it was before. Uncompiled where it cannot be."""
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        raise Uncompiled(
            f"it is written for Linux on x86-64, and this is {platform.system()} on "
            f"{platform.machine()}"
        )
    compiler = _compiler()
    name = f"{source.stem}-{_hash_of_inputs(source, compiler)}"
    with contextlib.suppress(OSError):  # a folder that cannot be written, or not loaded from
        return _loaded(source, compiler, cache.folder() / "compiled", name)
    try:
        with tempfile.TemporaryDirectory(prefix="qlab-") as place:
            return _loaded(source, compiler, Path(place), name)
    except OSError as error:
        raise Uncompiled(
            f"neither {cache.folder()} nor {tempfile.gettempdir()} takes files that can be loaded"
        ) from error


def opened(source: Path) -> ctypes.CDLL | Uncompiled:
    """The library of a source, or why there is none, found out once in a process."""
    if source not in _opened:
        with _lock:  # who knows the answer does not wait for the compiler of another source
            _opened[source] = _opened.get(source) or _library_or_reason(source)
    return _opened[source]


def missing(source: Path) -> str | None:
    """Why there is no library of a source, or None."""
    found = opened(source)
    return str(found) if isinstance(found, Uncompiled) else None


def paths_of(source: Path) -> tuple[str, ...]:
    """The paths of a source that this processor runs, from the slowest to the fastest."""
    loaded = opened(source)
    return () if isinstance(loaded, Uncompiled) else PATHS[1 : loaded.qlab_best_path() + 1]


def on_path(source: Path, path: str) -> tuple[ctypes.CDLL, int]:
    """The library of a source, and the number of a path. Uncompiled where there is none."""
    loaded = opened(source)
    if isinstance(loaded, Uncompiled):
        raise loaded
    return loaded, PATHS.index(path) or loaded.qlab_best_path()


def _library_or_reason(source: Path) -> ctypes.CDLL | Uncompiled:
    try:
        return library(source)
    except Uncompiled as error:
        return error


def registered(source: Path) -> str | None:
    """Load a library that gives torch operators, once in a process. Why there is none, or None."""
    if source not in _registered:
        with _lock:
            if source not in _registered:
                _registered[source] = _why_not(source)
    return _registered[source]


def _why_not(source: Path) -> str | None:
    try:
        failed = library(source).qlab_register()
    except Uncompiled as error:
        return str(error)
    return f"torch {torch.__version__} does not take operators of a library" if failed else None


def _loaded(source: Path, compiler: str, place: Path, name: str) -> ctypes.CDLL:
    known = _whole(place, name)
    return ctypes.CDLL(str(known or _compile(source, compiler, place, name)))


def _compiler() -> str:
    """The command of torch.compile's C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return str(get_cpp_compiler())
    except Exception as error:  # torch has a class of its own for it, which moved between releases
        raise Uncompiled("torch.compile finds no C++ compiler here; install g++") from error


def _hash_of_inputs(source: Path, compiler: str) -> str:
    """16 hex digits over all that an object depends on."""
    version = _run([compiler, "--version"]).stdout
    parts = (compiler, version, *OPTIONS, torch.__version__, platform.machine())
    sources = (source, *sorted(source.parent.glob("*.h")))
    read = b"".join(path.read_bytes() for path in sources)
    return hashlib.sha256("\n".join(parts).encode() + read).hexdigest()[:16]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Uncompiled(f"the C++ compiler {command[0]} does not run: {error}") from error


def _whole(place: Path, name: str) -> Path | None:
    """The object of this name whose bytes are those that were written; others are removed."""
    for path in sorted(place.glob(f"{name}-*.so")):
        with contextlib.suppress(OSError):
            if path.stem == f"{name}-{_hash_of_bytes(path)}":
                return path
            path.unlink()
    return None


def _hash_of_bytes(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compile(source: Path, compiler: str, place: Path, name: str) -> Path:
    """Compile into the folder, and give the object its name by a rename. OSError where the folder
    cannot be written."""
    place.mkdir(parents=True, exist_ok=True)
    temporary = place / f".{os.getpid()}-{threading.get_ident()}.so"
    temporary.touch()
    torch_root = Path(torch.__file__).parent
    libraries = (f"-L{torch_root / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu")
    inputs = (f"-I{torch_root / 'include'}", str(source), "-o", str(temporary))
    try:
        result = _run([compiler, *OPTIONS, *inputs, *libraries])
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if "error" in line]
            said = (lines or result.stderr.splitlines() or ["it says nothing"])[0]
            raise Uncompiled(f"{compiler} does not compile {source.name}: {said}")
        path = place / f"{name}-{_hash_of_bytes(temporary)}.so"
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
