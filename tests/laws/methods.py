"""What the laws run over. A method that rounds every weight adds one line to LAW_METHODS, any other
step one to LAW_STEPS."""

from own_steps import OWN_STEPS
from quick import QUICK

from qlab.algebra.grid import mse, signed, weighted_mse
from qlab.algebra.transform import chain
from qlab.methods.awq import awq_scale
from qlab.methods.gptq import gptq, paper_order
from qlab.methods.rotate import quarot, rotate_heads
from qlab.methods.rtn import rtn
from qlab.methods.smoothquant import smoothquant

LAW_METHODS = {  # name -> (spec -> transform)
    **QUICK,
    "rtn_mse": lambda spec: rtn(spec, mse),
    "rtn_signed": lambda spec: rtn(spec, signed),
    "rtn_weighted_mse": lambda spec: rtn(spec, weighted_mse),
    "gptq_without_sweeps": lambda spec: gptq(spec, sweeps=0),
    "gptq_paper_order": lambda spec: gptq(spec, order=paper_order),
    "awq_scale": awq_scale,
    "rotate_heads": lambda spec: chain(rotate_heads(), rtn(spec)),
    "quarot_gptq": lambda spec: chain(quarot(), gptq(spec)),
    "smoothquant_scale": lambda spec: smoothquant(),
    "smoothquant": lambda spec: chain(smoothquant(), rtn(spec)),
    "smoothquant_gptq": lambda spec: chain(smoothquant(0.3), gptq(spec)),
}
# Masks, leaves and inserts too: the laws of every step.
LAW_STEPS = {**LAW_METHODS, **OWN_STEPS}
# They change producers beside the weights that they round.
MOVING = ("awq", "smoothquant", "rotate", "quarot", "qat")
SCALES = ("awq_scale", "smoothquant_scale")  # round nothing
LAW_SPECS = ("int4-g16", "int3-g32-asym", "int8-channel", "int2-channel-asym", "int5-tensor")
# A rounding, a solver, a solver with another target, a reparametrization.
KINDS = ("rtn", "gptq", "gptaq", "awq")
EVERY_METHOD = ("llama", "gpt2", "qwen3_moe")  # families: linears, transposed ones, experts


def pairs(methods, families):
    """Every method on a family of each kind, and a method of each kind on every family: (method,
    family)."""
    return [(m, f) for f in families for m in methods if m in KINDS or f in EVERY_METHOD]
