"""Does every law have teeth? `python tests/mutants [words]` plants faults and runs the laws.

Each fault is planted in a copy of the tree and must be killed by some law. One that survives is a
law that is missing, and the exit code is 1. With words, only the mutants whose names hold one of
them are run. `--out FILE` keeps the table as Markdown. Not part of pytest.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.box import HEAVY_HEAD, MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path[0] = str(Path(__file__).parents[1])  # the folder of tests: this one's names are no modules

from mutants import MUTANTS  # noqa: E402
from mutants.planting import plant  # noqa: E402
from mutants.running import ROOT, copy_tree, processes, run_laws, run_mutant  # noqa: E402


def main(words: Sequence[str], out: Path | None) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    for mutant in chosen:  # all of them, before anything runs
        plant(mutant.path(ROOT).read_text(encoding="utf-8"), mutant)
    laws = sorted({law for mutant in chosen for law in mutant.laws.split()})
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, processes() as pool:
        base = copy_tree(folder)
        failures = list(filter(None, pool.map(partial(run_laws, base), laws)))
        assert not failures, f"the laws fail without a mutant: {failures[0]}"
        each = pool.map(partial(run_mutant, base), chosen)
        results = list(track(each, total=len(chosen), description="mutants"))
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
