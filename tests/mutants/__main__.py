"""Does every law have teeth? `python tests/mutants [words]` plants faults and runs the laws.

Each fault is planted in a copy of the tree and must be killed by some law. One that survives is a
law that is missing, and the exit code is 1. With words, only the mutants whose names hold one of
them are run. `--out FILE` keeps the table as Markdown. Not part of pytest.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.box import HEAVY_HEAD, MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path[0] = str(Path(__file__).parents[1])  # the folder of tests: this one's names are no modules

from mutants import MUTANTS  # noqa: E402
from mutants.planting import Mutant, plant  # noqa: E402

ROOT = Path(__file__).parents[2]
AT_ONCE = 2


def pytest(tree: Path, laws: str) -> str | None:
    """Run these law files in a copy of the tree: the first test that failed, or None."""
    named = (name if "/" in name else f"laws/{name}" for name in laws.split())
    paths = (path.split("/") for path in named)
    files = [f"tests/{folder}/test_{name}.py" for folder, name in paths]
    options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "--tb=no", "--durations=0"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    env = {**_importing(tree), "LAWS_PROFILE": "mutants", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or not failed:
        said = done.stdout[-800:] + done.stderr[-800:]
        raise RuntimeError(f"pytest did not run in {tree}: {said}")
    return failed[1].removeprefix("tests/").removeprefix("laws/test_")


def _importing(tree: Path) -> dict[str, str]:
    """An environment in which a copy of the tree is what is imported."""
    return {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}"}


def copy_tree(folder: str) -> Path:
    """A copy of what the laws need."""
    tree = Path(folder) / "tree"
    for name in ("qlab", "kernels", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def run(mutant: Mutant) -> tuple[str | None, float]:
    """(what killed it or None, seconds)."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = copy_tree(folder)
        file = mutant.path(tree)
        file.write_text(plant(file.read_text(encoding="utf-8"), mutant), encoding="utf-8")
        return pytest(tree, mutant.laws), time.perf_counter() - started


def check_without_mutants(laws: str) -> None:
    """The copy is what is imported, and its laws pass."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = copy_tree(folder)
        where = subprocess.run(
            [sys.executable, "-c", "import qlab; print(qlab.__file__)"],
            cwd=tree,
            env=_importing(tree),
            text=True,
            check=True,
            capture_output=True,
        ).stdout
        assert where.startswith(str(tree)), f"the copy is not what is imported, but {where}"
        killer = pytest(tree, laws)
        assert killer is None, f"the laws fail without a mutant: {killer}"


def main(words: Sequence[str], out: Path | None) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    for mutant in chosen:  # all of them, before anything runs
        plant(mutant.path(ROOT).read_text(encoding="utf-8"), mutant)
    check_without_mutants(" ".join(sorted({law for m in chosen for law in m.laws.split()})))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(track(pool.map(run, chosen), total=len(chosen), description="mutants"))
    killed = sum(bool(killer) for killer, _ in results)
    title = f"{killed} of {len(chosen)} mutants killed"
    table = Table(title=title, box=MARKDOWN if out else HEAVY_HEAD)
    for heading in ("mutant", "in", "killed by", "s"):
        table.add_column(heading, no_wrap=bool(out))
    for mutant, (killer, seconds) in zip(chosen, results):
        place = f"{mutant.file} {mutant.function}".rstrip()
        table.add_row(mutant.name, place, killer or "[bold red]survived", f"{seconds:.0f}")
    if out:
        with out.open("w", encoding="utf-8") as file:
            Console(file=file, width=500).print(table)
    else:
        Console(width=150).print(table)
    return int(killed < len(chosen))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="run only mutants whose names hold one of these")
    parser.add_argument("--out", type=Path, help="keep the table in this file, as Markdown")
    chosen = parser.parse_args()
    sys.exit(main(chosen.words, chosen.out))
