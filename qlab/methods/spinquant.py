"""SpinQuant: rotations learned for the roundings that follow them (Liu et al. 2024).

R1 turns the hidden states between all blocks (`rotate_residual`), R2 the values of the heads of
each block (`rotate_heads`). Both begin as random Hadamard matrices and go down L, the KL divergence
of the model with rounded weights and inputs from the unquantized one. Steps stay on the orthogonal
group by the Cayley transform of the skew part of the gradient G = dL/dR:

    A = G R^T - R G^T,    R <- (I + A/2)^-1 (I - A/2) R,    |A| = rate sqrt(k)

Rounding has the gradient of the identity. Legend: R, G [k, k].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.bind import Foreseen, Outline, bind
from qlab.algebra.frame import frame, keeping_ones, turning
from qlab.algebra.gauge import Element, Turn, gauge
from qlab.algebra.graph import ModuleGraph
from qlab.algebra.grid import encode, minmax
from qlab.algebra.groups import General
from qlab.algebra.learn_whole import Diverged, finite
from qlab.algebra.measured import DIVERGED, warn_of_divergence
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import dense
from qlab.algebra.random import generator
from qlab.algebra.running import apply
from qlab.algebra.spec import Spec, with_scale_dtype
from qlab.algebra.transform import Transform, chain
from qlab.algebra.views import WholeModelBasis
from qlab.errors import QlabError
from qlab.methods.hadamard import largest_order, random_hadamard

STREAM = "residual stream"  # the name of R1 among the matrices; those of R2 have their inputs'


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Orthogonal matrices by name, and the loss that they began and ended with."""

    matrices: Mapping[str, Tensor] = field(default_factory=dict)
    before: float = 0.0
    after: float = 0.0


def spinquant(
    spec: Spec,
    inputs: Spec | None = None,
    steps: int = 16,
    rate: float = 0.05,
    seed: int = 0,
) -> Transform:
    """SpinQuant: R1 and R2 learned on the orthogonal group. Chain the rounding behind.

    The function of the model stays, and all of it is folded into weights. Learning sees weights and
    inputs rounded to nearest, whatever rounds them afterwards.

    Args:
        spec: the grid of the weights while it learns, or its name such as "int4-channel".
        inputs: the grid of the inputs of weights, or its name such as "int4-channel" (a scale per
            token); None leaves them as they are.
        steps: how many steps are taken. Each runs all windows forward and backward.
        rate: the mean angle that the first step turns by, in radians. It is halved where a step
            does not better the loss.
        seed: of the random signs of the Hadamard matrices.

    Returns:
        A transform that comes first in a recipe. It measures the whole model, with one block in
        memory at a time, and needs calibration data. The loss on its windows is never above that
        of the matrices that it begins with.

    Raises:
        QlabError: steps is below 0 or rate not in (0, 1]; before any work, a model that
            `rotate_residual` refuses.

    Source:
        Liu et al. 2024, SpinQuant: LLM Quantization with Learned Rotations.

    Example:
        >>> import qlab
        >>> recipe = qlab.chain(qlab.spinquant("int4-channel", steps=4), qlab.gptq("int4-channel"))
        >>> [stage.name for stage in recipe]
        ['spinquant', 'gptq']
    """
    if steps < 0 or not 0 < rate <= 1:
        raise QlabError(f"steps is {steps} and rate {rate}; give at least 0 and a rate in (0, 1]")

    def measure(model: Any) -> Learned:
        if model.reference is not model:
            raise QlabError(
                "spinquant chooses the basis of the hidden states, which comes before every other "
                "step; put it first in the recipe"
            )
        return _learned(model, _Rounded(spec, inputs, seed), steps, rate)

    def then(learned: Learned) -> Transform:
        turned = frame(
            "spinquant_residual",
            lambda group: learned.matrices[STREAM].float(),
            f"KL {learned.before:.4g} to {learned.after:.4g}",
        )
        return chain(turned, _heads(lambda turn: learned.matrices[turn.name].float()))

    around = f"{spec} weights, {inputs or 'dense'} inputs"
    detail = f"{around}, {steps} steps at {rate:g}, seed {seed}"
    foresee = partial(_foreseen, steps)
    (stage,) = bind("spinquant", measure, then, detail, foresee, divided=True)
    return (replace(stage, view=WholeModelBasis()),)


def _foreseen(steps: int, outline: Outline) -> Foreseen:
    """A pass backward for every step, and one for where it ends."""
    passes = outline.windows * (steps + 1 if steps else 0)
    sizes = [turning(graph.code, "spinquant", graph.path).size for graph in outline.segments]
    return Foreseen(
        forward=outline.windows * (1 if steps else 2),
        backward=passes,
        at_once=outline.windows,
        in_a_pass=outline.windows,
        summed=torch.float64.itemsize * sum(k**2 for k in sizes),  # R2 is small beside R1
        kept=outline.windows,
        copies=9,  # turned in fp64, which gradients keep
    )


