"""What the laws run over. A method that rounds every weight adds one line to LAW_METHODS, any other
step one to LAW_STEPS."""

import torch
from newcomer_steps import NEWCOMER_STEPS
from own_steps import OWN_STEPS
from quick import QUICK, WHOLE
from reader_steps import READER_STEPS

from qlab.algebra.grid import mse, signed, weighted_mse
from qlab.algebra.statistic import Stat
from qlab.algebra.transform import chain
from qlab.methods.awq import awq_scale
from qlab.methods.gptq import gptq, paper_order
from qlab.methods.guidedquant import added, weighted
from qlab.methods.rotate import quarot, rotate_heads
from qlab.methods.rtn import rtn
from qlab.methods.smoothquant import smoothquant
from qlab.methods.stages import Metric, solver


def _by_token(o):
    """Two groups of rows, to which tokens count differently."""
    return weighted(o.x_nk, torch.stack([1 + o.keys % 3, 1 + o.keys % 5], 1).float())


BY_TOKEN = Stat(_by_token, added, name="by_token")
IN_GROUPS = Metric("in_groups", frozenset({BY_TOKEN}), lambda stats: stats["by_token"].mean_gkk)

LAW_METHODS = {  # name -> (spec -> transform)
    **{name: method for name, method in QUICK.items() if name not in WHOLE},
    "quarot_of_blocks": lambda spec: chain(quarot(), gptq(spec)),
    "rtn_mse": lambda spec: rtn(spec, mse),
    "rtn_signed": lambda spec: rtn(spec, signed),
    "rtn_weighted_mse": lambda spec: rtn(spec, weighted_mse),
    "gptq_without_sweeps": lambda spec: gptq(spec, sweeps=0),
    "gptq_paper_order": lambda spec: gptq(spec, order=paper_order),
    "solver_in_groups": lambda spec: solver(spec, metric=IN_GROUPS),
    "awq_scale": awq_scale,
    "rotate_heads": lambda spec: chain(rotate_heads(), rtn(spec)),
    "smoothquant_scale": lambda spec: smoothquant(),
    "smoothquant_gptq": lambda spec: chain(smoothquant(0.3), gptq(spec)),
}
# Masks, leaves and inserts too: the laws of every step.
LAW_STEPS = {**LAW_METHODS, **OWN_STEPS, **NEWCOMER_STEPS, **READER_STEPS}
# They change producers beside the weights that they round.
MOVING = ("awq", "autoawq", "llmcompressor", "smoothquant", "rotate", "quarot", "quip", "qat")
UNROUNDED = ("awq_scale", "smoothquant_scale", "kv")  # round no weights
ONLINE = ("quarot_of_blocks", "quip")  # leave operations on inputs
BESIDE = ("lqer", "l2qer", "eora")  # leave a low rank beside the codes
PRUNED = ("magnitude-2:4", "wanda-2:4", "sparsegpt-2:4")
LAW_SPECS = ("int4-g16", "int3-g32-asym", "int8-channel", "int2-channel-asym", "int5-tensor")
# A rounding, a solver, a solver with another target, a reparametrization.
KINDS = ("rtn", "gptq", "gptaq", "awq")
EVERY_METHOD = ("llama", "gpt2", "qwen3_moe")  # families: linears, transposed ones, experts


# Rows of steps, each of which is under the laws itself.
IN_ROWS = (
    "imatrix",
    "smoothquant",
    "quarot_of_blocks",
    "quip",
    *PRUNED,
    "auto_round_refine",
    *BESIDE,
    "kv",
    *READER_STEPS,
)


def in_turn(methods, families):
    """Every method on every spec, of the families in turn, and rows of steps on one spec, of every
    family: (method, spec, family)."""
    cases = []
    for m in methods:
        specs = LAW_SPECS[:1] * len(families) if m in IN_ROWS else LAW_SPECS
        cases += [(m, text, families[i % len(families)]) for i, text in enumerate(specs)]
    return cases


def pairs(methods, families):
    """Every method on a family of each kind, and a method of each kind on every family: (method,
    family)."""
    return [(m, f) for f in families for m in methods if m in KINDS or f in EVERY_METHOD]
