"""Activation quantization: the inputs of linear layers are rounded to nearest at run time
(`online.QuantizeInput`).

Dynamic scales come from each x. Static ones are measured on calibration data by a `Range`, and are
stored. `RANGES` holds those by name.

    absmax: the whole range of what was seen.
    quantile: the range of 99.9 % of the sampled numbers; `quantile` makes others.
    least_error: of the sampled range and the same shrunken in steps of 5 % to half, the one with
        the least squared error. Of NVFP4's global scale: of the whole range and its shrunken ones,
        the one with the least squared error behind the scales of groups.

Example:
    >>> import qlab
    >>> list(qlab.RANGES)
    ['absmax', 'quantile', 'least_error']
    >>> qlab.quantize_inputs("fp8-tensor", qlab.RANGES["least_error"])[0].detail
    'fp8-tensor static'
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.grid import encode, fit, minmax, mse
from qlab.algebra.insert import insert
from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import Float, Spec
from qlab.algebra.stats import STATS
from qlab.algebra.tile import Tile
from qlab.algebra.transform import Transform
from qlab.algebra.wires import Wire
from qlab.errors import QlabError

DYNAMIC = (
    "use an input spec whose scales are found at run time (mxfp4, fp8-channel), or leave them "
    "out of quantize_inputs"
)


@dataclass(frozen=True)
class Range:
    """How a stored scale is found.

    needs: those statistics. fit: (statistics by name, spec) -> scales [1, g] and zeros [1, g] or
    None, of the g tiles that lie side by side over the channels. largest: (statistics, spec) -> the
    number that gets the largest scale under a global one; None takes the range that `fit` finds for
    one scale.
    """

    name: str
    needs: frozenset[str]
    fit: Callable[[Mapping[str, Any], Spec], tuple[Tensor, Tensor | None]]
    largest: Callable[[Mapping[str, Any], Float], Tensor] | None = None


def _absmax(stats: Mapping[str, Any], spec: Spec) -> tuple[Tensor, Tensor | None]:
    """The lowest and the highest number that was seen of each channel, as two rows."""
    return fit(minmax, torch.stack(stats["minmax"]), spec)


def _least_error(stats: Mapping[str, Any], spec: Spec) -> tuple[Tensor, Tensor | None]:
    return fit(mse, stats["sample"].x_nk, spec)


def _largest_of_least_error(stats: Mapping[str, Any], spec: Float) -> Tensor:
    """Scales of groups follow the numbers, so that a smaller range only clips groups above it: the
    largest number of each channel is a row of the sample, which may have missed it."""
    highest_k = stats["absmax"]
    x_nk = torch.cat([stats["sample"].x_nk, highest_k[None]])
    tried = [highest_k.amax() * (1 - shrunken / 20) for shrunken in range(11)]
    errors = [_error(x_nk, spec, largest) for largest in tried]
    return tried[errors.index(min(errors))]


def _error(x_nk: Tensor, spec: Float, largest: Tensor) -> float:
    """The squared error of x with this number as the largest under the global scale."""
    rounded = encode(minmax, x_nk, spec, outer=spec.global_scale(largest)).dense()
    return float((rounded - x_nk).square().sum())


def quantile(share: float) -> Range:
    """The range in which this share of the sampled numbers under one scale lies: |x| of symmetric
    specs, either end of others."""
    if not 0.5 < share <= 1:
        raise QlabError(f"a quantile of {share} is no range; give a share above 0.5, up to 1")

    def clipped(stats: Mapping[str, Any], spec: Spec) -> tuple[Tensor, Tensor | None]:
        x_nk = stats["sample"].x_nk
        x_1gn = spec.tile.split(x_nk)
        ordered = (x_1gn.abs() if spec.symmetric else x_1gn).sort(-1).values
        last = ordered.shape[-1] - 1
        high = ordered[..., round(last * share), None]
        low = -high if spec.symmetric else ordered[..., round(last * (1 - share)), None]
        return fit(minmax, spec.tile.join(x_1gn.clamp(low, high), x_nk.shape), spec)

    return Range(f"quantile {share}", frozenset({"sample"}), clipped)


absmax = Range("absmax", frozenset({"minmax"}), _absmax)
least_error = Range(
    "least_error", frozenset({"sample", "absmax"}), _least_error, _largest_of_least_error
)
RANGES = {"absmax": absmax, "quantile": quantile(0.999), "least_error": least_error}


def quantize_inputs(spec: Spec, static: Range | None = None) -> Transform:
    """Round the input of every selected site at run time.

    Chain it behind the rounding of weights, whose statistics are those of inputs that are not
    rounded. NVFP4's global scale is stored beside the weight. It is measured on the calibration
    data, so that the largest input gets the largest scale.

    Args:
        spec: Its tiles lie over [tokens, channels], so that fp8-channel has one scale per token.
        static: How the one scale of an int8-tensor or fp8-tensor, or NVFP4's global scale, is
            measured beforehand: a name in RANGES, or a Range. None: scales come from each x. Fused
            experts share one, measured on the rows of all.

    Returns:
        A transform of one stage.

    Raises:
        QlabError: A static scale is asked for, and the spec has several for an input.

    Example:
        >>> import qlab
        >>> (stage,) = qlab.quantize_inputs("int8-tensor", static="absmax")
        >>> stage.detail, sorted(stage.needs)
        ('int8-tensor static', ['minmax'])
    """
    if static and not spec.outer and spec.tile != Tile(None, None):
        raise QlabError(
            f"inputs {spec} have several scales, and one is stored; use {_of_tensor(spec)}, or "
            "leave static away"
        )
    needs = static.needs if static else frozenset({"absmax"} if spec.outer else ())

    def make(wire: Wire, stats: Mapping[str, Any]) -> QuantizeInput:
        assert wire.site is not None
        seen = _of_all_experts(stats) if wire.site.route else stats
        return rounding(spec, static, seen, wire.where)

    form = QuantizeInput(spec, outer=torch.ones(1, dtype=torch.float32) if spec.outer else None)
    if static and not spec.outer:
        form = static_form(spec)
    return insert("quantize_inputs", "*:in", make, needs, (form,), str(form.input_spec))


def _of_all_experts(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics of the rows of a mixture whichever expert they are routed to: one stored scale is
    for the inputs of all, as kernels of fused experts take one."""
    return {name: reduce(STATS[name].combine, state.states) for name, state in stats.items()}


