"""`python -m tests.faults.guided WORD` draws the inputs of a case by coverage: what reaches new
lines of qlab's readers is changed further.

It needs atheris (libFuzzer for Python). What draws a trial is the fuzzer's bytes instead of a
number, so that the same changes of structure are tried, in an order that coverage leads. The first
finding ends it with a traceback and leaves its bytes in a file `crash-...`.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

import atheris

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(path) for path in (TESTS, TESTS.parent, TESTS.parent / "kernels")]

with atheris.instrument_imports(include=["qlab.files", "qlab.codecs", "qlab.directories"]):
    from faults.fuzz import CASES


SEEDS, LONGEST = 64, 512  # how many the fuzzer begins with, and their bytes


class Fuzzed(random.Random):
    """Draws from bytes; behind their end everything is 0."""

    def __init__(self, data: bytes):
        super().__init__()
        self.data = atheris.FuzzedDataProvider(data)

    def getrandbits(self, k: int) -> int:
        return self.data.ConsumeUInt(-(-k // 8)) % 2**k

    def random(self) -> float:
        return self.getrandbits(53) / 2**53


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.guided", description=__doc__)
    parser.add_argument("word", help="of the case's name")
    parser.add_argument("--inputs", type=int, default=10_000, help="how many (default: 10000)")
    asked = parser.parse_args()
    case = next(case for case in CASES if asked.word in case.name)
    trial = case.make(Path(tempfile.mkdtemp()))

    def one(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trial(Fuzzed(data), Path(folder))

    seeds = Path(tempfile.mkdtemp())
    for i in range(SEEDS):
        (seeds / str(i)).write_bytes(random.Random(i).randbytes(LONGEST))
    options = [f"-runs={asked.inputs}", f"-max_len={LONGEST}", "-len_control=0", "-rss_limit_mb=0"]
    atheris.Setup([sys.argv[0], *options, str(seeds)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
