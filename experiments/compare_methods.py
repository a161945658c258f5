"""Which method loses least? Five recipes share one pass over the reference model; only the table is
kept.

Usage: python experiments/compare_methods.py [MODEL]        (default: demo)
"""

import sys
from tempfile import TemporaryDirectory

import qlab
from qlab.demo.build import demo_text
from qlab.evaluation.perplexity import read

model, spec = qlab.open(sys.argv[1] if len(sys.argv) > 1 else "demo"), qlab.parse_spec("int4-g64")
recipes = {
    "rtn": qlab.rtn(spec),
    "rtn, weighted grid": qlab.rtn(spec, qlab.GRIDS["weighted"]),
    "awq": qlab.awq(spec),
    "gptq": qlab.gptq(spec),
    "awq_scale, gptq": qlab.chain(qlab.awq_scale(spec), qlab.gptq(spec)),
}
calibration = qlab.tokens(model, [demo_text("calibration")], samples=32, length=512)
held_out = qlab.first_windows(model, [demo_text("heldout")], length=512, count=16)
reference = read(model, held_out)

with TemporaryDirectory() as folder:
    results = qlab.compare(model, recipes, calibration, folder, inputs="reference")
    print(
        f"{spec}, {results['rtn'].inputs} inputs: perplexity / reference (95 %, paired), KL, "
        "top-1, bits per weight"
    )
    for name, result in results.items():
        e = qlab.evaluate(qlab.open(result.path), reference, held_out)
        low, high = e.ratio_ci
        print(
            f"{name:20} {e.perplexity / e.reference_perplexity:.4f} ({low:.4f} to {high:.4f})  "
            f"{e.kl:.4f}  {e.top1_agreement:.3f}  {result.bits_per_weight:.2f}"
        )