class _Rounded:
    """What learning runs in the place of a block: turned by the matrices, and rounded.

    matrices: by name, each drawn when its wire is first met. centred: whether R1 has to keep the
    vector of ones.
    """

    def __init__(self, spec: Spec, inputs: Spec | None, seed: int):
        self.spec, self.inputs, self.seed = spec, inputs, seed
        self.matrices: dict[str, Tensor] = {}
        self.centred = False

    def __call__(self, path: str, graph: ModuleGraph) -> ModuleGraph:
        group = turning(graph.code, "spinquant", path)
        self.centred = group.centred
        if STREAM not in self.matrices:
            R = self._drawn(group.size, STREAM)
            self.matrices[STREAM] = keeping_ones(R) if group.centred else R
        turned = group.apply(graph, self.matrices[STREAM])
        for stage in _heads(self._of_heads):
            turned, _ = apply(stage, turned, {})
        return self._round(turned)

    def _of_heads(self, turn: Turn) -> Tensor:
        assert isinstance(turn.group, General)
        if turn.name not in self.matrices:
            self.matrices[turn.name] = self._drawn(turn.group.size, turn.name)
        return self.matrices[turn.name].float()

    def _drawn(self, size: int, name: str) -> Tensor:
        n = largest_order(size)
        R_nn = random_hadamard(n, generator(self.seed, name)).double()
        return torch.block_diag(*[R_nn] * (size // n))

    def _round(self, graph: ModuleGraph) -> ModuleGraph:
        spec = with_scale_dtype(self.spec, graph.dtype)
        leaves: dict[str, Tensor] = {}
        for site in graph.sites:
            if site.router:
                continue
            W = graph.weight_ok(site)
            rounded = W + (_nearest(W.detach(), spec) - W.detach())
            leaves[site.weight or ""] = rounded.mT if site.layout.endswith("k o") else rounded
            if self.inputs is not None:
                graph = graph.inserting(f"{site.path}:in", QuantizeInput(self.inputs))
        return graph.update(leaves)


def _nearest(W: Tensor, spec: Spec) -> Tensor:
    """W [..., o, k] rounded to nearest, of a mixture expert by expert."""
    if W.ndim == 2:
        return dense(encode(minmax, W, spec), torch.float32)
    return torch.stack([_nearest(W_ok, spec) for W_ok in W])


def _heads(of: Callable[[Turn], Tensor]) -> Transform:
    """R2: the values of every head times the matrix [d, d] of their wire."""

    def choose(turn: Turn) -> Element | None:
        if not isinstance(turn.group, General):
            return None
        R = of(turn)
        return Element(M=R, M_inv=R.mT, notes={"rotated": len(R)})

    return gauge("spinquant_heads", "*:in", choose)


def _learned(model: Any, changed: _Rounded, steps: int, rate: float) -> Learned:
    """The best matrices on the way down."""
    loss, losses = model.kl_to(model), list[float]()
    best: dict[str, Tensor] = {}
    slope: dict[str, Tensor] = {}
    notes: dict[str, int] = {}
    for step in range(steps + 1):
        # A loss that is not finite at the start is no divergence, and refused as such.
        checked = finite(loss) if step else loss
        try:
            if steps:
                _watch(changed, model)
                values = model.vjp(checked, changed=changed)
            else:
                values = model.losses(checked, changed=changed)
        except Diverged:
            notes[DIVERGED] = step
            break
        mean = sum(values) / len(values)
        if not losses or mean < min(losses):
            best = {name: R.detach() for name, R in changed.matrices.items()}
            slope = {
                name: _skew(R, changed.centred and name == STREAM)
                for name, R in changed.matrices.items()
            }
        else:
            rate /= 2
        losses.append(mean)
        changed.matrices = {name: _moved(R, slope[name], rate) for name, R in best.items()}
        if step < steps and not all(R.isfinite().all() for R in changed.matrices.values()):
            notes[DIVERGED] = step + 1
            break
    warn_of_divergence("spinquant", notes)
    return Learned(matrices=best, before=losses[0], after=min(losses))


def _watch(changed: _Rounded, model: Any) -> None:
    """Let gradients gather in every matrix, each of which is drawn by now."""
    if not changed.matrices:
        for path in model.segments:
            changed(path, model.segment(path))
    for R in changed.matrices.values():
        R.requires_grad_()


def _skew(R: Tensor, centred: bool) -> Tensor:
    """A [k, k] of the gradient of R. centred: whether R keeps the vector of ones."""
    if R.grad is None:
        return torch.zeros_like(R.detach())
    step = R.grad @ R.detach().mT
    A = step - step.mT
    if centred:
        A = A - A.mean(0, keepdim=True)
        A = A - A.mean(1, keepdim=True)
    return A


def _moved(R: Tensor, A: Tensor, rate: float) -> Tensor:
    """The Cayley transform of A, of the size that turns by `rate` on the mean, times R."""
    A = A * (rate * len(A) ** 0.5 / A.norm().clamp_min(1e-30))
    eye = torch.eye(len(A), dtype=A.dtype)
    return torch.linalg.solve(eye + A / 2, (eye - A / 2) @ R)
