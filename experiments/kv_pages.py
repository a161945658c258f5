"""What do cache schemes cost through the pages of the engine, in bytes and in KL divergence?

Usage: python experiments/kv_pages.py

The unquantized demo in fp32: 2 held-out windows of 512 tokens with
codes in pages against the same with numbers in pages. Means and shares of ranges come from qlab's
passage of 256 tokens, as at every start. Perplexity is that of the held-out text, as a ratio.
Writes results/kv-pages.json.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.statistics import bootstrap
from qlab.generation.cache_cost import through_pages
from qlab.generation.pipeline import Pipeline

SCHEMES = ("int8", "int4", "k8v4", "fp8")


def pages(kv_cache: str | None) -> Pipeline:
    return qlab.pipeline("demo", dtype=torch.float32, rows=1, max_length=1024, kv_cache=kv_cache)


windows = qlab.first_windows(qlab.open("demo"), [demo_text("heldout")], length=512, count=2).ids
plain = pages(None)
reference = [through_pages(plain.engine, w.tolist()).log_softmax(-1).half() for w in windows]
of_token = plain.engine.pool.layers.bytes_of_token / 2  # of 16 bits
del plain
rows = {}
for name in SCHEMES:
    engine = pages(name).engine
    kl, worse = [], []
    for ids, p16 in zip(windows, reference):
        p, q = p16.float(), through_pages(engine, ids.tolist()).log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1).mean())
        worse.append(F.nll_loss(q[:-1], ids[1:]) - F.nll_loss(p[:-1], ids[1:]))
    of_windows, ratios = torch.stack(kl), torch.stack(worse)
    rows[name] = {
        "bytes": engine.pool.layers.bytes_of_token / of_token,
        "kl": float(of_windows.mean()),
        "kl_ci": list(bootstrap(of_windows)),
        "ratio": float(ratios.mean().exp()),
        "ratio_ci": list(bootstrap(ratios, torch.exp)),
    }
    print(name, rows[name], flush=True)
record = {"held_out": "2 x 512", "calibration": "1 x 256 of qlab's passage", "rows": rows}
out = Path(__file__).parent / "results" / "kv-pages.json"
out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
