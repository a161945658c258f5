"""How well llama.cpp agrees with qlab on the same codes: next-token distributions of a GGUF file
that qlab wrote, beside those of the directory that it was made of.

Usage: python experiments/gguf_agreement.py FOLDER [spec=int4-g32,int8-g32] [tokens=200]

The demo model is rounded to nearest into FOLDER and written as GGUF. Both sides read the first
tokens of a held-out article; after the first 32, every distribution over the whole vocabulary is
compared. llama.cpp (the wheel xllamacpp) rounds the inputs of every product to 8 bits in groups of
32, so the same is asked of qlab with activations rounded to int8, and of qlab in bfloat16.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from rich import print
from rich.table import Table
from transformers import AutoTokenizer

import qlab
from qlab.demo.hub import demo_model, evaluation_texts
from qlab.files.record import versions
from qlab.lowering.devices import device_label

FIRST = 32  # tokens of context that are not compared
RESULTS = Path(__file__).parent / "results"
# llama.cpp, in a process of its own: log-probabilities behind every prefix, as float32
LLAMA = """
import sys, json, numpy, xllamacpp
path, out, first, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
ids = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 512, 1, False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
rows = numpy.full((len(ids) - first, size), -numpy.inf, dtype=numpy.float32)
sampler = {"n_predict": 1, "temperature": 0, "logit_bias": [[ids[first], 1000]]}
for row, last in zip(rows, range(first, len(ids))):
    answer = server.handle_completions({"prompt": ids[:last], "n_probs": size, **sampler})
    for told in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        row[told["id"]] = told["logprob"]
numpy.save(out, rows)
open(out + ".json", "w").write(json.dumps([xllamacpp.get_system_info(), xllamacpp.__file__]))
"""


def of_llama(file, ids, size):
    out = file.with_suffix(".npy")
    command = [sys.executable, "-c", LLAMA, str(file), str(out), str(FIRST), str(size)]
    subprocess.run(command, input=json.dumps(ids), text=True, check=True, capture_output=True)
    import numpy

    return torch.from_numpy(numpy.load(out)), json.loads(Path(f"{out}.json").read_text())[0]


@torch.no_grad()
def of_qlab(path, ids, dtype, activations=None):
    model = qlab.lower(path, dtype=dtype, activations=activations)
    logits = model(torch.tensor([ids[:-1]])).logits[0, FIRST - 1 :]
    return logits.float().log_softmax(-1)


def compared(reference, other):
    other = other.clamp(min=-50)  # a probability that is told as 0
    kl = (reference.exp() * (reference - other)).sum(-1)
    top = (reference.argmax(-1) == other.argmax(-1)).float()
    return {"kl": kl.mean().item(), "worst_kl": kl.max().item(), "top1": top.mean().item()}


def main(folder, *settings):
    chosen = {"spec": "int4-g32,int8-g32", "tokens": "200"} | dict(s.split("=") for s in settings)
    model = qlab.open(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    text = evaluation_texts(None)[0].read_text(encoding="utf-8")[:20000]
    ids = tokenizer(text).input_ids[: FIRST + int(chosen["tokens"])]
    size, rows = model.config.vocab_size, []
    for spec in chosen["spec"].split(","):
        path = Path(folder) / spec
        if not path.exists():
            qlab.quantize(model, qlab.rtn(spec), None, path)
        file = qlab.convert(path, "gguf", Path(folder) / f"{spec}.gguf", overwrite=True).path
        exact = of_qlab(path, ids, torch.float32)
        theirs, sets = of_llama(file, ids, size)
        others = {
            "llama.cpp": theirs,
            "qlab, int8 activations": of_qlab(path, ids, torch.bfloat16, "int8"),
            "qlab, bfloat16": of_qlab(path, ids, torch.bfloat16),
        }
        rows += [
            {"spec": spec, "engine": name, **compared(exact, other)}
            for name, other in others.items()
        ]
    table = Table("spec", "engine", "KL", "worst KL", "top-1")
    for row in rows:
        table.add_row(
            row["spec"],
            row["engine"],
            f"{row['kl']:.5f}",
            f"{row['worst_kl']:.4f}",
            f"{row['top1']:.3f}",
        )
    print(table)
    record = {
        "tokens": len(ids) - FIRST,
        "rows": rows,
        "device": device_label(torch.device("cpu")),
        "llama.cpp": sets,
        "versions": versions(),
    }
    (RESULTS / "gguf-agreement.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
