"""What does a rounded cache of keys and values lose, plain and with both turned by Hadamard
matrices?

Usage: python experiments/kv_cache.py

On 4 held-out windows of 512 tokens; nothing else is rounded. Turned values are folded into the
weights, turned queries and keys at run time. Writes results/kv-cache.json.
"""

import json
from pathlib import Path

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import read

TURNED = qlab.chain(qlab.rotate_heads(), qlab.rotate_scores())
RECIPES = {
    "int8-token": qlab.kv_cache("int8-token"),
    "int4-token": qlab.kv_cache("int4-token"),
    "int4-token, turned": qlab.chain(TURNED, qlab.kv_cache("int4-token")),
    "int4-token asymmetric, turned": qlab.chain(TURNED, qlab.kv_cache("int4-token-asym")),
}

model = qlab.open("demo")
held_out = qlab.first_windows(model, [demo_text("heldout")], length=512, count=4)
reference = read(model, held_out)
rows = {}
for name, recipe in RECIPES.items():
    e = qlab.evaluate(qlab.apply(model, recipe, None), reference, held_out)
    ratio = e.perplexity / e.reference_perplexity
    rows[name] = {"kl": e.kl, "kl_ci": list(e.kl_ci), "ratio": ratio, "ratio_ci": list(e.ratio_ci)}
    print(name, rows[name], flush=True)
record = {"held_out": "4 x 512", "rows": rows}
out = Path(__file__).parent / "results" / "kv-cache.json"
out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
