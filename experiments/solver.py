"""Does the staged solver lose less than gptaq, in how much more time? And on the float formats?

Usage: python experiments/solver.py SPEC SAMPLES METHOD,METHOD,... [WINDOWS [RUN [FOLDER]]]
By the protocol of README.md (windows of 512 tokens, seed 0, quantized inputs); writes
results/solver-SPEC-SAMPLES.json, with -RUN behind the samples where a run has a name. FOLDER keeps
the models.
"""

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import read

spec, samples, methods = qlab.parse_spec(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(",")
windows = int(sys.argv[4]) if len(sys.argv) > 4 else 16
run = f"-{sys.argv[5]}" if len(sys.argv) > 5 else ""
model = qlab.open("demo")
calibration = qlab.tokens(model, [demo_text("calibration")], samples=samples, length=512)
held_out = qlab.first_windows(model, [demo_text("heldout")], length=512, count=windows)
reference = read(model, held_out)
kept = sys.argv[6] if len(sys.argv) > 6 else None
out = Path(__file__).parent / "results" / f"solver-{spec}-{samples}{run}.json"
rows = {}

for name in methods:
    with TemporaryDirectory() as folder:
        cpu = time.process_time()
        place = Path(kept or folder) / f"{name}-{spec}"
        result = qlab.quantize(model, qlab.METHODS[name](spec), calibration, place)
        cpu = time.process_time() - cpu
        e = qlab.evaluate(qlab.open(result.path), reference, held_out)
    rows[name] = {
        "perplexity": e.perplexity,
        "ratio": e.perplexity / e.reference_perplexity,
        "ratio_ci": list(e.ratio_ci),
        "kl": e.kl,
        "kl_ci": list(e.kl_ci),
        "top1": e.top1_agreement,
        "bits_per_weight": result.bits_per_weight,
        "processor_seconds": cpu,
        "peak_mib": result.peak_rss_bytes / 2**20,
    }
    if kept:
        place.with_name(f"{place.name}.json").write_text(json.dumps(rows[name]), encoding="utf-8")
    print(name, {key: value for key, value in rows[name].items() if "_ci" not in key}, flush=True)
    record = {"spec": str(spec), "samples": samples, "windows": windows, "rows": rows}
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
