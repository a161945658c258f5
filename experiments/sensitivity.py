"""Which weights are sensitive to rounding, and is it worth giving them more bits?

Usage: python experiments/sensitivity.py [KEY=VALUE ...], of the keys of DEFAULTS below
The Fisher sensitivity of each weight at each of `specs` (`qlab.fisher`, on `samples` windows), the
exact choice within `bits` bits per weight (`qlab.allocate`), and the figures of that choice beside
the uniform grids, all by `method`. Writes results/sensitivity-BITS.json and .png.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import read

RESULTS = Path(__file__).parent / "results"
SIZES = {"samples": 8, "windows": 8, "length": 512}
DEFAULTS = {
    "model": "demo",
    "method": "rtn",
    "specs": "int2-g64,int3-g64,int4-g64,int8-g64",
    "bits": "4.25",
    **SIZES,
}


def figures(quantized: Any, reference: Any, held_out: Any) -> dict[str, Any]:
    """What a recipe costs and loses."""
    started = time.process_time()
    result = qlab.evaluate(quantized, reference, held_out)
    return {
        "bits_per_weight": quantized.bits_per_weight,
        "kl": result.kl,
        "kl_ci": list(result.kl_ci),
        "ratio": result.perplexity / result.reference_perplexity,
        "processor_seconds": time.process_time() - started,
    }


def kinds_of(names: Sequence[str]) -> dict[str, list[str]]:
    """The weights by what comes behind the number of their block, in running order."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        tail = ".".join(name.split(".")[3:])
        kinds.setdefault(tail, []).append(name)
    return kinds


def draw(record: Mapping[str, Any], out: Path) -> None:
    """Sensitivity per weight at the middle grid, by block, a line for each kind of weight; below
    it, the grid that each gets."""
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 7), layout="constrained", height_ratios=(3, 2)
    )
    specs, chosen = record["specs"], record["chosen"]
    middle = specs.index("int4-g64") if "int4-g64" in specs else len(specs) // 2
    kinds = kinds_of(list(chosen))
    for kind, names in kinds.items():
        costs = [record["costs"][name][middle] for name in names]
        above.plot(range(len(names)), costs, label=kind, marker="o", markersize=3, linewidth=1)
    above.set(ylabel=f"expected rise of the loss at {specs[middle]}", yscale="log")
    above.legend(fontsize=7, ncols=4)
    above.set_title(", ".join(f"{k} {record[k]}" for k in ("model", "method", *SIZES)), fontsize=9)
    grid = [[chosen[name] for name in names] for names in kinds.values()]
    image = below.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=len(specs) - 1)
    below.set_yticks(range(len(kinds)), list(kinds), fontsize=7)
    below.set(xlabel="block", title=f"the choice within {record['bits']} bits per weight")
    bar = figure.colorbar(image, ax=below, ticks=range(len(specs)))
    bar.ax.set_yticklabels(specs, fontsize=7)
    figure.savefig(out, dpi=120)


def main(arguments: list[str]) -> None:
    """Measure, store and draw."""
    given = {**DEFAULTS, **dict(argument.split("=") for argument in arguments)}
    sizes = {key: int(given[key]) for key in SIZES}
    model, length, bits = qlab.open(given["model"]), sizes["length"], float(given["bits"])
    texts = [demo_text("calibration")], [demo_text("heldout")]
    data = qlab.tokens(model, texts[0], samples=sizes["samples"], length=length)
    held_out = qlab.first_windows(model, texts[1], length=length, count=sizes["windows"])
    reference = read(model, held_out)
    specs = given["specs"].split(",")
    choices = [qlab.method(given["method"], spec) for spec in specs]
    costs: dict[str, list[float]] = {}

    def measured(seen: Any, grids: Any) -> dict[str, list[float]]:
        costs.update(qlab.fisher(seen, grids))
        return costs

    record = {key: given[key] for key in ("model", "method")} | {
        "specs": specs,
        "bits": bits,
        **sizes,
    }
    started = time.process_time()
    allocated = qlab.apply(model, qlab.allocate(choices, bits, measured), data)
    sites = allocated.plan.sites
    record["seconds_of_choosing"] = time.process_time() - started
    record["chosen"] = {name: specs.index(sites[name]["spec"]) for name in costs}
    record["costs"] = costs
    record["rows"] = {"allocated": figures(allocated, reference, held_out)}
    for spec, choice in zip(specs, choices):
        observed = data if any(stage.needs for stage in choice) else None
        uniform = qlab.apply(model, choice, observed)
        record["rows"][spec] = figures(uniform, reference, held_out)
        print(spec, record["rows"][spec], flush=True)
    out = RESULTS / f"sensitivity-{given['bits']}.json"
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(record, out.with_suffix(".png"))
    print("allocated", record["rows"]["allocated"])


main(sys.argv[1:])
