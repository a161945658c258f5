"""What the rotations of QuaRot are worth, with rounded weights alone and with inputs of 4 bits.

Each recipe with and without R1 (`qlab.rotate_residual`), beside R2 and R4 (`qlab.quarot`). Usage:
python experiments/rotations.py [samples=4] [length=128] [windows=4]
"""

import json
import sys
import time
from pathlib import Path

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import read

options = {"samples": 4, "length": 128, "windows": 4}
options |= {key: int(value) for key, value in (word.split("=") for word in sys.argv[1:])}
model = qlab.open("demo")
texts = [demo_text("calibration")]
data = qlab.tokens(model, texts, samples=options["samples"], length=options["length"])
held_out = qlab.first_windows(
    model, [demo_text("heldout")], length=options["length"], count=options["windows"]
)
reference = read(model, held_out)
R1, R24 = qlab.rotate_residual(), qlab.quarot()
W4 = "int4-channel"
A4 = qlab.quantize_inputs("int4-channel")
RECIPES = {
    "W4 rtn": qlab.rtn(W4),
    "W4 R1 rtn": qlab.chain(R1, qlab.rtn(W4)),
    "W4A4 gptq": qlab.chain(A4, qlab.gptq(W4)),
    "W4A4 R2 R4 gptq": qlab.chain(R24, A4, qlab.gptq(W4)),
    "W4A4 R1 R2 R4 gptq": qlab.chain(R1, R24, A4, qlab.gptq(W4)),
}
rows = {}
for name, recipe in RECIPES.items():
    started = time.process_time()
    result = qlab.evaluate(qlab.apply(model, recipe, data), reference, held_out)
    rows[name] = {
        "kl": result.kl,
        "kl_ci": result.kl_ci,
        "perplexity": result.perplexity,
        "reference_perplexity": result.reference_perplexity,
        "seconds": time.process_time() - started,
    }
    print(f"{name}: KL {result.kl:.3f} {result.kl_ci}, perplexity {result.perplexity:.2f}")
stored = Path(__file__).parent / "results" / "rotations.json"
stored.write_text(json.dumps({"options": options, "recipes": rows}, indent=2) + "\n")
