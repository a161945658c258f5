"""What does each scheme lose, rounded to nearest and by the best method?

Usage: python experiments/schemes.py [methods=rtn,gptq-refined] [schemes=all] [group=64] [samples=4]
                                     [length=256] [windows=4]

On the demo model, whose widths groups of 128 do not divide: schemes in such groups are run in
groups of `group`. Schemes of the cache are run alone, each stored scale measured by absmax. A row
is written to results/schemes.json when it is done, and one that is there is not run again.
"""

import json
import sys
import time
from pathlib import Path

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import read

OUT = Path(__file__).parent / "results" / "schemes.json"
options = {"methods": "rtn,gptq-refined", "schemes": "all", "group": "64", "samples": "4"}
options |= {"length": "256", "windows": "4"}
options |= dict(option.split("=", 1) for option in sys.argv[1:])
length, samples = int(options["length"]), int(options["samples"])
methods = options["methods"].split(",")
names = [row.scheme.name for row in qlab.schemes()]
names = names if options["schemes"] == "all" else options["schemes"].split(",")


def fitting(name: str) -> qlab.Scheme:
    """The scheme, with groups that divide the demo's widths."""
    scheme = qlab.scheme(name)
    in_groups = scheme.weights is not None and scheme.weights.tile == qlab.Tile(1, 128)
    return qlab.scheme(f"{name}-g{options['group']}") if in_groups else scheme


model = qlab.open("demo")
data = qlab.tokens(model, [demo_text("calibration")], samples=samples, length=length, seed=0)
held_out = qlab.first_windows(
    model, [demo_text("heldout")], length=length, count=int(options["windows"])
)
settings = {"calibration": f"{samples} x {length}", "held_out": f"{options['windows']} x {length}"}
record = {**settings, "model": "SmolLM2-135M-Instruct", "rows": {}}
if OUT.is_file():
    before = json.loads(OUT.read_text(encoding="utf-8"))
    record["rows"] = before["rows"] if before | settings == before else {}
reference = read(model, held_out)
for method in methods:
    for name in names:
        scheme = fitting(name)
        key = f"{scheme.name} {method if scheme.weights else 'cache'}"
        if key in record["rows"]:
            continue
        started = time.process_time()
        applied = qlab.apply(model, scheme.recipe(method), data)
        e = qlab.evaluate(applied, reference, held_out)
        row = {"bits": scheme.bits_per_weight, "kl": e.kl, "kl_ci": list(e.kl_ci)}
        row |= {"ratio": e.perplexity / e.reference_perplexity, "ratio_ci": list(e.ratio_ci)}
        record["rows"][key] = row | {"seconds": round(time.process_time() - started, 1)}
        OUT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(key, record["rows"][key], flush=True)
