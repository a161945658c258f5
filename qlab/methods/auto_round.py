"""AutoRound: learn which way each weight is rounded, and how far the range of each group reaches,
by the signs of the gradients of the block's output error (Cheng et al. 2023).

    codes = clamp(round(W / s' + V + z'))    s' = s (b (qmax - z) - a (qmin - z)) / (qmax - qmin)
    W'    = (codes - z') s'                  z' = round(qmin - a (qmin - z) s / s')

Legend: W_ok the weight; V_ok offsets, from -0.5 to 0.5; s, z scales and zero points [a, g] that a
grid chose; a, b in [0, 1] how much of either end of a group's range is used (one number for both
ends where there is no zero point); T steps. At V = 0 and a = b = 1, W' is W rounded to nearest.

Codes that a step before chose are refined in the same way: W is then the weight nearest to the one
that they stand for which rounds to them, so that learning begins at those codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.block import Block, each_block
from qlab.algebra.cell import on_support
from qlab.algebra.grid import stored
from qlab.algebra.learn import Version, learn
from qlab.algebra.operations import Operations
from qlab.algebra.qtensor import QTensor, steps
from qlab.algebra.rounding import outer_scales
from qlab.algebra.spec import Int, Spec, with_scale_dtype
from qlab.algebra.straight_through import NEAREST, nearest_rounding_to, round_with_offsets
from qlab.algebra.transform import Transform, costing
from qlab.algebra.windows import Schedule
from qlab.errors import QlabError
from qlab.methods.grid import Grid, encode, minmax


@dataclass(frozen=True, kw_only=True)
class Start:
    """One weight where learning begins: in fp32 [..., o, k], in the order of the codes q. Scales of
    8 bits stay as they are."""

    W_ok: Tensor
    q: QTensor

    def parameters(self) -> list[Tensor]:
        """V = 0, and a = b = 1 where the ends of ranges are learned."""
        _, *ends = parameter_shapes(self.q)
        ones = partial(torch.ones, dtype=torch.float32, device=self.W_ok.device)
        return [torch.zeros_like(self.W_ok), *(ones(end) for end in ends)]

    def rounded(self, parameters: list[Tensor]) -> tuple[Tensor, QTensor]:
        """W' at these parameters, differentiable by straight-through gradients, and its leaf."""
        V_ok, *ends = parameters
        q, spec = self.q, self.q.spec
        wide = steps(q.scales, q.outer, torch.float32)
        s, z = wide, None if q.zeros is None else q.zeros.float()
        scales, zeros = q.scales, q.zeros
        if ends:
            s, z = _ranged(wide, z, spec, ends)
            scales, zeros = _stored(s, z, q)
            s = _through(s, steps(scales, q.outer, torch.float32))
            z = None if z is None or zeros is None else _through(z, zeros.float())
        W_ok, codes = round_with_offsets(self.W_ok, V_ok, s, z, spec)
        leaf = replace(q, codes=codes, scales=scales, zeros=zeros)
        return W_ok if q.perm is None else W_ok[..., q.perm.argsort()], leaf


def parameter_shapes(q: QTensor) -> list[torch.Size]:
    """The shapes of what is learned of codes: V, and the ends of ranges."""
    ends = 0 if q.scales.itemsize == 1 else 1 if q.zeros is None else 2
    return [q.shape, *(q.scales.shape for _ in range(ends))]


def _through(x: Tensor, value: Tensor) -> Tensor:
    """The value, with the gradient of x (straight-through)."""
    return value.detach() + (x - x.detach())


