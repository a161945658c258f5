"""A cache whose ranges are clipped: of every token's range, or that of its groups, the share is
used that had the least squared error on the calibration data.

    share = argmin_p sum_n |round_p(x_n) - x_n|^2

with round_p the rounding of `kv_cache` whose ranges reach from p * lowest to p * highest. With few
bits the largest number of a token, which most others lie far below, makes all steps wide; cutting
it a little costs less. Scales still come from each token. Legend: x_nk sampled tokens.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qlab.algebra.grid import SHRINK
from qlab.algebra.insert import insert
from qlab.algebra.online import QuantizeClipped
from qlab.algebra.spec import Spec
from qlab.algebra.transform import Transform
from qlab.algebra.wires import Wire
from qlab.errors import QlabError
from qlab.methods.kv import CacheSpec, refuse_split

SHARES = (1.0, *SHRINK)


def kv_clipped(spec: CacheSpec) -> Transform:
    """`kv_cache` with ranges of which as large a share is used as loses least: each attention has
    one share for its keys and one for its values, chosen on the calibration data.

    Args:
        spec: "int4-token", "int4-g32" and alike, whose scales come from each token. A static scale
            is measured so by `kv_cache(spec, static="least_error")`.

    Returns:
        A transform of one stage. It needs calibration data. No format has a place for it, so a plan
        refuses to write it; `qlab.apply` evaluates it.

    Raises:
        QlabError: the spec has static scales, or a scale would cover several tokens, or groups do
            not divide the channels of a head.

    Example:
        >>> import qlab
        >>> (stage,) = qlab.kv_clipped("int4-token")
        >>> stage.name, stage.detail, sorted(stage.needs)
        ('kv_clipped', 'int4-channel', ['sample'])
    """
    if spec.static:
        raise QlabError(
            f"kv_clipped chooses a share of the range of every token, and {spec} has scales that "
            'are stored; use kv_cache(spec, static="least_error"), or a scale per token or group'
        )

    def make(wire: Wire, stats: Mapping[str, Any]) -> QuantizeClipped:
        refuse_split(wire, spec.spec)
        return clipped_to(spec.of_heads(wire.heads, wire.channels), stats["sample"].x_nk)

    form = QuantizeClipped(spec.spec, 1.0)
    return insert("kv_clipped", "re:.*:(key|value)", make, {"sample"}, (form,), str(spec))


def clipped_to(spec: Spec, x_nk: Tensor) -> QuantizeClipped:
    """The rounding of a wire with the share that loses least on these tokens."""
    roundings = [QuantizeClipped(spec, share) for share in SHARES]
    # min takes the first of equals, which is the whole range
    return min(roundings, key=lambda rounding: error(rounding, x_nk))


def error(rounding: QuantizeClipped, x_nk: Tensor) -> float:
    """sum |round(x) - x|^2."""
    return float((rounding(x_nk) - x_nk).square().sum())
