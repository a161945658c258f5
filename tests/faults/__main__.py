"""`python -m tests.faults --hours 1` runs the campaign of faults and stores how its trials ended.

With words, only the cases whose names hold one of them are run. `--number N` runs trial N of these
in this process, as a finding is run again. The exit code is 1 where something was found.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(path) for path in (TESTS, TESTS.parent, TESTS.parent / "kernels")]

from rich.console import Console  # noqa: E402

from faults import Case  # noqa: E402
from faults.campaign import ROOT, attempt, campaign, table  # noqa: E402
from faults.cases import CASES  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("words", nargs="*", help="run only cases whose names hold one of these")
    parser.add_argument("--hours", type=float, default=0.1, help="how long (default: 0.1)")
    parser.add_argument("--number", type=int, help="run this one trial of each chosen case")
    results = ROOT / "experiments/results/faults.json"
    parser.add_argument("--out", type=Path, default=results, help="(default: %(default)s)")
    asked = parser.parse_args()
    chosen = [
        case
        for name, case in CASES.items()
        if not asked.words or any(word in name for word in asked.words)
    ]
    if not chosen:
        parser.error(f"no case's name holds any of {asked.words}; there are {', '.join(CASES)}")
    if asked.number is not None:
        return again(chosen, asked.number)
    whole = campaign(chosen, asked.hours, asked.out)
    Console().print(table(json.loads(asked.out.read_text(encoding="utf-8"))))
    return 0 if whole else 1


def again(cases: Sequence[Case], number: int) -> int:
    """Run one trial of each case in this process."""
    with tempfile.TemporaryDirectory(prefix="qlab-faults-") as shared:
        for case in cases:
            print(f"{case.name}, {number}: {attempt(case, case.make(Path(shared)), number)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