def rounding(
    spec: Spec, static: Range | None, stats: Mapping[str, Any], where: str = "the input"
) -> QuantizeInput:
    """The rounding of one input with these statistics. Refuses a scale of what no token reached.
    where: the name of its wire."""
    if (static or spec.outer) and not _reached(stats):
        raise QlabError(
            f"no token of the calibration data reached {where}, or only zeros did, so that its "
            f"stored scale would be 0; calibrate on more text, or {DYNAMIC}"
        )
    if isinstance(spec, Float) and spec.outer:
        if static is None:
            return QuantizeInput(spec, outer=spec.global_scale(stats["absmax"].amax()))
        return QuantizeInput(spec, outer=spec.global_scale(_largest(static, stats, spec)))
    if static is None:
        return QuantizeInput(spec)
    scales, zeros = static.fit(stats, spec)
    return QuantizeInput(spec, scales, zeros)


def _largest(static: Range, stats: Mapping[str, Any], spec: Float) -> Tensor:
    if static.largest is not None:
        return static.largest(stats, spec)
    whole = Float(spec.exponent, spec.mantissa, Tile(None, None))
    scales, _ = static.fit(stats, whole)
    return scales.amax() * whole.reach


def _reached(stats: Mapping[str, Any]) -> bool:
    """Whether any number but 0 was seen; True where the statistics do not say."""
    if "minmax" in stats:
        low, high = stats["minmax"]
        return bool(((low <= high) & ((low != 0) | (high != 0))).any())
    if "absmax" in stats:
        return bool(stats["absmax"].any())
    return "sample" not in stats or bool(stats["sample"].x_nk.any())


def static_form(spec: Spec) -> QuantizeInput:
    """A static rounding as a codec is asked about it."""
    zeros = None if spec.symmetric else torch.zeros(1, 1, dtype=torch.int8)
    return QuantizeInput(spec, torch.ones(1, 1, dtype=torch.float32), zeros)


def _of_tensor(spec: Spec) -> Spec:
    return replace(spec, tile=Tile(None, None))
