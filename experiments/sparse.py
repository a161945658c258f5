"""2:4 zeros and int4 codes: chosen against one weight, one after the other, and by llm-compressor.

Usage: python experiments/sparse.py LLMCOMPRESSOR_PYTHON FOLDER

The interpreter is of an environment with llmcompressor, and FOLDER receives what it writes. All
prune every linear but the head to 2:4 by SparseGPT and round what is left to symmetric int4 in
groups of 64 by GPTQ, from 8 x 512 tokens, and are compared on the same 8 held-out windows. In "one
after the other" GPTQ aims at the pruned weight, in "together" at the unpruned one. Seconds are
processor seconds of solving alone. Figures go to results/sparse-int4.json; what that holds is not
run again.
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
from qlab.evaluation.perplexity import read

RESULT = Path(__file__).parent / "results" / "sparse-int4.json"
INT4 = qlab.parse_spec("int4-g64")
THEIRS = """
import json, sys, time, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import __version__ as version, oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
IntermediatesCache.pin_memory = lambda cache, batch_index: None
model, ids, out = sys.argv[1:]
ids = torch.load(ids)
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=64, actorder="static")
scheme = QuantizationScheme(targets=["Linear"], weights=args)
recipe = [
    SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"]),
    GPTQModifier(ignore=["lm_head"], config_groups={"all": scheme}),
]
loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
cpu = time.process_time()
oneshot(model=loaded, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids))
seconds = time.process_time() - cpu
for module in loaded.modules():  # the numbers that its codes stand for, as a plain model
    if hasattr(module, "weight_scale"):
        scale = module.weight_scale.data.repeat_interleave(64, 1)
        codes = (module.weight.data / scale).round().clamp(-8, 7)
        module.weight.data = codes * scale
state = {name: t for name, t in loaded.state_dict().items() if "weight_" not in name and "input_" not in name}
fresh = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
fresh.load_state_dict(state, strict=False)
zeros = float(torch.cat([(p == 0).flatten() for n, p in fresh.named_parameters() if "proj" in n]).float().mean())
fresh.save_pretrained(out)
print(json.dumps([seconds, version, zeros]))
"""  # noqa: E501


def aim_at_pruned(weight):
    """What GPTQ of an already pruned model aims at."""
    return weight.cell.aim(weight.cell.leaf)


PRUNED = qlab.sparsegpt("2:4")
RECIPES = {
    "one after the other": qlab.chain(
        PRUNED, qlab.each_cell("aim_at_pruned", aim_at_pruned), qlab.gptq(INT4)
    ),
    "together": qlab.chain(PRUNED, qlab.gptq(INT4)),
}


def theirs(python, model, ids, folder):
    """The dense model that llm-compressor makes, in a process of its own, and processor seconds."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, "-c", THEIRS, str(model), str(ids), str(folder / "theirs")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(python, folder):
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = qlab.open("demo")
    data = qlab.tokens(model, [demo_text("calibration")], samples=8, length=512)
    torch.save(data.ids, folder / "ids.pt")
    held_out = qlab.first_windows(model, [demo_text("heldout")], length=512, count=8)
    reference = read(model, held_out)
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else {}

    def record(name, evaluated, **facts):
        rows[name] = {
            **facts,
            "kl": evaluated.kl,
            "kl_ci": list(evaluated.kl_ci),
            "ratio": evaluated.perplexity / evaluated.reference_perplexity,
            "ratio_ci": list(evaluated.ratio_ci),
        }
        print(name, rows[name], flush=True)
        facts = {"calibration": "8 x 512", "held_out": "8 x 512", "rows": rows}
        RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    for name, recipe in RECIPES.items():
        if name not in rows:
            cpu = time.process_time()
            value = qlab.quantize(model, recipe, data, folder / name, overwrite=True)
            cpu = time.process_time() - cpu
            e = qlab.evaluate(qlab.open(value.path), reference, held_out)
            record(name, e, processor_seconds=cpu)
    if "llm-compressor" not in rows:
        cpu, version, zeros = theirs(python, model.path, folder / "ids.pt", folder)
        e = qlab.evaluate(qlab.open(folder / "theirs"), reference, held_out)
        record("llm-compressor", e, processor_seconds=cpu, version=version, zeros=zeros)


if __name__ == "__main__":
    main(*sys.argv[1:])
