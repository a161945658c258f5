"""What the laws run over. A new method adds one line to LAW_METHODS."""

from qlab.methods.awq import awq, awq_scale
from qlab.methods.gptq import gptq, paper_order
from qlab.methods.grid import mse, signed, weighted, weighted_mse
from qlab.methods.rtn import rtn

LAW_METHODS = {  # name -> (spec -> transform)
    "rtn": rtn,
    "rtn_mse": lambda spec: rtn(spec, mse),
    "rtn_signed": lambda spec: rtn(spec, signed),
    "rtn_weighted_mse": lambda spec: rtn(spec, weighted_mse),
    "rtn_weighted": lambda spec: rtn(spec, weighted),
    "gptq": gptq,
    "gptq_paper_order": lambda spec: gptq(spec, order=paper_order),
    "awq": awq,
    "awq_scale": awq_scale,
}
LAW_SPECS = ("int4-g16", "int3-g32-asym", "int8-channel", "int2-channel-asym", "int5-tensor")
