"""Models that are quantized and let go of, one after another in one process."""

import random
import shutil
from pathlib import Path

import psutil
from families import tiny
from model_folders import add_tokenizer, random_tokens

import qlab
from faults import Case, Trial
from qlab.methods import METHODS

CYCLES, SETTLED = 50, 3
GROWTH = 1.02


def resident(source: Path, folder: Path, method: str, cycles: int) -> list[int]:
    """The resident bytes of this process after each of so many runs of a method."""
    data, after = random_tokens(source), []
    for _ in range(cycles):
        recipe = METHODS[method](qlab.parse_spec("int4-g16"))
        qlab.quantize(source, recipe, data, folder / "out")
        shutil.rmtree(folder / "out")
        after.append(psutil.Process().memory_info().rss)
    return after


def refuse_growth(after: list[int]) -> None:
    """The last run leaves no more than the third, but for what allocators keep."""
    in_mib = [round(bytes_ / 2**20, 1) for bytes_ in after]
    assert after[-1] <= GROWTH * after[SETTLED - 1], f"it grew: {in_mib} MiB"


def _cycles(shared: Path) -> Trial:
    source = shared / "dropped"
    tiny("llama").save_pretrained(source)
    add_tokenizer(source)

    def trial(draw: random.Random, folder: Path) -> str:
        method = draw.choice(["rtn", "gptq", "awq"])
        refuse_growth(resident(source, folder, method, CYCLES))
        return f"no growth in {CYCLES} runs"

    return trial


CASES = [Case(name="quantized and let go of", make=_cycles, bounded=0)]
