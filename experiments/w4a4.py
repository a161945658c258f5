"""Rotations with rounded weights and inputs, beside llm-compressor's SpinQuant and GPTQ.

Usage: python experiments/w4a4.py LLMCOMPRESSOR_PYTHON FOLDER [NAME NAME ...]

The interpreter is of an environment with llmcompressor, and FOLDER receives what it computes. All
round every linear but the head to symmetric int4 with a scale per row, and its input to symmetric
int4 or int8 with a scale per token, from 4 x 256 tokens. llm-compressor's SpinQuantModifier turns
by Hadamard matrices that are not learned (R1, R2, R4), in float32 and before GPTQ; its rounded
model runs in its own process, and its logits are compared. Figures are of 4 held-out windows of
256 tokens, all by `figures` below. Seconds are processor seconds of solving, ours with the forward
pass of the evaluation. Writes results/w4a4.json; what that holds is not run again. NAMEs choose
rows.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.statistics import bootstrap

RESULT = Path(__file__).parent / "results" / "w4a4.json"
THEIRS = """
import json, sys, time, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import __version__ as version, oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from llmcompressor.modifiers.transform import SpinQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
IntermediatesCache.pin_memory = lambda cache, batch_index: None
model, ids, held_out, bits, out = sys.argv[1:]
ids, held_out = torch.load(ids), torch.load(held_out)
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
scheme = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(num_bits=4, symmetric=True, strategy="channel"),
    input_activations=QuantizationArgs(num_bits=int(bits), symmetric=True, strategy="token", dynamic=True),
)
recipe = [
    SpinQuantModifier(rotations=["R1", "R2", "R4"], transform_type="random-hadamard"),
    GPTQModifier(ignore=["lm_head"], config_groups={"all": scheme}),
]
loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
cpu = time.process_time()
oneshot(model=loaded, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids))
seconds = time.process_time() - cpu
rounding = [m for m in loaded.modules() if getattr(getattr(m, "quantization_scheme", None), "input_activations", None)]
assert len(rounding) == 7 * len(loaded.model.layers) and all(m.quantization_enabled for m in rounding)
with torch.no_grad():
    torch.save(torch.cat([loaded(row[None]).logits.float() for row in held_out]), out)
print(json.dumps([seconds, version]))
"""  # noqa: E501
TURNED = qlab.chain(qlab.rotate_residual(), qlab.quarot())
W4 = "int4-channel"
SOLVERS = ("gptq", "gptq-refined", "loaq-refined")


def recipes(inputs):
    """Ours with inputs of this spec, which are rounded while weights are solved."""
    rounded = qlab.quantize_inputs(inputs)
    turned = {
        f"quarot, {name}": qlab.chain(TURNED, rounded, qlab.METHODS[name](W4)) for name in SOLVERS
    }
    learned = qlab.chain(
        qlab.spinquant(W4, inputs, steps=4),
        qlab.rotate_online(),
        rounded,
        qlab.METHODS["loaq-refined"](W4),
    )
    return {**turned, "spinquant of 4 steps, R4, loaq-refined": learned}


def theirs(python, bits, folder, model):
    """The logits of llm-compressor's model, in a process of its own, and facts about it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = folder / f"logits-{bits}.pt"
    files = [model.path, folder / "ids.pt", folder / "held_out.pt", bits, out]
    command = [python, "-c", THEIRS, *map(str, files)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    seconds, version = json.loads(done.stdout.splitlines()[-1])
    return torch.load(out), {"processor_seconds": seconds, "version": version}


def figures(logits, reference, ids):
    """KL divergence from the reference and perplexity relative to it, with intervals."""
    rows = zip(logits, reference, ids)
    windows = [_window(q[:-1].log_softmax(-1), p[:-1].log_softmax(-1), t[1:]) for q, p, t in rows]
    kl, nll, nll_reference = (torch.tensor(values).double() for values in zip(*windows))
    return {
        "kl": float(kl.mean()),
        "kl_ci": bootstrap(kl),
        "ratio": float((nll - nll_reference).mean().exp()),
        "ratio_ci": bootstrap(nll - nll_reference, torch.exp),
    }


def _window(log_q, log_p, tokens):
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return [float(kl), *(-float(x.gather(1, tokens[:, None]).mean()) for x in (log_q, log_p))]


def main(python, folder, *names):
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = qlab.open("demo")
    data = qlab.tokens(model, [demo_text("calibration")], samples=4, length=256)
    held_out = qlab.first_windows(model, [demo_text("heldout")], length=256, count=4).ids
    torch.save(data.ids, folder / "ids.pt")
    torch.save(held_out, folder / "held_out.pt")
    reference = qlab.logits(model, held_out)
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else {}
    for bits in (4, 8):
        ours = recipes(f"int{bits}-channel")
        for name in ("llm-compressor", *ours):
            row = f"W4A{bits} {name}"
            if row in rows or (names and row not in names):
                continue
            if name in ours:
                cpu = time.process_time()
                logits = qlab.logits(qlab.apply(model, ours[name], data), held_out)
                facts = {"processor_seconds": time.process_time() - cpu}
            else:
                logits, facts = theirs(python, bits, folder, model)
            rows[row] = {**facts, **figures(logits, reference, held_out)}
            print(row, rows[row], flush=True)
            record = {"calibration": "4 x 256", "held_out": "4 x 256", "rows": rows}
            RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
