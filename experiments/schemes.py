"""What does each scheme lose, rounded to nearest and by the method that suits it, beside
llm-compressor's presets of the same name?

Usage: python experiments/schemes.py [methods=rtn,best] [schemes=all] [group=64] [samples=4]
       [length=256] [windows=4] [model=demo] [rival=LLMCOMPRESSOR_PYTHON]

Every row is run end to end: the model is quantized and written, the directory verified and opened
again, what it holds evaluated, and lowered. `done` names the steps that ended, and a row that a
step refuses holds the reason. Of the first window are `kl_of_first` and, of the lowered model in
float32, `lowered_kl_of_first`. `lowered_kl` is the divergence between the two: where inputs are
rounded, another order of sums lets a few inputs land on the neighbouring code, and behind thirty
blocks all roundings differ. On the demo model, whose widths groups of 128 do not divide, schemes in
such groups are run in groups of `group`.

"best" is `best` below; any other method is a name that `qlab.method` takes. With `rival`, the
Python of an environment with llm-compressor, the methods are llm-compressor's: rtn
(QuantizationModifier) and gptq (GPTQModifier, behind SmoothQuantModifier where inputs are int8), by
its presets with the same groups, on the same windows.

A row is written to results/schemes.json (of another model, results/schemes/NAME.json) when it is
done. One that is there with the same calibration and held-out windows is not run again, so that the
table grows over several starts; rows of other windows are replaced.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import read
from qlab.files.record import versions

RESULTS = Path(__file__).parent / "results"
DEMO = "SmolLM2-135M-Instruct"
OPTIONS = {"methods": "rtn,best", "schemes": "all", "group": "64", "samples": "4"}
OPTIONS |= {"length": "256", "windows": "4", "model": "demo", "rival": ""}
# reads: the model, a file of token ids [samples, length], where to write, a preset, a size of
# groups, a method; prints its version
LLM_COMPRESSOR = """
import json, sys, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import __version__ as version, oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
IntermediatesCache.pin_memory = lambda cache, batch_index: None
model, ids, out, name, group, method = sys.argv[1:]
ids = torch.load(ids)
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
preset = preset_name_to_scheme(name, ["Linear"])
if preset.weights.group_size == 128 and preset.weights.strategy == "group":
    preset.weights = preset.weights.model_copy(update={"group_size": int(group)})
rounded = dict(ignore=["lm_head"], config_groups={"all": preset})
recipe = [QuantizationModifier(**rounded)]
if method == "gptq":
    inputs = preset.input_activations
    smooth = inputs is not None and inputs.type == "int" and inputs.num_bits == 8
    recipe = [SmoothQuantModifier(smoothing_strength=0.8)] if smooth else []
    recipe.append(GPTQModifier(**rounded))
loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
oneshot(model=loaded, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids), output_dir=out)
print(json.dumps({"version": version, "recipe": [type(step).__name__ for step in recipe]}))
"""  # noqa: E501


def fitting(name, group):
    """The scheme, in groups of this size where it has groups of 128 integers."""
    scheme = qlab.scheme(name)
    in_groups = scheme.weights is not None and scheme.weights.tile == qlab.Tile(1, 128)
    return qlab.scheme(f"{name}-g{group}") if in_groups else scheme


def best(scheme):
    """The recipe that suits a scheme. Weights by `loaq-refined`, solved on the inputs as they will
    be rounded. Integers have equal steps, which outliers make wide: their inputs are turned. Floats
    have steps that grow with the number, and are left in their basis. Those of 4 bits lose what is
    small beside a large neighbour, and their channels are scaled to be more alike. Keys and values
    are turned by heads."""
    if scheme.weights is None:
        turned = qlab.chain(qlab.rotate_heads(), qlab.rotate_scores())
        return qlab.chain(turned, scheme.on_cache("least_error"))
    inputs = None if scheme.inputs is None else scheme.inputs.spec
    alike = ()
    if isinstance(inputs, qlab.Int):
        alike = qlab.chain(qlab.rotate_residual(), qlab.quarot())
    elif inputs is not None and inputs.bits == 4:
        alike = qlab.awq_scale(scheme.weights, inputs=inputs)
    # under a global scale nothing is gained by clipping: groups have scales of their own
    static = "absmax" if getattr(inputs, "outer", False) else "least_error"
    return qlab.chain(alike, scheme.on_inputs(static), scheme.filled("loaq-refined"))


def divergence(logits, reference):
    """Mean KL divergence from a reference of the predictions of one window, in nats."""
    log_q, log_p = (x[0, :-1].float().log_softmax(-1) for x in (logits, reference))
    return float(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean())


def figures(directory, held_out, reference):
    """What an opened directory loses, and the same of the lowered model on the first window."""
    reading, first = read(directory, held_out), held_out.ids[:1]
    e = qlab.evaluate(reading, reference, held_out)
    row = {"kl": e.kl, "kl_ci": list(e.kl_ci), "top1": e.top1_agreement}
    row |= {"ratio": e.perplexity / e.reference_perplexity, "ratio_ci": list(e.ratio_ci)}
    yield "evaluated", row | {"kl_of_first": e.kl_by_window[0]}
    with torch.no_grad():
        lowered = qlab.lower(directory, dtype=torch.float32)(first).logits
    apart = divergence(lowered, qlab.logits(reading, first))
    of_first = divergence(lowered, qlab.logits(reference, first))
    yield "lowered", {"lowered_kl": apart, "lowered_kl_of_first": of_first}


def end_to_end(model, recipe, data, held_out, reference, folder):
    """Each step that ended, with what it adds to the row."""
    result = qlab.write(qlab.apply(model, recipe, data), folder / "written")
    yield "quantized", {"recipe": [stage.name for stage in recipe]}
    faults = qlab.verify(result.path, model).faults
    assert not faults, faults
    yield "verified", {}
    directory = qlab.open(result.path)
    yield "reloaded", {"bytes": result.bytes}
    yield from figures(directory, held_out, reference)


def of_rival(python, scheme, method, options, model, data, held_out, reference, folder):
    """The same of a directory that llm-compressor writes, which holds no certificates."""
    torch.save(data.ids, folder / "ids.pt")
    name = scheme.name.partition("-")[0]
    arguments = [model.path, folder / "ids.pt", folder / "written", name, options["group"], method]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, "-c", LLM_COMPRESSOR, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise qlab.QlabError(done.stderr.strip().splitlines()[-1][:300])
    yield "quantized", json.loads(done.stdout.splitlines()[-1])
    directory = qlab.open(folder / "written")
    yield "reloaded", {}
    yield from figures(directory, held_out, reference)


def row_of(steps, settings):
    """What the steps of a row add to it, up to the one that refuses."""
    row, started = {"done": [], **settings}, time.process_time()
    try:
        for step, facts in steps:
            row["done"].append(step)
            row |= facts
    except qlab.QlabError as error:
        row["refused"] = str(error)
    return row | {"processor_seconds": round(time.process_time() - started, 1)}


def cell(row):
    """KL divergence with its interval, and the change of perplexity, as README's table says it."""
    if not row or "kl" not in row:
        return (row or {}).get("refused", "")
    digits = 4 if row["kl"] < 0.01 else 3
    low, high = row["kl_ci"]
    ratio = row["ratio"]
    change = f"{ratio:.2f} x" if ratio > 2 else f"{100 * (ratio - 1):+.1f} %"
    return f"{row['kl']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}), {change}"


def table(rows):
    """README's table of all rows."""
    columns = ("rtn", "best", "llm-compressor rtn")
    names = list(dict.fromkeys(key.partition(" ")[0] for key in rows))
    order = [fitting(row.scheme.name, OPTIONS["group"]).name for row in qlab.schemes()]
    lines = [f"| scheme | bits | {' | '.join(columns)} |", "|---|---|---|---|---|"]
    for name in sorted(names, key=order.index):
        of_name = [rows.get(f"{name} {column}") for column in columns]
        bits = next((row["bits"] for row in of_name if row and row["bits"]), None)
        shown = "-" if bits is None else f"{bits:.2f}"
        lines.append(f"| {name} | {shown} | {' | '.join(map(cell, of_name))} |")
    return "\n".join(lines)


def main(*arguments):
    options = OPTIONS | dict(argument.split("=", 1) for argument in arguments)
    samples, length, windows = (int(options[key]) for key in ("samples", "length", "windows"))
    model = qlab.open(options["model"])
    data = qlab.tokens(model, [demo_text("calibration")], samples=samples, length=length, seed=0)
    held_out = qlab.first_windows(model, [demo_text("heldout")], length=length, count=windows)
    settings = {"calibration": f"{samples} x {length}", "held_out": f"{windows} x {length}"}
    out = RESULTS / "schemes.json"
    if options["model"] != "demo":
        out = RESULTS / "schemes" / f"{model.path.name}.json"
        out.parent.mkdir(exist_ok=True)
    record = {
        "model": DEMO if options["model"] == "demo" else model.path.name,
        "versions": versions(),
        "rows": {},
    }
    if out.is_file():
        record["rows"] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    rows, reference = record["rows"], None
    names = [row.scheme.name for row in qlab.schemes()]
    names = names if options["schemes"] == "all" else options["schemes"].split(",")
    who = "llm-compressor " if options["rival"] else ""
    for method in options["methods"].split(","):
        for scheme in (fitting(name, options["group"]) for name in names):
            key = f"{scheme.name} {who}{method}"
            if settings.items() <= rows.get(key, {}).items():
                continue
            reference = reference or read(model, held_out)
            with tempfile.TemporaryDirectory() as folder:
                place = (data, held_out, reference, Path(folder))
                if who:
                    steps = of_rival(options["rival"], scheme, method, options, model, *place)
                else:
                    recipe = best(scheme) if method == "best" else scheme.recipe(method)
                    steps = end_to_end(model, recipe, *place)
                rows[key] = row_of(steps, {"bits": scheme.bits_per_weight, **settings})
            out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(key, rows[key], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
