"""What do cache schemes cost through the pages of the engine, one figure for each word?

Usage: python experiments/kv_pages.py loss
       OMP_NUM_THREADS=1 python experiments/kv_pages.py steps DIRECTORY

loss: bytes and KL divergence. The unquantized demo in fp32: 2 held-out windows of 512 tokens with
codes in pages against the same with numbers in pages. Means and shares of ranges come from qlab's
passage of 256 tokens, as at every start. Perplexity is that of the held-out text, as a ratio.

steps: processor milliseconds of a decode step of one row at 400 tokens, in blocks that are
compiled, beside int8 activations, and the ratio to a cache of numbers: medians of turns of one
run. "by torch": the codes are read by torch's operations, which the compiler joins.

Each word writes its part of results/kv-pages.json.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.statistics import bootstrap
from qlab.generation import coded
from qlab.generation.cache_cost import through_pages
from qlab.generation.engine import Engine
from qlab.generation.pipeline import Pipeline
from qlab.generation.sampling import Sampling
from qlab.lowering.devices import device_label

RESULT = Path(__file__).parent / "results" / "kv-pages.json"
SCHEMES = ("int8", "int4", "k8v4", "fp8")
CONTEXT, STEPS, TURNS = 400, 24, 7


def pages(kv_cache: str | None) -> Pipeline:
    return qlab.pipeline("demo", dtype=torch.float32, rows=1, max_length=1024, kv_cache=kv_cache)


def loss():
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
    return {"held_out": "2 x 512", "calibration": "1 x 256 of qlab's passage", "rows": rows}


# ------------------------------------------------------------------ steps
class ByTorch(coded.Coder):
    """Reads codes in slots by torch's operations."""

    def read_at(self, slots, at_bl, dtype):
        return self.read([part[at_bl] for part in slots], dtype)


def compiled(directory: str, kv_cache: str | None, coder: type) -> Engine:
    """An engine that has compiled its blocks for one row."""
    own, coded.Coder = coded.Coder, coder
    how = {"activations": "int8", "head": "int8-g32", "kv_cache": kv_cache}
    pipe = qlab.pipeline(directory, rows=1, max_length=1024, compile="block", **how)
    coded.Coder = own
    pipe.engine.compiled.wait()
    return pipe.engine


def milliseconds(engine: Engine) -> float:
    """Of a step behind CONTEXT tokens."""
    sampling = Sampling(temperature=0, max_tokens=STEPS + 4)
    request = engine.submit([*range(100, 100 + CONTEXT)], sampling)
    while len(request.drawn) < 2:
        engine.step()
    started = time.process_time()
    for _ in range(STEPS):
        engine.step()
    seconds = time.process_time() - started
    engine.run()
    return seconds / STEPS * 1000


def steps(directory: str):
    cases = {"numbers": (None, coded.Coder)}
    for name in SCHEMES:
        cases |= {name: (name, coded.Coder), f"{name} by torch": (name, ByTorch)}
    engines = {name: compiled(directory, *case) for name, case in cases.items()}
    turns = {name: [] for name in engines}
    for turn in range(TURNS + 1):
        for name, engine in engines.items():
            turns[name] += [milliseconds(engine)] if turn else []  # the first one warms up
    stats = [engine.compiled.stats() for engine in engines.values()]
    assert not any(of["recompiles"] or of["eager"] for of in stats), stats
    ratios = {name: [a / b for a, b in zip(ms, turns["numbers"])] for name, ms in turns.items()}
    rows = {name: {"ms": median(turns[name]), "ratio": median(ratios[name])} for name in turns}
    about = {"device": device_label(torch.device("cpu")), "threads": torch.get_num_threads()}
    return {"model": Path(directory).name, "context": CONTEXT, **about, "rows": rows}


def main(word: str, *arguments: str) -> None:
    record = json.loads(RESULT.read_text(encoding="utf-8"))
    record |= loss() if word == "loss" else {"steps": steps(*arguments)}
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record.get("steps") if word == "steps" else record["rows"], indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
