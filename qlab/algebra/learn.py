"""Learning inside one block: gradients of its output error over random windows, and the best leaves
kept."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.block import Block
from qlab.algebra.measured import DIVERGED
from qlab.algebra.qtensor import QTensor
from qlab.algebra.windows import DRAWING, Schedule


@dataclass(frozen=True)
class Version:
    """What a block would be at the present parameters. weights: path -> a tensor, differentiable in
    the parameters. leaves: path -> the leaf that a file would hold, of the same numbers."""

    weights: Mapping[str, Tensor]
    leaves: Mapping[str, Any]


def learn(
    block: Block,
    version: Callable[[], Version],
    update: Callable[[float], None],
    schedule: Schedule,
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The best leaves that were seen, and notes: the block's loss over all windows at the start and
    at the end.

    Each step adds the gradients of the mean error of some windows to the parameters and calls
    `update`, with what is left of the step size: 1 at first, then linearly less. The loss over all
    windows is looked at some times on the way, as often as takes half as long as the steps; leaves
    are kept only if it fell, so it never rises.
    Learning that leaves the finite numbers ends, and the notes say at which step.

    Args:
        block: the block.
        version: makes the weights of the present parameters.
        update: changes the parameters by their gradients, and lets go of these.
        schedule: how long.
    """
    every = range(block.count)
    drawn = schedule.drawn(block.count, block.generator(DRAWING))
    best, kept_at = version().leaves, 0
    before = least = _loss(block, best, every)
    notes: dict[str, Any] = {}
    looks = schedule.looks(block.count)
    for t, indices in enumerate(drawn):
        if not math.isfinite(_add_gradients(block, version().weights, indices)):
            notes[DIVERGED] = t
            break
        update(1 - t / schedule.steps)
        if t in looks:
            with torch.no_grad():
                leaves = version().leaves
            loss = _loss(block, leaves, every)
            if loss < least:
                best, least, kept_at = leaves, loss, t + 1
    notes |= {"block_loss_before": before, "block_loss": least, "kept_step": kept_at}
    return best, {name: value for name, value in notes.items() if math.isfinite(value)}


def _loss(block: Block, leaves: Mapping[str, Any], indices: range) -> float:
    """The mean error over windows. Codes are made dense once, not for each of them."""
    with torch.no_grad():
        as_run = {path: _as_run(leaf, block.segment.dtype) for path, leaf in leaves.items()}
        return float(torch.stack(list(block.each(errors, as_run, indices))).mean())


def errors(block: Block, leaves: Mapping[str, Any], indices: Sequence[int]) -> Iterator[Tensor]:
    """The error of each window."""
    segment = block.put(leaves)
    for i in indices:
        with torch.no_grad():
            error = block.loss(segment, [i])
        yield error


def _as_run(leaf: Any, dtype: torch.dtype) -> Any:
    """The leaf as the program multiplies with it; experts stay codes, one dense at a time."""
    is_codes = isinstance(leaf, QTensor) and leaf.codes.ndim == 2
    return leaf.dense(dtype) if is_codes else leaf


def _add_gradients(block: Block, weights: Mapping[str, Tensor], indices: list[int]) -> float:
    """Add the gradients of the mean error of windows to the parameters, and return that error.

    Windows run one after the other, so that the activations of one are held at a time.
    """
    total, reached = 0.0, dict[str, Tensor]()
    apart = {path: W.detach() for path, W in weights.items()}
    for error, of_window in block.each(partial(gradients, of=len(indices)), apart, indices):
        total += error
        for path, gradient in of_window.items():
            reached[path] = reached[path] + gradient if path in reached else gradient
    if reached and math.isfinite(total):
        torch.autograd.backward([weights[path] for path in reached], list(reached.values()))
    return total


def gradients(
    block: Block, leaves: Mapping[str, Any], indices: Sequence[int], *, of: int
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """What each window adds to the mean error of so many, and the gradients of that by the leaves
    that it depends on."""
    apart = {path: W.requires_grad_() for path, W in leaves.items()}
    with torch.enable_grad():
        segment = block.put(apart)
    for i in indices:
        with torch.enable_grad():
            error = block.error(segment, i) / of
        if error.requires_grad:
            error.backward()
        yield float(error.detach()), {p: W.grad for p, W in apart.items() if W.grad is not None}
        for W in apart.values():
            W.grad = None
