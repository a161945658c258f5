"""GPTQModel's GPTQ and llm-compressor's GPTQ and AWQ beside qlab's methods: the same model and
windows, in turns, a process each.

Usage: python experiments/rivals.py GPTQMODEL_PYTHON LLMCOMPRESSOR_PYTHON FOLDER [MODEL CALIBRATION
HELDOUT]

The interpreters are of environments with gptqmodel and with llmcompressor (`python
tests/interop/make_env.py` makes such ones), and FOLDER receives what they write. MODEL is a
directory and the other two are text files; without them, the demo's. All of them quantize every
linear but the head to symmetric int4 in groups of 64, act-order without g_idx, from 32 x 512
tokens, and are compared by qlab on the same held-out windows. GPTQModel's AWQ asks for a GPU;
llm-compressor's pins memory for one, which is left out here. Seconds are those of quantizing: of
GPTQModel without loading and saving, of the other two with what they write. Figures go to
results/rivals.json, of another model to results/rivals/NAME.json.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from rich import print
from rich.table import Table

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import read
from qlab.files.record import versions

METHODS = ("gptq", "awq", "awq-gptq", "gptaq")
ROUNDS = 1
RESULTS = Path(__file__).parent / "results"

# each reads: the model, a file of token ids [samples, length], where to write; and prints seconds,
# peak bytes and its version
START = (
    "import json, resource, sys, time, torch\nmodel, ids, out = sys.argv[1:]\nids = "
    "torch.load(ids)\n"
)
END = (
    "\nprint(json.dumps([seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "
    "version]))"
)
GPTQMODEL = (
    START
    + """
from gptqmodel import GPTQModel, QuantizeConfig, __version__ as version
samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
loaded = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=64, sym=True), device="cpu")
started = time.perf_counter()
loaded.quantize(samples, batch_size=4)
seconds = time.perf_counter() - started
loaded.save(out)
"""
    + END
)
LLM_COMPRESSOR = (
    START
    + """
from datasets import Dataset
from transformers import AutoModelForCausalLM
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import __version__ as version, oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
IntermediatesCache.pin_memory = lambda cache, batch_index: None
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=64{order})
scheme = dict(ignore=["lm_head"], config_groups={"all": QuantizationScheme(targets=["Linear"], weights=args)})
loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
started = time.perf_counter()
oneshot(model=loaded, dataset=data, recipe={recipe}, max_seq_length=ids.shape[1], num_calibration_samples=len(ids), output_dir=out)
seconds = time.perf_counter() - started
"""  # noqa: E501
    + END
)
LLM_COMPRESSOR_GPTQ = LLM_COMPRESSOR.replace("{order}", ', actorder="static"').replace(
    "{recipe}", "GPTQModifier(**scheme)"
)
LLM_COMPRESSOR_AWQ = LLM_COMPRESSOR.replace("{order}", "").replace(
    "{recipe}", "[AWQModifier(), QuantizationModifier(**scheme)]"
)
QLAB = (
    START
    + """
import qlab
version = "here"
opened = qlab.open(model)
recipe = qlab.METHODS["{method}"](qlab.parse_spec("int4-g64"))
seconds = qlab.quantize(opened, recipe, qlab.from_ids(opened, ids), out, overwrite=True).seconds
"""
    + END
)


def timed(python, program, model, ids, out):
    """(seconds, peak bytes, version) of one program in a process of its own."""
    out.mkdir(parents=True, exist_ok=True)  # where it writes its logs, too
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
    if python != sys.executable:  # a rival's Python does not see this checkout
        environment.pop("PYTHONPATH", None)
    command = [python, "-c", program, str(model), str(ids), str(out / "model")]
    process = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


def row_of(name, runs, evaluation):
    """What is stored of one program: its runs, each (seconds, peak bytes, version), and how much
    worse its model is."""
    seconds, peaks, versions_used = zip(*runs)
    return {
        "name": name,
        "version": versions_used[0],
        "seconds": list(seconds),
        "peak_rss_bytes": list(peaks),
        "perplexity": evaluation.perplexity,
        "ratio": evaluation.perplexity / evaluation.reference_perplexity,
        "ratio_ci": evaluation.ratio_ci,
        "kl": evaluation.kl,
        "top1_agreement": evaluation.top1_agreement,
    }


def show(rows):
    """The rows as a table."""
    table = Table("", "version", "seconds", "peak MiB", "perplexity (95 %, paired)", "KL", "top-1")
    for row in rows:
        low, high = row["ratio_ci"]
        table.add_row(
            row["name"],
            row["version"],
            " ".join(f"{seconds:.0f}" for seconds in row["seconds"]),
            f"{median(row['peak_rss_bytes']) / (1 << 20):.0f}",
            f"{row['ratio'] - 1:+.2%} ({low - 1:.2%} to {high - 1:.2%})",
            f"{row['kl']:.3g}",
            f"{row['top1_agreement']:.3f}",
        )
    print(table)


def main(gptqmodel, llm_compressor, folder, name="demo", calibration=None, heldout=None):
    model, folder = qlab.open(name), Path(folder).resolve()
    programs = {
        "GPTQModel gptq": (gptqmodel, GPTQMODEL),
        "llm-compressor gptq": (llm_compressor, LLM_COMPRESSOR_GPTQ),
        "llm-compressor awq": (llm_compressor, LLM_COMPRESSOR_AWQ),
        **{f"qlab {m}": (sys.executable, QLAB.replace("{method}", m)) for m in METHODS},
    }
    folder.mkdir(parents=True, exist_ok=True)
    ids = folder / "ids.pt"
    texts = [calibration or demo_text("calibration")]
    torch.save(qlab.tokens(model, texts, samples=32, length=512).ids, ids)

    runs = {rival: [] for rival in programs}
    for _ in range(ROUNDS):  # rounds outside, so that a slow minute meets every program
        for rival, (python, program) in programs.items():
            runs[rival].append(timed(python, program, model.path, ids, folder / rival))

    held_out = qlab.first_windows(model, [heldout or demo_text("heldout")], length=512, count=16)
    reference = read(model, held_out)
    evaluations = {
        rival: qlab.evaluate(qlab.open(folder / rival / "model"), reference, held_out)
        for rival in programs
    }
    rows = [row_of(rival, runs[rival], evaluations[rival]) for rival in programs]
    show(rows)
    results = {
        "reference_perplexity": next(iter(evaluations.values())).reference_perplexity,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "versions": versions(),
    }
    place = RESULTS / "rivals.json"
    if name != "demo":
        place = RESULTS / "rivals" / f"{model.path.name}.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
