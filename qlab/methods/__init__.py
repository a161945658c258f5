"""Methods of quantization, one file per paper.

`METHODS` names those that a spec alone defines, spec -> transform: the choices of `qlab quantize
--method`. `PRUNERS` names the masks that a pattern alone defines ("2:4", or a share of zeros).
`RECOMMENDED` is the name of the one that lost least in experiments/solver.py.

Example:
    >>> import qlab
    >>> list(qlab.METHODS)
    ['rtn', ..., 'gptq-refined', 'qronos-refined']
    >>> [stage.name for stage in qlab.METHODS["awq-gptq"]("int4-g64")]
    ['awq_scale', 'absorb', 'gptq']
"""

from collections.abc import Callable, Mapping

from qlab.algebra.spec import Spec
from qlab.algebra.transform import Transform, chain
from qlab.methods.auto_round import auto_round
from qlab.methods.awq import awq, awq_scale
from qlab.methods.gptaq import gptaq
from qlab.methods.gptq import gptq
from qlab.methods.grid import weighted
from qlab.methods.hqq import hqq
from qlab.methods.magnitude import magnitude
from qlab.methods.qat import qat
from qlab.methods.qronos import aim_held_out
from qlab.methods.rtn import rtn
from qlab.methods.sparsegpt import sparsegpt
from qlab.methods.stages import solver
from qlab.methods.wanda import wanda


def rtn_weighted(spec: Spec) -> Transform:
    """RTN on the weighted grid."""
    return rtn(spec, weighted)


def awq_gptq(spec: Spec) -> Transform:
    """AWQ's scales, then GPTQ."""
    return chain(awq_scale(spec), gptq(spec))


def gptq_refined(spec: Spec) -> Transform:
    """The staged solver alone."""
    return solver(spec)


def qronos_refined(spec: Spec) -> Transform:
    """A target as near to the reference as held-out tokens bear out, then the staged solver."""
    return chain(aim_held_out(), solver(spec))


METHODS: Mapping[str, Callable[[Spec], Transform]] = {
    "rtn": rtn,
    "rtn-weighted": rtn_weighted,
    "hqq": hqq,
    "awq": awq,
    "gptq": gptq,
    "awq-gptq": awq_gptq,
    "gptaq": gptaq,
    "auto_round": auto_round,
    "qat": qat,
    "gptq-refined": gptq_refined,
    "qronos-refined": qronos_refined,
}
PRUNERS: Mapping[str, Callable[[str | float], Transform]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
}
RECOMMENDED = "qronos-refined"
