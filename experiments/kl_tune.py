"""How far does KL tuning take a method, and in how much time?

Usage: python experiments/kl_tune.py SPEC STEPS RATE [METHOD [SAMPLES [WINDOWS]]]
By the protocol of README.md (32 windows of 512 tokens, seed 0, quantized inputs, 16 held-out
windows). The tuning learns from those calibration windows, and holds out an eighth of them, of
which `kl_before` and `kl` are. Writes results/kl-tune-SPEC.json.
"""

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import qlab
from qlab.demo.build import demo_text

spec, steps, rate = qlab.parse_spec(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
method = sys.argv[4] if len(sys.argv) > 4 else qlab.RECOMMENDED
samples = int(sys.argv[5]) if len(sys.argv) > 5 else 32
windows = int(sys.argv[6]) if len(sys.argv) > 6 else 16
model = qlab.open("demo")
calibration = qlab.tokens(model, [demo_text("calibration")], samples=samples, length=512)
held_out = qlab.first_windows(model, [demo_text("heldout")], length=512, count=windows)
recipe = qlab.chain(qlab.METHODS[method](spec), qlab.kl_tune(steps, rate))

with TemporaryDirectory() as folder:
    cpu = time.process_time()
    result = qlab.quantize(model, recipe, calibration, Path(folder) / "tuned")
    cpu = time.process_time() - cpu
    e = qlab.evaluate(qlab.open(result.path), model, held_out)
site = next(iter(result.sites.values()))
record = {
    "method": f"{method}+kl_tune",
    "spec": str(spec),
    "samples": samples,
    "windows": windows,
    "steps": steps,
    "rate": rate,
    "tuned_on": {key: site[key] for key in ("kl_before", "kl", "kept_step")},
    "perplexity": e.perplexity,
    "ratio": e.perplexity / e.reference_perplexity,
    "ratio_ci": list(e.ratio_ci),
    "kl": e.kl,
    "kl_ci": list(e.kl_ci),
    "top1": e.top1_agreement,
    "processor_seconds": cpu,
    "peak_mib": result.peak_rss_bytes / 2**20,
}
print(record)
out = Path(__file__).parent / "results" / f"kl-tune-{spec}.json"
out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