def _ranged(
    s: Tensor, z: Tensor | None, spec: Spec, ends: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of the range from a * lowest to b * highest. A learned end never
    passes 0, so the scale keeps its sign."""
    if z is None or not isinstance(spec, Int):
        return s * ends[0], z
    low, high = ends[0] * (spec.qmin - z), ends[1] * (spec.qmax - z)
    share = (high - low) / (spec.qmax - spec.qmin)
    share = share.clamp_min(1e-3)
    return s * share, (spec.qmin - low / share).clamp(spec.qmin, spec.qmax)


def _stored(s: Tensor, z: Tensor | None, q: QTensor) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points as the file holds them."""
    # the spec of codes that were read from a directory may leave the dtype open
    scales = stored(s.detach(), with_scale_dtype(q.spec, q.scales.dtype), q.outer)
    if z is None or q.zeros is None:
        return scales, None
    z = z.detach() if q.zeros.is_floating_point() else z.detach().round()
    return scales, z.to(q.zeros.dtype)


# ------------------------------------------------------------------ where learning begins
def starts_nearest(block: Block, spec: Spec, grid: Grid) -> dict[str, Start]:
    """Every weight, and its codes rounded to nearest."""
    segment = block.segment
    spec, outers = with_scale_dtype(spec, segment.dtype), outer_scales(segment, spec)
    starts = {}
    for site in segment.sites:
        if not site.router:
            W_ok = block.weight(site.path)
            moment = block.stats[site.path]["second_moment"] if grid.weighted else None
            q = _encoded(grid, W_ok, spec, moment, outers.get(site.path))
            starts[site.path] = Start(W_ok=W_ok, q=q)
    return starts


def _encoded(grid: Grid, W_ok: Tensor, spec: Spec, moment: Any, outer: Tensor | None) -> QTensor:
    """A weight rounded to nearest, or each expert of one by itself."""
    if W_ok.ndim == 2:
        h_k = None if moment is None else moment.mean_square_k
        return encode(grid, W_ok, spec, h_k, outer)
    experts = [
        _encoded(
            grid,
            W,
            spec,
            None if moment is None else moment.states[e],
            None if outer is None else outer[e],
        )
        for e, W in enumerate(W_ok)
    ]
    return pytree.tree_map(lambda *t: None if t[0] is None else torch.stack(t), *experts)


def starts_refining(block: Block) -> dict[str, Start]:
    """Every weight that is rounded already, with its codes, and in its place the nearest one that
    rounds to these."""
    starts = {}
    for site in block.segment.sites:
        q = block.segment.params[site.weight or ""]
        if isinstance(q, QTensor):
            W_ok, support = block.weight(site.path), block.segment.support_ok(site)
            W_ok = W_ok if support is None else on_support(W_ok, support)
            starts[site.path] = Start(W_ok=behind(W_ok, q), q=q)
    if not starts:
        raise QlabError(
            f"auto_round_refine has no codes to refine in {block.segment.path}; put a step that "
            "rounds before it, or use auto_round"
        )
    return starts


def behind(W_ok: Tensor, q: QTensor, reach: float = NEAREST) -> Tensor:
    """The weight nearest to W that lies within reach of the codes of q, in steps of its scale, and
    so rounds to them, in the order of the codes."""
    W_ok = W_ok if q.perm is None else W_ok[..., q.perm]
    s = steps(q.scales, q.outer, torch.float32)
    z = None if q.zeros is None else q.zeros.float()
    return nearest_rounding_to(q.codes, W_ok, s, z, q.spec, reach)


# ------------------------------------------------------------------ learning
def _learned(
    block: Block, starts: Mapping[str, Start], schedule: Schedule, lr: float | None
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The best codes seen, by signed gradient descent with a linearly falling step."""
    parameters = {path: start.parameters() for path, start in starts.items()}
    every = [p.requires_grad_() for of_site in parameters.values() for p in of_site]
    step = lr or 1 / max(schedule.steps, 1)

    def version() -> Version:
        made = {path: start.rounded(parameters[path]) for path, start in starts.items()}
        return Version(
            {path: W for path, (W, _) in made.items()}, {path: q for path, (_, q) in made.items()}
        )

    @torch.no_grad()
    def update(left: float) -> None:
        for V, *ends in parameters.values():
            for p, low, high in ((V, -0.5, 0.5), *((end, 0.0, 1.0) for end in ends)):
                if p.grad is not None:
                    p.sub_(step * left * p.grad.sign_()).clamp_(low, high)
        for p in every:
            p.grad = None

    return learn(block, version, update, schedule)


def _checked(steps: int, windows: int, lr: float | None) -> Schedule:
    if steps < 0 or windows < 1 or (lr is not None and not 0 < lr <= 1):
        raise QlabError(
            f"steps is {steps}, windows {windows} and lr {lr}; give at least 0 steps of at least 1 "
            "window, and a step size in (0, 1] or None"
        )
    return Schedule(steps=steps, windows=windows)


def _detail(schedule: Schedule, lr: float | None) -> str:
    size = f", lr {lr:g}" if lr else ""
    return f"{schedule.steps} steps of {schedule.windows} windows{size}"


def auto_round(
    spec: Spec, grid: Grid = minmax, steps: int = 200, windows: int = 8, lr: float | None = None
) -> Transform:
    """AutoRound: learn rounding offsets and ranges by signed gradients of the block's output error,
    from rounding to nearest on.

    Args:
        spec: the number grid to round to, or its name such as "int4-g64".
        grid: how the scales and zero points are chosen from which learning starts (see GRIDS).
        steps: how many steps; with 0 it is rounding to nearest.
        windows: how many windows a step sees.
        lr: the size of the first step of every offset and range end; steps shrink linearly to 0.
            None takes 1 / steps, with which an offset can reach 0.5.

    Returns:
        A transform of one stage, over whole blocks. It needs calibration data. What it keeps never
        has a larger output error over all windows than rounding to nearest.

    Raises:
        QlabError: steps is below 0, windows below 1, or lr not in (0, 1].

    Source:
        Cheng et al. 2023, Optimize Weight Rounding via Signed Gradient Descent for the Quantization
        of LLMs.

    Example:
        >>> import qlab
        >>> (stage,) = qlab.auto_round("int4-g64", steps=50)
        >>> stage.name, stage.detail
        ('auto_round', 'grid minmax, 50 steps of 8 windows')
    """
    schedule = _checked(steps, windows, lr)

    def fn(block: Block) -> tuple[Mapping[str, Any], dict[str, Any]]:
        return _learned(block, starts_nearest(block, spec, grid), schedule, lr)

    detail = f"grid {grid.name}, {_detail(schedule, lr)}"
    visits = steps * windows
    stages = each_block("auto_round", fn, grid.needs, spec, detail, visits, by_weight=schedule)
    return costing(stages, Operations())  # beside the passes of its windows


def auto_round_refine(steps: int = 50, windows: int = 8, lr: float | None = 0.0003) -> Transform:
    """AutoRound from the codes that a step before it left, which are better than the nearest ones.

    Args:
        steps: how many steps; with 0 the codes stay.
        windows: how many windows a step sees.
        lr: the size of the first step, small since steps of 1 / steps (None) leave good codes
            behind at once.

    Returns:
        A transform of one stage, over whole blocks, for behind a step that rounds. It needs
        calibration data. What it keeps never has a larger output error over all windows than the
        codes that it began with.

    Raises:
        QlabError: steps is below 0, windows below 1, or lr not in (0, 1]; when it runs, that no
            step before it rounded a weight.

    Source:
        Cheng et al. 2023, Optimize Weight Rounding via Signed Gradient Descent for the Quantization
        of LLMs.

    Example:
        >>> import qlab
        >>> recipe = qlab.chain(qlab.gptq("int4-g64"), qlab.auto_round_refine(steps=20))
        >>> [stage.name for stage in recipe]
        ['gptq', 'auto_round_refine']
    """
    schedule = _checked(steps, windows, lr)

    def fn(block: Block) -> tuple[Mapping[str, Any], dict[str, Any]]:
        return _learned(block, starts_refining(block), schedule, lr)

    detail = _detail(schedule, lr)
    visits = steps * windows
    stages = each_block("auto_round_refine", fn, detail=detail, visits=visits, by_weight=schedule)
    return costing(stages, Operations())  # beside the passes of its windows
