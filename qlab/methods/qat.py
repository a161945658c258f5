"""Quantization-aware training, block by block: train weights, scales and norms through the
rounding, by straight-through gradients of the block's output error (EfficientQAT's Block-AP, Chen
et al. 2024).

    codes = clamp(round(W / s' + V + z'))    W' = (codes - z') s'

Legend: as in auto_round, but V_ok, by which a weight has moved in steps of its scale, has no bound,
and everything is trained by Adam. Norms and biases, the vectors of the block, are trained with it.
"""

from collections.abc import Mapping
from typing import Any

import torch

from qlab.algebra.block import Block, each_block
from qlab.algebra.learn import Version, learn
from qlab.algebra.learn_whole import vectors
from qlab.algebra.operations import Operations
from qlab.algebra.spec import Spec
from qlab.algebra.transform import Transform, costing
from qlab.algebra.windows import Schedule
from qlab.errors import QlabError
from qlab.methods.auto_round import Start, starts_nearest
from qlab.methods.grid import Grid, minmax

SLOWER = 0.1  # how much of the step of weights, in steps of their scale, ranges and vectors take


def _trained(
    block: Block, starts: Mapping[str, Start], schedule: Schedule, lr: float
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The best leaves seen, by Adam with a linearly falling step."""
    parameters = {path: start.parameters() for path, start in starts.items()}
    before = vectors(block.segment)
    sizes = {name: leaf.float().abs().mean().clamp_min(1e-8) for name, leaf in before.items()}
    moves = {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in before.items()}
    fast = [V.requires_grad_() for V, *_ in parameters.values()]
    slow = [end.requires_grad_() for _, *ends in parameters.values() for end in ends]
    slow += [move.requires_grad_() for move in moves.values()]
    rates = [lr, lr * SLOWER]
    groups = [{"params": params} for params in (fast, slow)]
    adam = torch.optim.Adam(groups, lr=lr, foreach=False)

    def version() -> Version:
        made = {path: start.rounded(parameters[path]) for path, start in starts.items()}
        weights = {path: W for path, (W, _) in made.items()}
        trained = {name: leaf.float() + sizes[name] * moves[name] for name, leaf in before.items()}
        leaves: dict[str, Any] = {path: q for path, (_, q) in made.items()}
        # A vector that was not moved keeps its bits.
        moved = [name for name, move in moves.items() if bool(move.detach().any())]
        leaves |= {name: trained[name].detach().to(before[name].dtype) for name in moved}
        return Version({**weights, **trained}, leaves)

    def update(left: float) -> None:
        for group, rate in zip(adam.param_groups, rates):
            group["lr"] = rate * left
        adam.step()
        adam.zero_grad(set_to_none=True)

    return learn(block, version, update, schedule)


def qat(
    spec: Spec, grid: Grid = minmax, steps: int = 200, windows: int = 8, lr: float = 0.02
) -> Transform:
    """QAT: train weights, scales, norms and biases of each block through the rounding.

    Args:
        spec: the number grid to round to, or its name such as "int2-g64".
        grid: how the scales and zero points are chosen from which training starts (see GRIDS).
        steps: how many steps of Adam; with 0 it is rounding to nearest.
        windows: how many windows a step sees.
        lr: how far a weight moves in the first step, in steps of its scale, at most about; ranges,
            norms and biases move a tenth of that, relative to their size. It falls linearly to 0.

    Returns:
        A transform of one stage, over whole blocks. It needs calibration data. What it keeps never
        has a larger output error over all windows than rounding to nearest.

    Raises:
        QlabError: steps is below 0, windows below 1, or lr not in (0, 1].

    Source:
        Chen et al. 2024, EfficientQAT: Efficient Quantization-Aware Training for Large Language
        Models (Block-AP).

    Example:
        >>> import qlab
        >>> (stage,) = qlab.qat("int2-g64", steps=50)
        >>> stage.name, stage.detail
        ('qat', 'grid minmax, 50 steps of 8 windows, lr 0.02')
    """
    if steps < 0 or windows < 1 or not 0 < lr <= 1:
        raise QlabError(
            f"steps is {steps}, windows {windows} and lr {lr}; give at least 0 steps of at least 1 "
            "window, and a step size in (0, 1]"
        )
    schedule = Schedule(steps=steps, windows=windows)

    def fn(block: Block) -> tuple[Mapping[str, Any], dict[str, Any]]:
        return _trained(block, starts_nearest(block, spec, grid), schedule, lr)

    detail = f"grid {grid.name}, {steps} steps of {windows} windows, lr {lr:g}"
    stages = each_block("qat", fn, grid.needs, spec, detail, steps * windows)
    return costing(stages, Operations())  # beside the passes of its windows
