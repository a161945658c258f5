"""Which pairs of steps help each other, and which are no more than the better of the two?

Usage: python experiments/compose.py [KEY=VALUE ...], of the keys of DEFAULTS below
Each step that comes before a rounding with each rounding, and a low rank behind it; seed 0,
quantized inputs, evaluated without being written. every=5 rounds the blocks 0, 5, 10, ... alone,
for a small run. A pair helps where the paired
interval of its KL divergence lies below that of the rounding alone, hurts where it lies above, and
is a tie otherwise. Writes results/compose-SPEC.json.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import qlab
from qlab.algebra.bind import uses_data
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import read

SIZES = {"samples": 32, "windows": 16, "length": 512, "every": 1}
ROUNDINGS = "rtn,rtn-weighted,gptq,gptq-refined"
DEFAULTS = {"model": "demo", "spec": "int3-g64", "roundings": ROUNDINGS, **SIZES}
BEFORE = ("smoothquant", "awq_scale", "rotate_heads", "quarot", "aim_at_reference", "aim_held_out")
BEHIND = ("lqer-16", "eora-16")


def verdict(pair: Any, alone: Any) -> dict[str, Any]:
    """What the pair changes, and whether that is more than chance."""
    difference = qlab.difference(pair, alone)
    low, high = difference.kl_ci
    said = "helps" if high < 0 else "hurts" if low > 0 else "tie"
    return {"kl_change": difference.kl, "kl_change_ci": [low, high], "verdict": said}


def main(arguments: list[str]) -> None:
    """Measure every pair beside its rounding alone, and store it."""
    given = {**DEFAULTS, **dict(argument.split("=") for argument in arguments)}
    sizes = {key: int(given[key]) for key in SIZES}
    model, spec, length = qlab.open(given["model"]), given["spec"], sizes["length"]
    texts = [demo_text("calibration")], [demo_text("heldout")]
    data = qlab.tokens(model, texts[0], samples=sizes["samples"], length=length)
    held_out = qlab.first_windows(model, texts[1], length=length, count=sizes["windows"])
    reference = read(model, held_out)
    blocks = "|".join(str(i) for i in range(0, 100, sizes["every"]))
    pattern = rf"re:.*\.({blocks})\..*" if sizes["every"] > 1 else "*"
    out = Path(__file__).parent / "results" / f"compose-{spec}.json"
    record = {"model": given["model"], "spec": spec, **sizes, "rows": []}

    def evaluation(name: str) -> Any:
        recipe = qlab.at(pattern, qlab.method(name, spec))
        seen = data if uses_data(recipe) else None
        return qlab.evaluate(qlab.apply(model, recipe, seen), reference, held_out)

    for rounding in given["roundings"].split(","):
        started = time.process_time()
        alone = evaluation(rounding)
        names = [*(f"{step}+{rounding}" for step in BEFORE), *(f"{rounding}+{s}" for s in BEHIND)]
        row = {"recipe": rounding, "kl": alone.kl, "kl_ci": list(alone.kl_ci)}
        record["rows"].append({**row, "processor_seconds": time.process_time() - started})
        for name in names:
            started = time.process_time()
            pair = evaluation(name)
            row = {"recipe": name, "kl": pair.kl, "kl_ci": list(pair.kl_ci), **verdict(pair, alone)}
            record["rows"].append({**row, "processor_seconds": time.process_time() - started})
            print(row, flush=True)
            out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


main(sys.argv[1:])
