"""One paper, one file. METHODS names what the command line and the benches can run: spec ->
transform."""

from collections.abc import Callable, Mapping

from qlab.algebra.spec import Spec
from qlab.algebra.transform import Transform, chain
from qlab.methods.awq import awq, awq_scale
from qlab.methods.gptaq import gptaq
from qlab.methods.gptq import gptq
from qlab.methods.grid import weighted
from qlab.methods.hqq import hqq
from qlab.methods.rtn import rtn


def rtn_weighted(spec: Spec) -> Transform:
    """RTN on the weighted grid."""
    return rtn(spec, weighted)


def awq_gptq(spec: Spec) -> Transform:
    """AWQ's scales, then GPTQ."""
    return chain(awq_scale(spec), gptq(spec))


METHODS: Mapping[str, Callable[[Spec], Transform]] = {
    "rtn": rtn,
    "rtn-weighted": rtn_weighted,
    "hqq": hqq,
    "awq": awq,
    "gptq": gptq,
    "awq-gptq": awq_gptq,
    "gptaq": gptaq,
}
