"""How well llama.cpp agrees with qlab on the same codes: next-token distributions of a GGUF file
that qlab wrote, beside those of the directory that it was made of.

Usage: python experiments/gguf_agreement.py FOLDER [spec=int4-g32,int8-g32] [tokens=200]

The demo model is rounded to nearest into FOLDER and written as GGUF. Both sides read the first
tokens of a held-out article; after the first 32, every distribution over the whole vocabulary is
compared. What llama.cpp told stays in FOLDER, and is not asked again.

llama.cpp (the wheel xllamacpp) rounds the inputs of every product to 8 bits in groups of 32, and
keeps keys and values in float16. Whether more than that differs is asked three times:

    llama.cpp with the same file, every tensor dequantized to F32 by the package gguf, and float32
    keys and values: it rounds nothing.
    qlab with the inputs of products rounded as llama.cpp rounds them (`tests/ggml.py`), once more
    with embeddings times 1 + 2^-22: how far a rounding error of float32 spreads by itself.
    llama.cpp with float32 keys and values: how far it is from itself.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy
import torch
from rich import print
from rich.table import Table
from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from ggml import in_float32, rounding_as_ggml

import qlab
from qlab.demo.hub import demo_model, evaluation_texts
from qlab.files.record import versions
from qlab.lowering.devices import device_label

FIRST = 32  # tokens of context that are not compared
FLOAT32, ROUNDING = "qlab, float32", "qlab, inputs rounded as by llama.cpp"
RESULTS = Path(__file__).parent / "results"
# llama.cpp, in a process of its own: log-probabilities behind every prefix, as float32
LLAMA = """
import sys, json, numpy, xllamacpp
path, out = sys.argv[1:3]
first, size, wide = map(int, sys.argv[3:])
ids = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 512, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
if wide:
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
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


def of_llama(file, ids, size, float32=False):
    """log-probabilities [tokens, size], and the sets of instructions. float32: keeps keys and
    values so, and computes attention in it."""
    out = file.with_name(f"{file.stem}-{len(ids)}{'-float32' if float32 else ''}.npy")
    if not Path(f"{out}.json").exists():
        given = [file, out, FIRST, size, int(float32)]
        command = [sys.executable, "-c", LLAMA, *map(str, given)]
        subprocess.run(command, input=json.dumps(ids), text=True, check=True, capture_output=True)
    return torch.from_numpy(numpy.load(out)), json.loads(Path(f"{out}.json").read_text())[0]


@torch.no_grad()
def of_qlab(path, ids, dtype, activations=None, change=lambda model: model):
    model = change(qlab.lower(path, dtype=dtype, activations=activations))
    logits = model(torch.tensor([ids[:-1]])).logits[0, FIRST - 1 :]
    return logits.float().log_softmax(-1)


def moved(model):
    """One whose embeddings are a rounding error of float32 larger."""
    model.get_input_embeddings().register_forward_hook(lambda _, __, x: x * (1 + 2**-22))
    return rounding_as_ggml(model)


def compared(reference, other):
    # llama.cpp sums a vocabulary in float32, so that its probabilities add up to 1.0002
    reference, other = (told.double().log_softmax(-1) for told in (reference, other))
    other = other.clamp(min=-50)  # a probability that is told as 0
    kl = (reference.exp() * (reference - other)).sum(-1)
    top = (reference.argmax(-1) == other.argmax(-1)).double()
    return {"kl": kl.mean().item(), "worst_kl": kl.max().item(), "top1": top.mean().item()}


def of_spec(spec, model, folder, ids):
    """The rows of one spec, and the sets of instructions of llama.cpp."""
    path, size = folder / spec, model.config.vocab_size
    if not path.exists():
        qlab.quantize(model, qlab.rtn(spec), None, path)
    file = qlab.convert(path, "gguf", folder / f"{spec}.gguf", overwrite=True).path
    exact = of_qlab(path, ids, torch.float32)
    rounding = of_qlab(path, ids, torch.float32, change=rounding_as_ggml)
    theirs, sets = of_llama(file, ids, size)
    wide, _ = of_llama(file, ids, size, float32=True)
    dense, _ = of_llama(in_float32(file, folder / f"{spec}-f32.gguf"), ids, size, float32=True)
    pairs = {
        (FLOAT32, "llama.cpp, the same numbers as F32"): (exact, dense),
        (FLOAT32, "llama.cpp"): (exact, theirs),
        (FLOAT32, ROUNDING): (exact, rounding),
        (FLOAT32, "qlab, int8 activations"): (exact, of_qlab(path, ids, torch.bfloat16, "int8")),
        (FLOAT32, "qlab, bfloat16"): (exact, of_qlab(path, ids, torch.bfloat16)),
        ("llama.cpp", "llama.cpp, float32 keys and values"): (theirs, wide),
        ("llama.cpp", ROUNDING): (theirs, rounding),
        (ROUNDING, "the same, embeddings times 1 + 2^-22"): (
            rounding,
            of_qlab(path, ids, torch.float32, change=moved),
        ),
    }
    rows = [
        {"spec": spec, "reference": one, "engine": other, **compared(*both)}
        for (one, other), both in pairs.items()
    ]
    return rows, sets


def main(folder, *settings):
    chosen = {"spec": "int4-g32,int8-g32", "tokens": "200"} | dict(s.split("=") for s in settings)
    model = qlab.open(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    text = evaluation_texts(None)[0].read_text(encoding="utf-8")[:20000]
    ids = tokenizer(text).input_ids[: FIRST + int(chosen["tokens"])]
    rows, table = [], Table("spec", "reference", "engine", "KL", "worst KL", "top-1")
    for spec in chosen["spec"].split(","):
        found, sets = of_spec(spec, model, Path(folder), ids)
        rows += found
    for row in rows:
        figures = f"{row['kl']:.1e}", f"{row['worst_kl']:.1e}", f"{row['top1']:.3f}"
        table.add_row(row["spec"], row["reference"], row["engine"], *figures)
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
