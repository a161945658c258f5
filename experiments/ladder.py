"""Which method loses least at 8, 4, 3 and 2 bits, and is that more than the calibration seed?

Usage: python experiments/ladder.py [KEY=VALUE ...], of the keys of DEFAULTS below
Every method at int<bits>-g64, evaluated without being written, so that those no format holds take
part, on quantized inputs. Methods that observe nothing take one seed. every=5 rounds the blocks 0,
5, 10, ... alone, for a small run. A second run adds to what the first one stored. Writes
results/ladder.json and results/ladder.png.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

import qlab
from qlab.algebra.bind import uses_data
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import Reading, read

RESULTS = Path(__file__).parent / "results"
# Learning takes many times as long; name those methods to have them too.
LEARNING = ("auto_round", "auto_round_refine", "qat")
CHOSEN = [name for name in qlab.METHODS if name not in (*LEARNING, "kv")]
SIZES = {"samples": 32, "windows": 16, "length": 512, "seeds": 3, "every": 1}
DEFAULTS = {"model": "demo", "methods": ",".join(CHOSEN), "bits": "8,4,3,2", **SIZES}


def measure(
    model: Any, recipe: Any, sizes: Mapping[str, int], reference: Reading, held_out: Any
) -> dict[str, Any]:
    """The figures of one recipe under every calibration seed. seconds: of the processor for one,
    with the evaluation."""
    observes = uses_data(recipe)
    blocks = "|".join(str(i) for i in range(0, 100, sizes["every"]))
    pattern = rf"re:.*\.({blocks})\..*" if sizes["every"] > 1 else "*"
    restricted = qlab.at(pattern, recipe)
    started = time.process_time()

    def run(seed: int) -> Any:
        data = qlab.tokens(
            model,
            [demo_text("calibration")],
            samples=sizes["samples"],
            length=sizes["length"],
            seed=seed,
        )
        applied = qlab.apply(model, restricted, data if observes else None)
        return qlab.evaluate(applied, reference, held_out)

    result = qlab.over_seeds(run, list(range(sizes["seeds"] if observes else 1)))
    first = result.evaluations[0]
    return {
        "kl": result.kl,
        "kl_ci": list(first.kl_ci),
        "ratio": result.ratio,
        "ratio_ci": list(first.ratio_ci),
        "top1": first.top1_agreement,
        "processor_seconds": (time.process_time() - started) / len(result.kl),
    }


def draw(record: Mapping[str, Any]) -> None:
    """KL divergence by bits, a line for each method: the mean over seeds, and the interval over
    windows of the first seed."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(row["method"] for row in record["rows"]):
        rows = sorted(
            (row for row in record["rows"] if row["method"] == name), key=lambda row: row["bits"]
        )
        means = [sum(row["kl"]) / len(row["kl"]) for row in rows]
        ends = [[abs(row["kl"][0] - row["kl_ci"][side]) for row in rows] for side in (0, 1)]
        bits = [row["bits"] for row in rows]
        axes.errorbar(bits, means, yerr=ends, label=name, marker="o", markersize=3, linewidth=1)
    axes.set(xlabel="bits of a code, groups of 64", ylabel="KL divergence (nats)", yscale="log")
    axes.invert_xaxis()
    axes.set_xticks([8, 4, 3, 2])
    axes.set_title(", ".join(f"{key} {record[key]}" for key in ("model", *SIZES)), fontsize=9)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(RESULTS / "ladder.png", dpi=120)


def main(arguments: list[str]) -> None:
    """Measure what is not stored yet, store it, and draw all of it."""
    given = {**DEFAULTS, **dict(argument.split("=") for argument in arguments)}
    sizes = {key: int(given[key]) for key in SIZES}
    model, settings = qlab.open(given["model"]), {"model": given["model"], **sizes}
    out = RESULTS / "ladder.json"
    record = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    if {key: record.get(key) for key in settings} != settings:
        record = {**settings, "rows": []}
    text = [demo_text("heldout")]
    held_out = qlab.first_windows(model, text, length=sizes["length"], count=sizes["windows"])
    reference = read(model, held_out)
    stored = {(row["method"], row["bits"]) for row in record["rows"]}
    for bits in map(int, given["bits"].split(",")):
        for name in given["methods"].split(","):
            if (name, bits) in stored:
                continue
            recipe = qlab.method(name, f"int{bits}-g64")
            row = measure(model, recipe, sizes, reference, held_out)
            record["rows"].append({"method": name, "bits": bits, **row})
            print(name, bits, row, flush=True)
            out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(record)


main(sys.argv[1:])
