"""qlab: quantization of language models as pure functional transforms over module graphs."""

from qlab.absorb import absorb
from qlab.calibration import Tokens, first_windows, from_ids, tokens
from qlab.errors import QlabError
from qlab.evaluate import evaluate
from qlab.hub import open_model as open
from qlab.lower import inductor_options, lower, to_torchao
from qlab.methods import METHODS
from qlab.methods.awq import awq, awq_scale
from qlab.methods.gptq import gptq
from qlab.methods.grid import GRIDS
from qlab.methods.rtn import rtn
from qlab.plan import plan
from qlab.quantize import compare, quantize
from qlab.spec import Int, Tile, parse_spec
from qlab.transform import at, chain, keep, rules

__all__ = [
    "GRIDS", "METHODS", "Int", "QlabError", "Tile", "Tokens", "absorb", "at", "awq", "awq_scale", "chain", "compare",
    "evaluate", "first_windows", "from_ids", "gptq", "inductor_options", "keep", "lower", "open", "parse_spec", "plan", "quantize",
    "rtn", "rules", "to_torchao", "tokens",
]  # fmt: skip
