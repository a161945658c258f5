"""Where do W8A8 and FP8_DYNAMIC lose: in weights, in which inputs, and how much does a turn of the
inputs give back?

Usage: python experiments/eight_bits.py [windows=4] [NAME NAME ...]

On the demo model, held-out windows of 256 tokens, 4 x 256 calibration tokens. Each row rounds one
part and leaves the rest; "bfloat16" rounds nothing and runs in bfloat16, which bounds what can be
told apart there. Turned inputs are those of R1, R2 and R4 (`rotate_residual`, `quarot`). Writes
results/eight-bits.json row by row; a row that is there of as many windows is not run again.
"""

import json
import sys
from pathlib import Path

import torch

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import read

OUT = Path(__file__).parent / "results" / "eight-bits.json"
READERS = {
    "attention": "re:.*(q|k|v)_proj.*",
    "o_proj": "re:.*o_proj.*",
    "mlp": "re:.*(gate|up)_proj.*",
    "down_proj": "re:.*down_proj.*",
}


def recipes(numbers):
    """The parts of a scheme with a scale for each row and each token."""
    spec = f"{numbers}-channel"
    turned, rounded = qlab.chain(qlab.rotate_residual(), qlab.quarot()), qlab.quantize_inputs(spec)
    parts = {
        "weights, rtn": qlab.rtn(spec),
        "weights, gptq": qlab.METHODS["gptq"](spec),
        "weights, loaq-refined": qlab.METHODS["loaq-refined"](spec),
        "inputs": rounded,
        "inputs, smoothquant": qlab.chain(qlab.smoothquant(), rounded),
        "inputs, turned": qlab.chain(turned, rounded),
    }
    parts |= {f"inputs of {name}": qlab.at(where, rounded) for name, where in READERS.items()}
    return {f"{numbers} {part}": recipe for part, recipe in parts.items()}


def main(*arguments):
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    chosen = [argument for argument in arguments if "=" not in argument]
    windows = int(options.get("windows", 4))
    model = qlab.open("demo")
    data = qlab.tokens(model, [demo_text("calibration")], samples=4, length=256, seed=0)
    held_out = qlab.first_windows(model, [demo_text("heldout")], length=256, count=windows)
    record = {"calibration": "4 x 256", "rows": {}}
    if OUT.is_file():
        record = json.loads(OUT.read_text(encoding="utf-8"))
    rows = record["rows"]
    turned = qlab.chain(qlab.rotate_residual(), qlab.quarot())
    every = {"bfloat16": None, "turned alone": turned, **recipes("int8"), **recipes("fp8")}
    reference = read(model, held_out)
    for name in chosen or every:
        if rows.get(name, {}).get("held_out") == f"{windows} x 256":
            continue
        recipe = every[name]
        if recipe is None:
            reading = read(model, held_out, dtype=torch.bfloat16)
        else:
            reading = qlab.apply(model, recipe, data)
        e = qlab.evaluate(reading, reference, held_out)
        rows[name] = {"held_out": f"{windows} x 256", "kl": e.kl, "kl_ci": list(e.kl_ci)}
        OUT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(name, rows[name], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
