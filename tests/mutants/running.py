"""One mutant and the laws that ought to kill it, in a process that a server forked.

The server has imported the libraries, so that no mutant pays for them; qlab is imported from the
copy of the tree that holds the mutant.
"""

import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest

from mutants.planting import Mutant, plant

ROOT = Path(__file__).parents[2]
AT_ONCE = 2
LIBRARIES = ("hypothesis", "pytest", "torch._dynamo", "torch.export", "transformers", "triton")


class FirstFailure:
    """The first test that failed, noted while pytest runs."""

    name: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid.removeprefix("tests/").removeprefix("laws/test_")


def copy_tree(folder: str) -> Path:
    """A copy of what the laws need."""
    tree = Path(folder) / "tree"
    for name in ("qlab", "kernels", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def run_laws(tree: Path, laws: str) -> str | None:
    """Run these law files in a copy of the tree, in this process: the first test that failed, or
    None."""
    named = (name if "/" in name else f"laws/{name}" for name in laws.split())
    paths = (path.split("/") for path in named)
    files = [f"tests/{folder}/test_{name}.py" for folder, name in paths]
    options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "--tb=no", "--durations=0"]
    os.environ |= {"PYTHONPATH": f"{tree}:{tree / 'kernels'}", "LAWS_PROFILE": "mutants"}
    sys.path[:0] = [str(tree), str(tree / "kernels")]
    sys.path.remove(str(ROOT / "tests"))
    os.chdir(tree)
    where = importlib.import_module("qlab").__file__
    assert where.startswith(str(tree)), f"the copy is not what is imported, but {where}"

    failure = FirstFailure()
    with _output_kept() as output:
        code = pytest.main([*options, *files], plugins=[failure])
    if code not in (0, 1) or bool(failure.name) != bool(code):
        raise RuntimeError(f"pytest did not run in {tree}: {output.read_text()[-1600:]}")
    return failure.name


@contextmanager
def _output_kept() -> Iterator[Path]:
    """What this process and its children print goes into a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "output"
        with path.open("w") as file:
            kept = [os.dup(descriptor) for descriptor in (1, 2)]
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
            yield path
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, former in zip((1, 2), kept):
                os.dup2(former, descriptor)


def run_mutant(base: Path, mutant: Mutant) -> tuple[str | None, float]:
    """(what killed it or None, seconds). base: a copy of the tree without a mutant."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(shutil.copytree(base, Path(folder) / "tree"))  # with the bytecode of its files
        file = mutant.path(tree)
        file.write_text(plant(file.read_text(encoding="utf-8"), mutant), encoding="utf-8")
        return run_laws(tree, mutant.laws), time.perf_counter() - started


def processes() -> ProcessPoolExecutor:
    """Every task gets a process of its own, forked from one that has imported the libraries."""
    context = get_context("forkserver")
    context.set_forkserver_preload([*LIBRARIES])
    return ProcessPoolExecutor(AT_ONCE, context, max_tasks_per_child=1)
