"""AutoRound beside its own package: the same model, windows, steps and grid, each in a process of
its own.

Usage: python experiments/auto_round.py AUTOROUND_PYTHON FOLDER [STEPS WINDOWS LENGTH PER_STEP]

The interpreter is of an environment with auto-round, and FOLDER receives what is written. By
default 24 steps of 4 windows out of 16 x 128 tokens, which is small: the package's own default is
200 steps of 8 windows out of 128 x 2048. All quantize every linear but the head to symmetric int4
in groups of 64, with the package's symmetric scale (`signed` here). The loss is what the block
output error is in both: the squared error of the hidden states behind each block, over that of
those states, on the calibration windows, as a mean over blocks. Seconds are processor seconds of
quantizing alone. Figures go to results/auto-round.json, one program after the
other; what it holds at these settings is not run again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers

import qlab
import qlab.hf
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import read

RESULT = Path(__file__).parent / "results" / "auto-round.json"
START = """
import json, sys, time, torch
model, ids, out, steps, per_step = sys.argv[1:]
ids, steps, per_step = torch.load(ids), int(steps), int(per_step)
"""
END = """
print(json.dumps([seconds, version]))
"""
THEIRS = (
    START
    + """
from auto_round import AutoRound, __version__ as version
from transformers import AutoModelForCausalLM, AutoTokenizer
data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(model)
cpu = time.process_time()
rounding = AutoRound(loaded, tokenizer, bits=4, group_size=64, sym=True, iters=steps, batch_size=per_step, nsamples=len(ids), seqlen=ids.shape[1], dataset=data, device_map="cpu", enable_torch_compile=False{more})
rounding.quantize()
seconds = time.process_time() - cpu
rounding.save_quantized(out, format="auto_round")
"""  # noqa: E501
    + END
)
OURS = (
    START
    + """
import qlab
version = "here"
opened = qlab.open(model)
spec = qlab.parse_spec("int4-g64")
recipe = {recipe}
cpu = time.process_time()
qlab.quantize(opened, recipe, qlab.from_ids(opened, ids), out, overwrite=True)
seconds = time.process_time() - cpu
"""
    + END
)
REFINED = "qlab.chain(qlab.gptq(spec), qlab.auto_round_refine(steps=steps // 4, windows=per_step))"
# So few steps have to be larger, to reach the next code at all.
HASTY = "qlab.chain(qlab.gptq(spec), qlab.auto_round_refine(2, windows=per_step, lr=0.0008))"


def recipe_of(grid: str) -> str:
    return f"qlab.auto_round(spec, qlab.GRIDS[{grid!r}], steps=steps, windows=per_step)"


PROGRAMS = {
    "AutoRound": THEIRS.replace("{more}", ""),
    "qlab auto_round, signed": OURS.replace("{recipe}", recipe_of("signed")),
    "AutoRound, enable_neuqi": THEIRS.replace("{more}", ", enable_neuqi=True"),
    "qlab auto_round, weighted": OURS.replace("{recipe}", recipe_of("weighted")),
    "qlab gptq": OURS.replace("{recipe}", "qlab.gptq(spec)"),
    "qlab gptq, auto_round_refine, 2 steps": OURS.replace("{recipe}", HASTY),
    "qlab gptq, auto_round_refine": OURS.replace("{recipe}", REFINED),
}


def timed(python, program, *arguments):
    """(processor seconds, version) of one program in a process of its own."""
    environment = dict(os.environ)
    if python != sys.executable:  # the package's Python does not see this checkout
        environment.pop("PYTHONPATH", None)
    process = subprocess.run(
        [python, "-c", program, *map(str, arguments)],
        cwd=Path(arguments[2]).parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


@torch.no_grad()
def behind_blocks(path, ids):
    """The hidden states behind each block [blocks, windows, tokens, k]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    states = [model.model(row[None], output_hidden_states=True).hidden_states for row in ids]
    return torch.stack([torch.cat(layer) for layer in zip(*states)])[1:-1]


def loss(states, reference):
    """The mean over blocks of |h' - h|^2 / |h|^2."""
    error, size = ((x).square().sum((1, 2, 3)) for x in (states - reference, reference))
    return float((error / size).mean())


def place_of(folder: Path) -> Path:
    """The model directory below a folder: the package names one after the model."""
    return next(p.parent for p in sorted(folder.rglob("config.json")))


def rows_at(settings):
    """What the file of results holds at these settings."""
    record = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    rows = record.pop("rows", [])
    return rows if record == settings else []


def main(theirs, folder, steps="24", windows="16", length="128", per_step="4"):
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = qlab.open("demo")
    ids = qlab.tokens(
        model, [demo_text("calibration")], samples=int(windows), length=int(length)
    ).ids
    torch.save(ids, folder / "ids.pt")
    held_out = qlab.first_windows(model, [demo_text("heldout")], length=512, count=8)
    reference, states = read(model, held_out), behind_blocks(model.path, ids)
    settings = {
        "steps": int(steps),
        "windows": int(windows),
        "length": int(length),
        "per_step": int(per_step),
        "held_out": "8 x 512 tokens",
    }
    rows = rows_at(settings)
    for name, program in PROGRAMS.items():
        if any(row["name"] == name for row in rows):
            continue
        python = theirs if name.startswith("AutoRound") else sys.executable
        out = folder / name
        seconds, version = timed(
            python, program, model.path, folder / "ids.pt", out, steps, per_step
        )
        e = qlab.evaluate(qlab.open(place_of(out)), reference, held_out)
        rows.append(
            {
                "name": name,
                "version": version,
                "processor_seconds": seconds,
                "loss": loss(behind_blocks(place_of(out), ids), states),
                "kl": e.kl,
                "ratio": e.perplexity / e.reference_perplexity,
                "ratio_ci": list(e.ratio_ci),
            }
        )
        print(rows[-1], flush=True)
        record = {**settings, "rows": rows}
        RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
