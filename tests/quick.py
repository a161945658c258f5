"""The methods of the command line, with few steps where they learn, and with a spec for keys and
values that their heads can have."""

from qlab.algebra.transform import chain
from qlab.methods import METHODS
from qlab.methods.auto_round import auto_round, auto_round_refine
from qlab.methods.gptq import gptq
from qlab.methods.kv import kv_cache, parse_cache_spec
from qlab.methods.qat import qat
from qlab.methods.spinquant import spinquant

INSTEAD = {
    "auto_round": lambda spec: auto_round(spec, steps=2, windows=2),
    "auto_round_refine": lambda spec: chain(gptq(spec), auto_round_refine(steps=2, windows=2)),
    "kv": lambda spec: kv_cache(parse_cache_spec("int8-token")),
    "qat": lambda spec: qat(spec, steps=2, windows=2),
    "spinquant": lambda spec: chain(spinquant(spec, steps=1), gptq(spec)),
}
QUICK = {**METHODS, **INSTEAD}
# What they leave has no place in the formats of GPTQ: operations at run time, low ranks.
UNHELD = ("quarot", "quip", "lqer", "l2qer", "eora", "kv")
# They turn or measure the whole model, which not every family lets them.
WHOLE = ("quarot", "spinquant", "guidedquant")
WRITTEN = {name: method for name, method in QUICK.items() if name not in (*UNHELD, *WHOLE)}
# Those that leave no zeros in a pattern, whose errors are larger.
ROUNDING = {name: WRITTEN[name] for name in WRITTEN if not name.endswith("2:4")}
