"""What do learned rotations (SpinQuant) and training through the rounding (QAT) gain, end to end?

Usage: python experiments/learned.py spinquant|qat [KEY=VALUE ...], of the keys of SIZES below
Each beside itself with no step taken: Hadamard matrices that are not learned, and rounding to
nearest. What is evaluated is the directory that was written, verified, and opened again. spinquant:
weights int4-channel, inputs int4 per token; qat: int3-g64. Writes results/learned-NAME.json.
"""

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import read

SIZES = {"steps": 4, "samples": 2, "length": 128, "windows": 4, "per_step": 4}
name = sys.argv[1]
pairs = (argument.split("=") for argument in sys.argv[2:])
sizes = {**SIZES, **{key: int(value) for key, value in pairs}}
model = qlab.open("demo")
data = qlab.tokens(
    model, [demo_text("calibration")], samples=sizes["samples"], length=sizes["length"]
)
held_out = qlab.first_windows(
    model, [demo_text("heldout")], length=sizes["length"], count=sizes["windows"]
)
reference = read(model, held_out)


def recipe(steps):
    """The method with this many steps."""
    if name == "qat":
        return qlab.qat("int3-g64", steps=steps, windows=sizes["per_step"])
    turned = qlab.spinquant("int4-channel", "int4-channel", steps=steps)
    rounded = qlab.chain(qlab.quantize_inputs("int4-channel"), qlab.rtn("int4-channel"))
    return qlab.chain(turned, rounded)


def figures(steps, out):
    """What is written with this many steps, and its figures."""
    started = time.process_time()
    result = qlab.quantize(model, recipe(steps), data, out)
    seconds = time.process_time() - started
    faults = qlab.verify(out, model).faults
    found = qlab.evaluate(qlab.open(out), reference, held_out)
    site = next(iter(result.sites.values()))
    return {
        "kl": found.kl,
        "kl_ci": list(found.kl_ci),
        "ratio": found.perplexity / found.reference_perplexity,
        "ratio_ci": list(found.ratio_ci),
        "bits_per_weight": result.bits_per_weight,
        "faults_of_verification": faults,
        "first_site": dict(site),
        "processor_seconds": seconds,
        "peak_mib": result.peak_rss_bytes / 2**20,
    }


rows = {}
for steps in (0, sizes["steps"]):
    with TemporaryDirectory() as place:
        rows[f"{steps} steps"] = figures(steps, Path(place) / "written")
    print(name, steps, rows[f"{steps} steps"], flush=True)
stored = Path(__file__).parent / "results" / f"learned-{name}.json"
record = {"name": name, **sizes, "rows": rows}
stored.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
