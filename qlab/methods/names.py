"""Recipes by name: a name of METHODS, or steps and a rounding in a row with "+" between them.

    sparsegpt-2:4+gptq        smoothquant-0.6+rtn+inputs-int8-token        quarot+gptq+eora-64

Behind the name of a step stands what it takes. A method of METHODS may be a row of steps itself;
within a row `smoothquant` is the step alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from qlab.algebra.bind import Bind
from qlab.algebra.spec import Spec, parse_spec
from qlab.algebra.transform import Transform, chain
from qlab.errors import QlabError
from qlab.methods import METHODS
from qlab.methods.auto_round import auto_round_refine
from qlab.methods.autoawq import awq_clip
from qlab.methods.awq import awq_scale
from qlab.methods.centre_keys import centre_keys
from qlab.methods.eora import eora
from qlab.methods.gptaq import aim_at_reference
from qlab.methods.inputs import absmax, quantize_inputs
from qlab.methods.kl_tune import kl_tune
from qlab.methods.kv import attention_inputs, kv_cache, parse_cache_spec
from qlab.methods.kv_clipped import kv_clipped
from qlab.methods.loaq import aim_in_stream
from qlab.methods.lqer import RANK, l2qer, lqer
from qlab.methods.magnitude import magnitude
from qlab.methods.qat_end_to_end import qat_end_to_end
from qlab.methods.qronos import aim_held_out
from qlab.methods.rotate import incoherence, quarot, rotate_heads, rotate_online
from qlab.methods.rotate_residual import rotate_residual
from qlab.methods.rotate_scores import rotate_scores
from qlab.methods.smoothquant import smoothquant
from qlab.methods.sparsegpt import sparsegpt
from qlab.methods.spinquant import spinquant
from qlab.methods.wanda import wanda


@dataclass(frozen=True)
class Step:
    """A step of a row. make(text, spec) -> its transform, where text is what stands behind its
    name. takes: an example of that; "" where it takes nothing. usual: what it is given where
    nothing stands there; None where something has to."""

    make: Callable[[str, Spec], Transform]
    takes: str = ""
    usual: str | None = ""


def _plain(make: Callable[[], Transform]) -> Step:
    """A step that takes nothing."""
    return Step(lambda text, spec: make())


def _pruning(make: Callable[[str], Transform]) -> Step:
    return Step(lambda text, spec: make(text), "2:4", None)


def _values(make: Callable[[str], Transform]) -> Step:
    """A step that rounds values at run time, to the spec behind its name."""
    return Step(lambda text, spec: make(text), "int8-token", None)


def _input_spec(text: str) -> Spec:
    """The spec of inputs, of which -token is another word for -channel."""
    return parse_spec(text.replace("-token", "-channel"))


def _thin(make: Callable[[int], Transform]) -> Step:
    """A step that puts a low rank beside codes, of the rank behind its name."""
    return Step(lambda text, spec: make(_rank(text)), "64", usual=str(RANK))


def _rank(text: str) -> int:
    if not text.isdecimal():
        raise QlabError(f"the rank {text!r} is no whole number; write eora-{RANK}, or eora")
    return int(text)


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise QlabError(
            f"{name}-{text} gives {name} {text!r}, which is no number; write {name}-0.5, or {name}"
        ) from error


# One line for each step, in the order in which they usually come.
STEPS: Mapping[str, Step] = {
    "smoothquant": Step(
        lambda text, spec: smoothquant(_number(text, "smoothquant")), "0.5", usual="0.5"
    ),
    "awq_scale": Step(
        lambda text, spec: awq_scale(spec, inputs=_input_spec(text) if text else None),
        "int8-token",
        usual="",
    ),
    "awq_clip": Step(lambda text, spec: awq_clip(spec)),
    "quarot": _plain(quarot),
    "spinquant": Step(
        lambda text, spec: spinquant(spec, _input_spec(text) if text else None),
        "int8-token",
        usual="",
    ),
    "rotate_residual": _plain(rotate_residual),
    "rotate_heads": _plain(rotate_heads),
    "rotate_online": _plain(rotate_online),
    "rotate_scores": _plain(rotate_scores),
    "centre_keys": _plain(centre_keys),
    "quip": _plain(incoherence),
    "magnitude": _pruning(magnitude),
    "wanda": _pruning(wanda),
    "sparsegpt": _pruning(sparsegpt),
    "aim_at_reference": _plain(aim_at_reference),
    "aim_held_out": _plain(aim_held_out),
    "aim_in_stream": _plain(aim_in_stream),
    "auto_round_refine": _plain(auto_round_refine),
    "kl_tune": _plain(kl_tune),
    "qat_end_to_end": _plain(qat_end_to_end),
    "lqer": _thin(lqer),
    "l2qer": _thin(l2qer),
    "eora": _thin(eora),
    "inputs": _values(lambda text: quantize_inputs(_input_spec(text))),
    "static_inputs": Step(
        lambda text, spec: quantize_inputs(_input_spec(text), absmax), "int8-tensor", None
    ),
    "kv": _values(lambda text: kv_cache(parse_cache_spec(text))),
    "kv_clipped": _values(lambda text: kv_clipped(parse_cache_spec(text))),
    "attention": _values(lambda text: attention_inputs(parse_cache_spec(text))),
}


def method(name: str, spec: Spec) -> Transform:
    """A recipe by its name: one of METHODS, or steps and a rounding with "+" between them.

    Args:
        name: such as "gptq", "sparsegpt-2:4+gptq" or "quarot+gptq+kv-int8-token".
            Behind the name of a step stands what it takes: a share, a pattern, a rank, a spec. The
            steps are those of `qlab.methods.names.STEPS`.
        spec: what the weights are rounded to, or its name such as "int4-g64".

    Returns:
        The transform.

    Raises:
        QlabError: a name is unknown, a step lacks what it takes, or no step rounds weights.

    Example:
        >>> import qlab
        >>> [stage.name for stage in qlab.method("sparsegpt-2:4+gptq", "int4-g64")]
        ['sparsegpt', 'gptq']
    """
    return method_named(name)(spec)


def method_named(name: str) -> Callable[[Spec], Transform]:
    """The method of that name: spec -> transform. Refuses names and what steps take before it is
    called."""
    if name in METHODS:
        return METHODS[name]
    return partial(_row, name, [_part(part, name) for part in name.split("+")])


def _row(name: str, parts: list[Callable[[Spec], Transform]], spec: Spec) -> Transform:
    transform = chain(*(part(spec) for part in parts))
    if not any(stage.spec or isinstance(stage, Bind) for stage in transform):
        raise QlabError(
            f"{name!r} rounds no weights; put a rounding into the row, such as {name}+rtn or "
            f"{name}+gptq"
        )
    return transform


def _part(part: str, name: str) -> Callable[[Spec], Transform]:
    """One part of a row: a step with what it takes, or a method."""
    step, _, text = part.partition("-")
    if step in STEPS:
        return partial(STEPS[step].make, _taken(step, text))
    if part in METHODS:
        return METHODS[part]
    within = "" if part == name else f" in {name!r}"
    raise QlabError(
        f"method {part!r} is unknown{within}; known are {', '.join(METHODS)}, and in rows with "
        f"'+' the steps {', '.join(STEPS)}"
    )


def _taken(name: str, text: str) -> str:
    """What a step is given; refuses what it does not take, and that nothing is given."""
    step = STEPS[name]
    if text and not step.takes:
        raise QlabError(f"{name}-{text}: {name} takes nothing behind its name; write {name}")
    if not text and step.usual is None:
        raise QlabError(f"{name} lacks what it takes; write for example {name}-{step.takes}")
    return text or step.usual or ""
