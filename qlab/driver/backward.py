"""One segment run backward: from the gradients of what leaves it to those of what enters it and of
its leaves."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.interpret import outputs_of
from qlab.algebra.once import dense_once
from qlab.driver.batches import Batch
from qlab.driver.windows import Pass, summed, variables_of
from qlab.errors import QlabError
from qlab.model.calls import State

Loss = Callable[[Tensor, int], Tensor]  # logits [l, v] of a window, and its number -> a number
Cotangent = tuple[Tensor | None, ...]  # of a state: None where the loss does not depend on it


class NotFinite(QlabError):
    """A loss that is NaN or infinite, as when learning diverges."""


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """The gradients of one window's loss at the leaves of one segment.

    Args:
        path: the segment.
        segment: its value, whose dense leaves are in fp32 here.
        window: the number of the window.
        leaves: leaf -> the gradient, of its shape, for every dense leaf that the loss depends on.
    """

    path: str
    segment: ModuleGraph
    window: int
    leaves: Mapping[str, Tensor]


Sink = Callable[[Gradients], None]


def back(
    graph: ModuleGraph,
    chosen: Pass,
    batches: Mapping[int, Batch],
    leaving: Mapping[int, Cotangent],
    sink: Sink | None,
) -> dict[int, Cotangent]:
    """The gradients of what enters a segment, by the window's place in the pass.

    What requires gradients in the segment gets them added to its `.grad`, those of all ranks.

    Args:
        graph: the segment.
        chosen: the windows.
        batches: what enters it, and what it is called with, of the windows that this rank runs.
        leaving: the gradients of what leaves it.
        sink: takes the gradients of its dense leaves, if they are asked for.
    """
    graph, computed = _apart(graph)
    variables = variables_of(_values(graph))
    leaves = _leaves(graph) if sink else {}
    graph = replace(graph, params={**graph.params, **leaves})
    running, entering = dense_once(graph), dict[int, Cotangent]()

    def run(places: Sequence[int]) -> None:
        for place in places:
            call, state = batches[place]
            with torch.enable_grad():
                apart = tuple(_leaf(t) for t in state)
                inputs = call.inputs(tuple(t.clone() for t in apart))
                outputs = call.leaving(apart, outputs_of(running, *inputs))
            _hand_on(outputs, leaving[place])
            entering[place] = tuple(t.grad for t in apart)
            if sink:
                reached = {name: t.grad for name, t in leaves.items() if t.grad is not None}
                number = chosen.numbers[place]
                sink(Gradients(path=graph.path, segment=graph, window=number, leaves=reached))
                for t in leaves.values():
                    t.grad = None

    summed(variables, chosen.parts, chosen.ranks, run)
    _hand_on(list(computed), [t.grad for t in computed.values()])
    return entering


def _apart(graph: ModuleGraph) -> tuple[ModuleGraph, dict[Tensor, Tensor]]:
    """The segment with variables of its own in the place of tensors that were computed of
    variables, and what stands in the place of which.

    Gradients are summed there over all windows, and then go once through what was computed. Tensors
    below fp32 stay as they are, because sums lose digits there. All stay where they hold more
    numbers than the variables, because ranks send each other the sums.
    """
    leaves = pytree.tree_leaves(dict(graph.params))
    computed = {t: t.detach().requires_grad_() for t in leaves if _is_wide_result(t)}
    if _numbers(computed) > _numbers(variables_of(computed)):
        return graph, {}
    params = pytree.tree_map_only(Tensor, lambda t: computed.get(t, t), dict(graph.params))
    return replace(graph, params=params), computed


def _is_wide_result(t: Any) -> bool:
    return isinstance(t, Tensor) and t.grad_fn is not None and t.itemsize >= torch.float32.itemsize


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _values(graph: ModuleGraph) -> list[Any]:
    """What a segment is run with: its leaves, and what its operations at run time hold."""
    ops = [vars(op) for ops in graph.inserts.values() for op in ops if hasattr(op, "__dict__")]
    return pytree.tree_leaves([dict(graph.params), ops])


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.is_floating_point())


def _leaves(graph: ModuleGraph) -> dict[str, Tensor]:
    """The dense leaves of a segment in fp32, as variables, but for those that are a learner's."""
    return {
        name: leaf.detach().float().requires_grad_()
        for name, leaf in graph.params.items()
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.requires_grad
    }


def end(
    entering: Mapping[int, State],
    chosen: Pass,
    cotangents: Mapping[int, Cotangent],
    variables: Sequence[Tensor],
) -> None:
    """Hand gradients on to what computed the states that enter the first segment, where that
    requires them. variables: what gathers gradients there."""

    def run(places: Sequence[int]) -> None:
        for place in places:
            _hand_on(entering[place], cotangents[place])

    summed(variables, chosen.parts, chosen.ranks, run)


def _hand_on(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Run backward from those tensors that require gradients, and got one."""
    reached = [i for i, t in enumerate(tensors) if t.requires_grad and gradients[i] is not None]
    if reached:
        torch.autograd.backward(
            [tensors[i] for i in reached],
            [gradients[i] for i in reached],
            retain_graph=True,  # what was computed of parameters is shared by all windows
        )


def value_of(loss: Loss, logits: Tensor, window: int) -> Tensor:
    """The loss of one window. Refuses what is no finite number."""
    value = loss(logits, window)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise QlabError(f"the loss of window {window} is {shown}; return a tensor of one number")
    if not math.isfinite(float(value.detach())):
        cause = (
            "the loss of finite logits"
            if torch.isfinite(logits).all()
            else "its logits hold NaN or Inf"
        )
        raise NotFinite(
            f"the loss of window {window} is {float(value.detach())} ({cause}); give a loss and "
            "leaves that are finite on every window"
        )
    return value.reshape(())
