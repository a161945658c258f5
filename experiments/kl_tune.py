"""How far does tuning take a method behind it, and in how much time?

Usage: python experiments/kl_tune.py SPEC FOLDER SOLVED_ON TUNED_ON [METHOD] [step=NAME]
       [SETTING=NUMBER ...]
By the protocol of README.md (windows of 512 tokens, seed 0, quantized inputs, 16 windows held out
of everything), but with more calibration windows than its 32 where SOLVED_ON says so. The tuning is
given TUNED_ON further windows, of which the method has seen none; it learns from most of them and
chooses what it keeps by the others, of which `kl_before` and `kl` are. With 0 nothing is tuned.
Windows beyond those of the calibration text are written by the unquantized model (LLM-QAT), each
behind 32 tokens of that text; FOLDER keeps them too.
METHOD is one of qlab.METHODS, or `thorough`: the recommended one where time is no matter and tokens
are many. NAME is the step of qlab that tunes, kl_tune (where none is named) or qat_end_to_end, and
SETTING one of its arguments. FOLDER keeps the solved model, which further runs only tune. Writes
results/kl-tune-SPEC.json, with NAME in the place of kl-tune, and METHOD behind SPEC if it is given.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import read
from qlab.methods import stages

LENGTH, BEGUN = 512, 32  # tokens of a window, and those of the text that a written one begins with
TEXT = [demo_text("calibration")]
spec, folder = qlab.parse_spec(sys.argv[1]), Path(sys.argv[2])
solved_on, tuned_on = int(sys.argv[3]), int(sys.argv[4])
pairs = dict(argument.split("=") for argument in sys.argv[5:] if "=" in argument)
step = pairs.pop("step", "kl_tune")
settings = {name: json.loads(number) for name, number in pairs.items()}
method = next((argument for argument in sys.argv[5:] if "=" not in argument), qlab.RECOMMENDED)


def neuqi_compensated(problem):
    """Scales and zero points searched together."""
    return stages.compensated(problem, qlab.GRIDS["neuqi"])


def thorough(spec):
    """loaq-refined with a better grid, twice the refinements and less damping."""
    better = {"grid": neuqi_compensated, "refine": stages.ALTERNATED, "metric": stages.attended}
    return qlab.chain(qlab.aim_in_stream(), qlab.solver(spec, damp=0.03, **better))


METHODS = {**qlab.METHODS, "thorough": thorough}
model = qlab.open("demo")
held_out = qlab.first_windows(model, [demo_text("heldout")], length=LENGTH, count=16)
reference = read(model, held_out)


def written(count):
    """Windows that the unquantized model writes behind tokens of the calibration text."""
    kept = folder / f"written-{count}.safetensors"
    if not kept.exists():
        begun = qlab.tokens(model, TEXT, samples=count, length=BEGUN, seed=1).ids
        plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "stop_ids": ()}
        with qlab.pipeline(model, rows=96, max_length=LENGTH, compile="block") as pipe:
            ask = partial(pipe.ask, max_tokens=LENGTH - BEGUN, **plain)
            asked = [ask(prompt, seed=i) for i, prompt in enumerate(begun.tolist())]
            replies = [pipe.wait_for(each) for each in track(asked, "windows")]
        new = torch.tensor([reply.tokens for reply in replies])
        save_file({"ids": torch.cat([begun, new], dim=1)}, kept)
    return load_file(kept)["ids"]


wanted = solved_on + tuned_on
of_text = min(wanted, len(qlab.first_windows(model, TEXT, length=LENGTH).ids))
ids = qlab.tokens(model, TEXT, samples=of_text, length=LENGTH).ids
if wanted > of_text:
    ids = torch.cat([ids, written(wanted - of_text)])


def as_written(quantized):
    """The step that lays down the codes of a directory."""

    def fn(weight):
        return weight.cell.put(quantized.leaf(f"{weight.name}.weight"))

    return qlab.each_cell("as_written", fn, spec=spec)


def figures(quantized):
    """Those of README.md, on the windows that are held out."""
    e = qlab.evaluate(quantized, reference, held_out)
    return {
        "perplexity": e.perplexity,
        "ratio": e.perplexity / e.reference_perplexity,
        "ratio_ci": list(e.ratio_ci),
        "kl": e.kl,
        "kl_ci": list(e.kl_ci),
        "top1": e.top1_agreement,
    }


def quantized(recipe, data, out):
    """A model written to a directory, and its figures with the time that it took."""
    cpu = time.process_time()
    result = qlab.quantize(model, recipe, data, out)
    cpu = time.process_time() - cpu
    written = figures(qlab.open(result.path))
    written |= {"bits_per_weight": result.bits_per_weight, "processor_seconds": cpu}
    return result, {**written, "peak_mib": result.peak_rss_bytes / 2**20}


solved = folder / f"{method}-{spec}-{solved_on}"
kept = folder / f"{solved.name}.json"
if not kept.exists():
    _, before = quantized(METHODS[method](spec), qlab.from_ids(model, ids[:solved_on]), solved)
    kept.write_text(json.dumps(before), encoding="utf-8")
before = json.loads(kept.read_text(encoding="utf-8"))
print(method, before, flush=True)
if tuned_on:
    recipe = qlab.chain(as_written(qlab.open(solved)), getattr(qlab, step)(**settings))
    further = qlab.from_ids(model, ids[solved_on:])
    with TemporaryDirectory(dir=folder) as place:
        result, after = quantized(recipe, further, Path(place) / "tuned")
    site = next(iter(result.sites.values()))
    record = {
        "method": f"{method}+{step}",
        "spec": str(spec),
        "solved_on": solved_on,
        "tuned_on": tuned_on,
        "settings": settings,
        "on_windows_that_chose": {key: site[key] for key in ("kl_before", "kl", "kept_step")},
        "solved": before,
        "tuned": after,
    }
    print(record)
    name = f"{step.replace('_', '-')}-{spec}" + f"-{method}" * (method != qlab.RECOMMENDED)
    out = Path(__file__).parent / "results" / f"{name}.json"
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
