"""Quantization-aware training of the whole model: weights, scales, norms and biases trained through
the rounding by straight-through gradients of the KL divergence from the unquantized model (Liu et
al. 2023, LLM-QAT: the unquantized model teaches, without labels).

    codes = clamp(round(W / s' + V + z'))    W' = (codes - z') s'    s' of a range that is learned

Legend: as in auto_round. W begins beside the codes that are there. V_ok, by which it has moved in
steps of its scale, has no bound. Ranges, norms and biases move a tenth as far, relative to their
size.

The gradient of one window is mostly noise, which walks every weight a little. Codes of a method
that makes up for its errors often differ from the nearest ones, and a weight that begins as close
to its target as its code allows begins at the edge of it: the first steps then change many codes at
once. Beside its code it changes where many windows agree.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qlab.algebra.bind import Outline
from qlab.algebra.cell import on_support
from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.leaf import Sum
from qlab.algebra.learn_whole import Relaxed, Schedule, learner, rounded, vectors
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import scales_of
from qlab.algebra.transform import Transform
from qlab.methods.auto_round import Start, behind, parameter_shapes
from qlab.methods.kl_tune import moved_vector, with_leaves

NAME = "qat_end_to_end"
# how far from its code a weight begins, in steps of its scale: not on it, since masks leave 0
BESIDE = 0.01
SLOWER = 0.1  # how much of the step of weights, in steps of their scale, the rest takes


def _codes(graph: ModuleGraph) -> dict[str, QTensor]:
    """The codes that are trained, by leaf."""
    return {name: q for name, q in rounded(graph).items() if graph.params[name] is q}


def _starts(graph: ModuleGraph) -> dict[str, Start]:
    """Leaf -> where training of its codes begins."""
    sites, codes = {site.weight: site for site in graph.sites}, _codes(graph)
    return {leaf: Start(W_ok=_weight(graph, sites[leaf], q), q=q) for leaf, q in codes.items()}


def _weight(graph: ModuleGraph, site: Site, q: QTensor) -> Tensor:
    W_ok, support = graph.target_ok(site), graph.support_ok(site)
    return behind(W_ok if support is None else on_support(W_ok, support), q, BESIDE)


def _of_leaf(graph: ModuleGraph, leaf: str, q: QTensor) -> dict[str, tuple[int, ...]]:
    """The names and shapes of what is learned of one weight: V, and the ends of its ranges."""
    shapes = enumerate(parameter_shapes(q))
    return {f"{graph.path}.{leaf} {i}": tuple(shape) for i, shape in shapes}


def _parameters(
    graph: ModuleGraph, leaf: str, q: QTensor, moves: Mapping[str, Tensor]
) -> list[Tensor]:
    V, *ends = (moves[name] for name in _of_leaf(graph, leaf, q))
    return [V, *(1 + SLOWER * end for end in ends)]


def _shapes(graph: ModuleGraph) -> dict[str, tuple[int, ...]]:
    shapes = {f"{graph.path}.{name}": tuple(v.shape) for name, v in vectors(graph).items()}
    for leaf, q in _codes(graph).items():
        shapes |= _of_leaf(graph, leaf, q)
    return shapes


def _vectors_now(graph: ModuleGraph, moves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: moved_vector(graph, name, SLOWER * moves[f"{graph.path}.{name}"]).to(vector.dtype)
        for name, vector in vectors(graph).items()
        if moves[f"{graph.path}.{name}"].requires_grad or moves[f"{graph.path}.{name}"].any()
    }


def _moved(graph: ModuleGraph, moves: Mapping[str, Tensor]) -> ModuleGraph:
    leaves: dict[str, Any] = dict(_vectors_now(graph, moves))
    for leaf, start in _starts(graph).items():
        W_ok, _ = start.rounded(_parameters(graph, leaf, start.q, moves))
        # a sum is [o, k] in every layout of a program
        leaves[leaf] = Sum((W_ok,))
    return with_leaves(graph, leaves)


def _stored(graph: ModuleGraph, moves: Mapping[str, Tensor]) -> dict[str, Any]:
    leaves: dict[str, Any] = dict(_vectors_now(graph, moves))
    for leaf, start in _starts(graph).items():
        _, leaves[leaf] = start.rounded(_parameters(graph, leaf, start.q, moves))
    return leaves


def _count(outline: Outline) -> int:
    """The weights, and the two ends of every range."""
    return sum(
        outline.shapes[name].numel() + 2 * scales_of(spec, outline.shapes[name])
        for name, spec in (outline.rounded or {}).items()
    )


RELAXED = Relaxed(shapes=_shapes, moved=_moved, stored=_stored, count=_count, copies=6)


def qat_end_to_end(
    steps: int = 96, rate: float = 0.02, windows: int = 1, held_out: float = 0.125
) -> Transform:
    """QAT of the whole model: train weights, scales, norms and biases through the rounding.

    It lowers the KL divergence from the unquantized model over the calibration windows, and begins
    at the codes of the method in front of it: `chain(gptq(spec), qat_end_to_end())`. What it trains
    lies in a temporary folder, of 16 bytes a weight; one block is in memory at a time.

    Args:
        steps: how many steps of Adam; with 0 nothing moves.
        rate: how far a weight moves in the first step, in steps of its scale, at most about; the
            rest moves a tenth of that, relative to its size. It falls linearly to 0, so that a
            weight moves by at most about steps * rate / 2; its code changes behind half a step.
        windows: how many windows a step sees.
        held_out: the share of the calibration windows that nothing is learned from. They choose the
            state that is kept.

    Returns:
        A transform of one stage, a `bind`. It needs at least two windows of calibration data. On
        the windows held out what it keeps never has a larger divergence than what it started from.

    Raises:
        QlabError: an argument is out of its range; or, when it is measured, no weight is rounded in
            front of it.

    Source:
        Liu et al. 2023, LLM-QAT: Data-Free Quantization Aware Training for Large Language Models.

    Example:
        >>> import qlab
        >>> recipe = qlab.chain(qlab.rtn("int4-g64"), qlab.qat_end_to_end(steps=2))
        >>> data = qlab.tokens("demo", "my.jsonl", samples=2, length=16)
        >>> qlab.apply("demo", recipe, data).bits_per_weight
        4.25
    """
    schedule = Schedule(steps=steps, rate=rate, windows=windows, held_out=held_out)
    return learner(NAME, RELAXED, schedule)
