"""Methods of quantization, one file per paper.

`METHODS` names those that a spec alone defines, spec -> transform: the choices of `qlab quantize
--method`. `qlab.methods.names` names the steps that compose with them in rows. `PRUNERS` names the
masks that a pattern alone defines ("2:4", or a share of zeros). `RECOMMENDED` is the name of the
one that lost least in experiments/solver.py.

Example:
    >>> import qlab
    >>> list(qlab.METHODS)
    ['rtn', ..., 'qronos-refined', ..., 'kv']
    >>> [stage.name for stage in qlab.METHODS["awq-gptq"]("int4-g64")]
    ['awq_scale', 'absorb', 'gptq']
"""

from collections.abc import Callable, Mapping

from qlab.algebra.spec import Spec
from qlab.algebra.transform import Transform, chain
from qlab.methods.auto_round import auto_round, auto_round_refine
from qlab.methods.autoawq import autoawq, llmcompressor_awq
from qlab.methods.awq import awq, awq_scale
from qlab.methods.eora import eora
from qlab.methods.gptaq import gptaq
from qlab.methods.gptq import gptq
from qlab.methods.grid import imatrix, weighted
from qlab.methods.guidedquant import guidedquant
from qlab.methods.hqq import hqq
from qlab.methods.kv import cache_spec, kv_cache
from qlab.methods.loaq import aim_in_stream
from qlab.methods.lqer import l2qer, lqer
from qlab.methods.magnitude import magnitude
from qlab.methods.qat import qat
from qlab.methods.qronos import aim_held_out
from qlab.methods.rotate import incoherence, quarot
from qlab.methods.rotate_residual import rotate_residual
from qlab.methods.rtn import rtn
from qlab.methods.smoothquant import smoothquant
from qlab.methods.sparsegpt import sparsegpt
from qlab.methods.spinquant import spinquant
from qlab.methods.stages import ALTERNATED, attended, solver
from qlab.methods.wanda import wanda


def rtn_weighted(spec: Spec) -> Transform:
    """RTN on the weighted grid."""
    return rtn(spec, weighted)


def rtn_imatrix(spec: Spec) -> Transform:
    """RTN on the range of least error by the importance matrix."""
    return rtn(spec, imatrix)


def awq_gptq(spec: Spec) -> Transform:
    """AWQ's scales, then GPTQ."""
    return chain(awq_scale(spec), gptq(spec))


def gptq_refined(spec: Spec) -> Transform:
    """The staged solver alone."""
    return solver(spec)


def qronos_refined(spec: Spec) -> Transform:
    """A target as near to the reference as held-out tokens bear out, then the staged solver."""
    return chain(aim_held_out(), solver(spec))


def loaq_refined(spec: Spec) -> Transform:
    """A target that also makes up for the drift of the residual stream, then the staged solver by a
    metric that tokens with much attention weigh more in, more damped since tokens are few."""
    solved = solver(spec, refine=ALTERNATED[:2], damp=0.1, metric=attended)
    return chain(aim_in_stream(), solved)


def smoothquant_rtn(spec: Spec) -> Transform:
    """SmoothQuant's scales at alpha 0.5, then RTN."""
    return chain(smoothquant(), rtn(spec))


def quarot_gptq(spec: Spec) -> Transform:
    """QuaRot: hidden states in another basis between all blocks (R1), heads and inputs turned in
    each (R2, R4), then GPTQ."""
    return chain(rotate_residual(), quarot(), gptq(spec))


def spinquant_gptq(spec: Spec) -> Transform:
    """SpinQuant's learned rotations of hidden states and heads, then GPTQ."""
    return chain(spinquant(spec), gptq(spec))


def quip(spec: Spec) -> Transform:
    """QuIP: random orthogonal matrices at every input, then GPTQ, which is its LDLQ."""
    return chain(incoherence(), gptq(spec))


def magnitude_rtn(spec: Spec) -> Transform:
    """2 of every 4 weights, the larger ones, and RTN of those."""
    return chain(magnitude("2:4"), rtn(spec))


def wanda_gptq(spec: Spec) -> Transform:
    """Wanda at 2:4, and GPTQ on what is kept."""
    return chain(wanda("2:4"), gptq(spec))


def sparsegpt_gptq(spec: Spec) -> Transform:
    """SparseGPT at 2:4, and GPTQ of zeros and codes together."""
    return chain(sparsegpt("2:4"), gptq(spec))


def gptq_auto_round(spec: Spec) -> Transform:
    """GPTQ, and AutoRound from its codes on."""
    return chain(gptq(spec), auto_round_refine())


def rtn_lqer(spec: Spec) -> Transform:
    """RTN, and LQER's low rank beside it."""
    return chain(rtn(spec), lqer())


def rtn_l2qer(spec: Spec) -> Transform:
    """RTN, and L2QER's low rank beside it, of scaled inputs."""
    return chain(rtn(spec), l2qer())


def gptq_eora(spec: Spec) -> Transform:
    """GPTQ, and EoRA's low rank beside it."""
    return chain(gptq(spec), eora())


def kv(spec: Spec) -> Transform:
    """Cached keys and values rounded to the spec, of which -channel is a scale per token; weights
    stay."""
    return kv_cache(cache_spec(spec))


# One line for each method. Their names are repeated in `qlab.cli.options`, for help without torch.
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
    "loaq-refined": loaq_refined,
    "guidedquant": guidedquant,
    "imatrix": rtn_imatrix,
    "autoawq": autoawq,
    "llmcompressor-awq": llmcompressor_awq,
    "smoothquant": smoothquant_rtn,
    "quarot": quarot_gptq,
    "spinquant": spinquant_gptq,
    "quip": quip,
    "magnitude-2:4": magnitude_rtn,
    "wanda-2:4": wanda_gptq,
    "sparsegpt-2:4": sparsegpt_gptq,
    "auto_round_refine": gptq_auto_round,
    "lqer": rtn_lqer,
    "l2qer": rtn_l2qer,
    "eora": gptq_eora,
    "kv": kv,
}
PRUNERS: Mapping[str, Callable[[str | float], Transform]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
}
RECOMMENDED = "loaq-refined"
