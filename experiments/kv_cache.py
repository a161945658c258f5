"""What does a rounded cache of keys and values lose, plain, turned by Hadamard matrices, with keys
centred and ranges clipped?

Usage: python experiments/kv_cache.py

On 4 held-out windows of 512 tokens; nothing else is rounded. Turned values are folded into the
weights, turned queries and keys at run time. Means of keys and shares of ranges come from 4
calibration windows of 512 tokens. Writes results/kv-cache.json.
"""

import json
from pathlib import Path

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import read

TURNED = qlab.chain(qlab.rotate_heads(), qlab.rotate_scores())
CENTRED = qlab.chain(TURNED, qlab.centre_keys())
RECIPES = {
    "int8-token": qlab.kv_cache("int8-token"),
    "int8-token asymmetric, turned, centred": qlab.chain(CENTRED, qlab.kv_cache("int8-token-asym")),
    "int4-token": qlab.kv_cache("int4-token"),
    "int4-token, turned": qlab.chain(TURNED, qlab.kv_cache("int4-token")),
    "int4-token asymmetric, turned": qlab.chain(TURNED, qlab.kv_cache("int4-token-asym")),
    "int4-token asymmetric, turned, centred": qlab.chain(CENTRED, qlab.kv_cache("int4-token-asym")),
    "int4-token asymmetric, turned, centred, clipped": qlab.chain(
        CENTRED, qlab.kv_clipped("int4-token-asym")
    ),
    "int4-token symmetric, turned, centred, clipped": qlab.chain(
        CENTRED, qlab.kv_clipped("int4-token")
    ),
    "int4-g64 asymmetric, turned, centred, clipped": qlab.chain(
        CENTRED, qlab.kv_clipped("int4-g64-asym")
    ),
    "keys int8-token, values int4-token asymmetric, turned, centred, clipped": qlab.chain(
        CENTRED,
        qlab.at("re:.*:key", qlab.kv_cache("int8-token")),
        qlab.at("re:.*:value", qlab.kv_clipped("int4-token-asym")),
    ),
}

model = qlab.open("demo")
held_out = qlab.first_windows(model, [demo_text("heldout")], length=512, count=4)
data = qlab.tokens(model, [demo_text("calibration")], samples=4, length=512)
reference = read(model, held_out)
rows = {}
for name, recipe in RECIPES.items():
    e = qlab.evaluate(qlab.apply(model, recipe, data), reference, held_out)
    ratio = e.perplexity / e.reference_perplexity
    rows[name] = {"kl": e.kl, "kl_ci": list(e.kl_ci), "ratio": ratio, "ratio_ci": list(e.ratio_ci)}
    print(name, rows[name], flush=True)
record = {"held_out": "4 x 512", "calibration": "4 x 512", "rows": rows}
out = Path(__file__).parent / "results" / "kv-cache.json"
out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
