"""What do activations rounded to int8 and a head rounded to int8 cost, beside what the quantization
of the weights costs?

Usage: python experiments/int8_activations.py DIRECTORY

Of a quantized demo model, on 4 held-out windows of 256 tokens: the KL divergence of the lowered
model from the unquantized one, as it is and rounded, and that between the two, in float32 and in
bfloat16; and between the dtypes, which bounds what can be told apart in bfloat16. Writes
results/int8-activations-NAME.json, NAME that of the directory.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import qlab
from qlab.demo.build import demo_text
from qlab.files.record import versions
from qlab.lowering.devices import device_label
from qlab_kernels.int4_int8 import best_path

LENGTH, COUNT = 256, 4
RESULTS = Path(__file__).parent / "results"
ROUNDED = {
    "int8 activations": {"activations": "int8"},
    "int8 head": {"head": "int8-g32"},
    "both": {"activations": "int8", "head": "int8-g32"},
}


def log_probabilities(model, windows):
    return torch.cat([F.log_softmax(model(row[None]).logits.float(), -1)[0] for row in windows])


def kl(p, q):
    """Mean KL divergence of q from p, in nats for a token."""
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def main(directory):
    source = qlab.open("demo")
    windows = qlab.first_windows(source, [demo_text("heldout")], length=LENGTH, count=COUNT).ids
    whole = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    reference = log_probabilities(whole, windows)
    rows, plain_ones = {}, []
    for dtype in (torch.float32, torch.bfloat16):
        plain = log_probabilities(qlab.lower(directory, "cpu", dtype), windows)
        plain_ones.append(plain)
        rows[str(dtype)] = {"of the quantization": kl(reference, plain)}
        for name, how in ROUNDED.items():
            rounded = log_probabilities(qlab.lower(directory, "cpu", dtype, **how), windows)
            rows[str(dtype)][name] = {
                "of both": kl(reference, rounded),
                "between the two": kl(plain, rounded),
                "share": kl(plain, rounded) / kl(reference, plain),
            }
        print(dtype, rows[str(dtype)], flush=True)
    print("between the dtypes", kl(*plain_ones))
    record = {
        "directory": Path(directory).name,
        "held_out": f"{COUNT} x {LENGTH}",
        "rows": rows,
        "between the dtypes": kl(*plain_ones),
        "path": best_path(),
        "device": device_label(torch.device("cpu")),
        "versions": versions(),
    }
    result = RESULTS / f"int8-activations-{Path(directory).name}.json"
    result.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
