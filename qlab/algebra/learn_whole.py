"""Learning over a whole model: gradients of its divergence from the unquantized model, segment by
segment, and the best state kept.

A step that learns (`learner`) is a bind: what `learn_whole` measures, `placed` lays down, block by
block.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.bind import Foreseen, Outline, bind
from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.leaf import proper
from qlab.algebra.measured import DIVERGED, errors_in_notes, errors_of, warn_of_divergence
from qlab.algebra.qtensor import QTensor
from qlab.algebra.random import generator
from qlab.algebra.stats import Stats
from qlab.algebra.transform import Stage, Transform
from qlab.algebra.variables import Variables
from qlab.errors import QlabError

NOTHING_ROUNDED = (
    "{} tunes what was rounded, and nothing in front of it rounds a weight; put a method such as "
    "gptq(spec) in front of it"
)
LOOKS = 6  # how often the divergence on the windows held out is looked at, at most


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """steps: of Adam. rate: how far a number moves in a step at most; it falls linearly to 0.
    windows: how many a step sees. held_out: the share of the windows that choose the best state.
    warm_up: the share of the steps in which the rate rises to that, while Adam's means are of few
    windows."""

    steps: int
    rate: float
    windows: int
    held_out: float
    warm_up: float = 0.0

    def __post_init__(self) -> None:
        in_range = self.steps >= 0 and self.windows >= 1
        if not (in_range and 0 < self.rate <= 1 and 0 < self.held_out < 1):
            raise QlabError(
                f"steps is {self.steps}, windows {self.windows}, rate {self.rate} and held_out "
                f"{self.held_out}; give at least 0 steps of at least 1 window, a rate in (0, 1], "
                "and a share between 0 and 1"
            )

    def rate_at(self, t: int) -> float:
        """The rate of step t, from 0."""
        rising = min(1.0, (t + 1) / max(1.0, self.warm_up * self.steps))
        return self.rate * rising * (1 - t / self.steps)

    def __str__(self) -> str:
        return (
            f"{self.steps} steps of {self.windows} windows, rate {self.rate:g}, "
            f"{self.held_out:g} held out"
        )


@dataclass(frozen=True, kw_only=True)
class Relaxed:
    """A segment as a function of how far the numbers of its selected sites, or of all, have moved;
    all moves 0 is the segment.

    count: what is known of the model beforehand -> how many numbers of its weights move. copies: of
    a segment's weights that it holds at once while it learns. shapes: segment -> full name of what
    moves -> its shape. moved: (segment, full name -> how far
    it has moved) -> the segment, differentiable in the moves. stored: the same -> leaf -> what
    files hold in its place.
    """

    shapes: Callable[[ModuleGraph], Mapping[str, Sequence[int]]]
    moved: Callable[[ModuleGraph, Mapping[str, Tensor]], ModuleGraph]
    stored: Callable[[ModuleGraph, Mapping[str, Tensor]], Mapping[str, Any]]
    count: Callable[[Outline], int]
    copies: int


@dataclass(frozen=True, kw_only=True)
class Learned:
    """The best state that was seen. notes: the divergence at the start and at the end, for the
    report. leaves: tells what is laid down from anything else. variables: hold the moves."""

    notes: Mapping[str, Any]
    leaves: str
    variables: Variables = field(compare=False, repr=False)


def learner(step: str, relaxed: Relaxed, schedule: Schedule) -> Transform:
    """The transform that learns what `relaxed` moves, by this schedule."""
    measure = partial(learn_whole, step, relaxed, schedule)
    foresee = partial(foreseen, step, relaxed, schedule)
    lay_down = partial(placed, step, relaxed)
    return bind(step, measure, lay_down, str(schedule), foresee, divided=True)


def foreseen(step: str, relaxed: Relaxed, schedule: Schedule, outline: Outline) -> Foreseen | None:
    """What learning will run. Refuses too few windows, and nothing that was rounded."""
    if outline.rounded is not None and not outline.rounded:
        raise QlabError(NOTHING_ROUNDED.format(step))
    if not outline.windows:
        return None
    _, held_out = divided(step, outline.windows, schedule.held_out)
    learned = relaxed.count(outline)
    looks = 1 + sum(_looks_behind(schedule, t) for t in range(schedule.steps))
    return Foreseen(
        forward=outline.windows + looks * len(held_out),
        backward=schedule.steps * schedule.windows,
        at_once=max(schedule.windows, len(held_out)),
        in_a_pass=schedule.windows,
        summed=torch.float32.itemsize * learned,
        kept=outline.windows,
        learned=learned,
        copies=relaxed.copies,
        as_stored=True,
    )


def _looks_behind(schedule: Schedule, step: int) -> bool:
    """Whether the divergence on the windows held out is looked at behind this step."""
    last = step + 1 == schedule.steps
    return last or (step + 1) % math.ceil(schedule.steps / LOOKS) == 0


# ------------------------------------------------------------------ measured
def rounded(graph: ModuleGraph) -> dict[str, QTensor]:
    """The codes of the selected sites of a segment, by leaf."""
    leaves = {site.weight or "": graph.params[site.weight or ""] for site in graph.sites}
    codes = {name: proper(leaf) for name, leaf in leaves.items()}
    return {name: q for name, q in codes.items() if isinstance(q, QTensor)}


def vectors(graph: ModuleGraph) -> dict[str, Tensor]:
    """The norms and biases of a segment, by leaf; none where some of its sites are not selected."""
    chosen = {site.path for site in graph.sites}
    if any(site.path not in chosen and not site.router for site in graph.code.sites):
        return {}
    return {
        name: leaf
        for name, leaf in graph.params.items()
        if isinstance(leaf, Tensor)
        and leaf.ndim == 1
        and leaf.is_floating_point()
        and name.endswith((".weight", ".bias"))
    }


def learn_whole(step: str, relaxed: Relaxed, schedule: Schedule, model: Any) -> Learned:
    """Lower the divergence on some of the calibration windows, and keep the state in which that on
    the others was least.

    Learning that leaves the finite numbers ends, and the notes say at which step.

    Args:
        step: the name of the step that learns.
        relaxed: what moves.
        schedule: how long.
        model: a `qlab.Model` behind steps that round. It runs in bfloat16 where it is stored so,
            else in fp32: gradients of a mean over a vocabulary are below what float16 holds.
    """
    _refuse_dense(step, model)
    learn_from, held_out = divided(step, model.count, schedule.held_out)
    narrow = model.checkpoint.running_dtype == torch.bfloat16
    model = model.running(torch.bfloat16 if narrow else torch.float32)
    loss = finite(model.kl_to(model.reference))
    variables = Variables(model.fold(partial(_with_shapes, relaxed), {}))

    def changed(path: str, graph: ModuleGraph) -> ModuleGraph:
        return relaxed.moved(graph, variables.moves(list(relaxed.shapes(graph)), _device(graph)))

    def look() -> float:
        values = model.losses(loss, held_out, changed=changed)
        return sum(values) / len(values)

    before = least = look()
    kept_step, notes = 0, dict[str, Any]()
    for t, windows in enumerate(_drawn(step, learn_from, schedule)):
        rate, now = schedule.rate_at(t), math.inf
        try:
            model.vjp(loss, windows, changed=changed, after=partial(_updated, variables, rate))
            if _looks_behind(schedule, t):
                now = look()
        except Diverged:
            notes[DIVERGED] = t
            break
        if now < least:
            least, kept_step = now, t + 1
            variables.keep()
    notes |= {"kl_before": before, "kl": least, "kept_step": kept_step}
    warn_of_divergence(step, notes)
    leaves = model.fold(partial(_hashed, relaxed, variables), "")
    return Learned(notes=notes, leaves=leaves, variables=variables)


def _refuse_dense(step: str, model: Any) -> None:
    def count(codes: int, path: str, graph: ModuleGraph) -> int:
        return codes + len(rounded(graph))

    if not model.fold(count, 0):
        raise QlabError(NOTHING_ROUNDED.format(step))


def divided(step: str, count: int, share: float) -> tuple[list[int], list[int]]:
    """The windows that are learned from, and those held out."""
    if count < 2:
        raise QlabError(
            f"{step} learns from some windows and chooses by others, and there is {count}; give at "
            "least 2 windows of calibration text"
        )
    order = torch.randperm(count, generator=generator(0, f"windows of {step}")).tolist()
    out = min(max(1, round(count * share)), count - 1)
    return sorted(order[out:]), sorted(order[:out])


def _drawn(step: str, windows: Sequence[int], schedule: Schedule) -> list[list[int]]:
    """The windows of every step: all of them once, in random order, then again."""
    source = generator(0, f"steps of {step}")
    asked = schedule.steps * schedule.windows
    order: list[int] = []
    while len(order) < asked:
        order += [windows[i] for i in torch.randperm(len(windows), generator=source).tolist()]
    return [order[i : i + schedule.windows] for i in range(0, asked, schedule.windows)]


def _with_shapes(
    relaxed: Relaxed, shapes: Mapping[str, Sequence[int]], path: str, graph: ModuleGraph
) -> Mapping[str, Sequence[int]]:
    return {**shapes, **relaxed.shapes(graph)}


def _updated(variables: Variables, rate: float, path: str) -> None:
    variables.update(rate)


def _device(graph: ModuleGraph) -> torch.device:
    return next(t.device for t in pytree.tree_leaves(dict(graph.params)) if isinstance(t, Tensor))


@torch.no_grad()
def _best(relaxed: Relaxed, variables: Variables, graph: ModuleGraph) -> Mapping[str, Any]:
    """The leaves of a segment in the state that was kept. Where nothing moved they stay."""
    moves = {name: variables.best(name, _device(graph)) for name in relaxed.shapes(graph)}
    moved = any(bool(move.any()) for move in moves.values())
    return relaxed.stored(graph, moves) if moved else {}


def _hashed(
    relaxed: Relaxed,
    variables: Variables,
    before: str,
    path: str,
    graph: ModuleGraph,
) -> str:
    """A hash of the leaves of this segment, and of those before it."""
    hashed = hashlib.sha256(f"{before} {path}".encode())
    leaves = _best(relaxed, variables, graph)
    for name in sorted(leaves):
        for t in pytree.tree_leaves(leaves[name]):
            if isinstance(t, Tensor):
                flat = t.detach().cpu().contiguous().reshape(-1)
                hashed.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:32]


class Diverged(Exception):
    """The loss is no finite number any more."""


def finite(loss: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """The loss, which raises `Diverged` where it is no finite number."""

    def checked(logits: Tensor, window: int) -> Tensor:
        value = loss(logits, window)
        if not math.isfinite(float(value.detach())):
            raise Diverged
        return value

    return checked


# ------------------------------------------------------------------ laid down
def placed(step: str, relaxed: Relaxed, learned: Learned) -> Transform:
    """The step that lays down what was learned."""

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        codes = rounded(graph)
        new = replace(graph, params={**graph.params, **_best(relaxed, learned.variables, graph)})
        notes = {
            site.path: {**graph.notes.get(site.path, {}), **_errors(new, site), **learned.notes}
            for site in graph.sites
            if (site.weight or "") in codes
        }
        return replace(new, notes={**graph.notes, **notes}), stats

    return (Stage(step, frozenset(), run),)


def _errors(graph: ModuleGraph, site: Site) -> dict[str, Any]:
    """How far a weight is from its target, for the report."""
    experts = range(graph.leaf_ok(site).shape[0]) if site.route else [None]
    parts = [(graph.target_ok(site, e), graph.leaf_ok(site, e)) for e in experts]
    return errors_in_notes([errors_of(target, leaf, None) for target, leaf in parts])
