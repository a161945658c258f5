"""KL tuning: scales, norms and biases learned end to end with codes frozen, so that formats and
shapes stay (the second phase of EfficientQAT, Chen et al. 2024, with a divergence as its loss).

    minimize  mean over tokens of KL(p_reference || p_quantized)   over m
    s = stored(s0 (1 + m + r))       v = stored(v0 + mean|v0| m)

Legend: s the scales of codes, v a norm's gain or a bias, m how far either has moved, relative to
its size, r how far all scales of a row have; stored(x) rounds to the dtype in which files hold it,
and gradients pass straight through. Adam moves every number alike, however sure its gradient is. A
row's, the sum over its scales, is surer than any of theirs, so that r saves steps.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.bind import Outline
from qlab.algebra.graph import ModuleGraph
from qlab.algebra.leaf import Sum, proper
from qlab.algebra.learn_whole import Relaxed, Schedule, learner, rounded, vectors
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import scales_of
from qlab.algebra.transform import Transform
from qlab.algebra.variables import Stored
from qlab.errors import QlabError

NAME = "kl_tune"
WARM_UP = 0.1  # of the steps


# ------------------------------------------------------------------ what is learned
def _codes(graph: ModuleGraph) -> dict[str, QTensor]:
    """The codes of a segment, by leaf."""
    codes = rounded(graph)
    for name, q in codes.items():
        if q.scales.dtype == torch.float8_e8m0fnu:
            raise QlabError(
                f"{graph.path}.{name} is rounded to {q.spec}, whose scales are powers of two, and "
                "kl_tune moves scales by less than that; use it behind another spec, or leave it "
                "away"
            )
    return codes


def moved_vector(graph: ModuleGraph, name: str, move: Tensor) -> Tensor:
    """v after a move, in fp32, as stored."""
    v = graph.params[name].float()
    size = v.abs().mean().clamp_min(1e-8)
    return Stored.apply(v + size * move, graph.stored_dtype(name))


def _moved_scales(q: QTensor, move: Tensor, of_rows: Tensor | None) -> Tensor:
    """s after the moves of each and of its row, in fp32, as stored."""
    total = move if of_rows is None else move + of_rows
    return Stored.apply(q.scales.float() * (1 + total), q.scales.dtype)


def _rows(name: str) -> str:
    """The name of what all scales of a row move by."""
    return f"{name} rows"


def with_leaves(graph: ModuleGraph, leaves: Mapping[str, Any]) -> ModuleGraph:
    """The segment with some leaves replaced, whose targets stay."""
    return replace(graph, params={**graph.params, **leaves})


def _with_scales(leaf: Any, scales: Tensor) -> Any:
    """A leaf of codes with other scales."""
    if isinstance(leaf, Sum):
        return Sum((_with_scales(leaf.parts[0], scales), *leaf.parts[1:]))
    return replace(leaf, scales=scales)


def _shapes(graph: ModuleGraph) -> dict[str, tuple[int, ...]]:
    scales = {name: q.scales for name, q in _codes(graph).items()}
    rows = {_rows(name): s[..., :1] for name, s in scales.items() if s.shape[-1] > 1}
    moving = {**vectors(graph), **scales, **rows}
    return {f"{graph.path}.{name}": tuple(t.shape) for name, t in moving.items()}


def _moved(graph: ModuleGraph, moves: Mapping[str, Tensor]) -> ModuleGraph:
    leaves: dict[str, Any] = {}
    for name, v in vectors(graph).items():
        leaves[name] = moved_vector(graph, name, moves[f"{graph.path}.{name}"]).to(v.dtype)
    for name, q in _codes(graph).items():
        full = f"{graph.path}.{name}"
        scales = _moved_scales(q, moves[full], moves.get(_rows(full)))
        leaves[name] = _with_scales(graph.params[name], scales)
    return with_leaves(graph, leaves)


def _stored(graph: ModuleGraph, moves: Mapping[str, Tensor]) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, leaf in _moved(graph, moves).params.items():
        full = f"{graph.path}.{name}"
        if not any(moves[key].any() for key in (full, _rows(full)) if key in moves):
            continue  # keeps its bits
        leaves[name] = leaf
        if not isinstance(leaf, Tensor):
            dtype = proper(graph.params[name]).scales.dtype
            leaves[name] = _with_scales(leaf, proper(leaf).scales.to(dtype))
    return leaves


def _count(outline: Outline) -> int:
    """The scales; norms and biases are few."""
    rounded = outline.rounded or {}
    return sum(scales_of(spec, outline.shapes[name]) for name, spec in rounded.items())


RELAXED = Relaxed(shapes=_shapes, moved=_moved, stored=_stored, count=_count, copies=3)


def kl_tune(
    steps: int = 64, rate: float = 0.001, windows: int = 2, held_out: float = 0.125
) -> Transform:
    """KL tuning: learn scales, norms and biases end to end, with codes frozen.

    It lowers the KL divergence from the unquantized model over the calibration windows, behind the
    method that rounds: `chain(gptq(spec), kl_tune())`. Formats and shapes stay as they are. The
    model runs in bfloat16 where it is stored so, else in fp32, one block in memory at a time.

    Args:
        steps: how many steps of Adam; with 0 nothing moves.
        rate: how far a scale, gain or bias moves in a step, relative to its size, at most about; a
            scale twice as far, once by itself and once with its row. It rises over the first tenth
            of the steps, and falls linearly to 0.
        windows: how many windows a step sees. The gradient of one is mostly noise.
        held_out: the share of the calibration windows that nothing is learned from. They choose the
            state that is kept.

    Returns:
        A transform of one stage, a `bind`. It needs at least two windows of calibration data. On
        the windows held out what it keeps never has a larger divergence than what it started from.

    Raises:
        QlabError: an argument is out of its range; or, when it is measured, no weight is rounded in
            front of it, or one to a spec whose scales are powers of two.

    Source:
        Chen et al. 2024, EfficientQAT: Efficient Quantization-Aware Training for Large Language
        Models (end-to-end training of quantization parameters).

    Example:
        >>> import qlab
        >>> recipe = qlab.chain(qlab.rtn("int4-g64"), qlab.kl_tune(steps=2))
        >>> data = qlab.tokens("demo", "my.jsonl", samples=2, length=16)
        >>> qlab.apply("demo", recipe, data).bits_per_weight
        4.25
    """
    schedule = Schedule(steps=steps, rate=rate, windows=windows, held_out=held_out, warm_up=WARM_UP)
    return learner(NAME, RELAXED, schedule)
