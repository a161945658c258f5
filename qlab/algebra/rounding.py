"""One site under a step that makes its weight anew: what the step is given, what it may return,
and what the report says of its errors.

Legend: W_ok a weight in fp32, D_ok = W' - W the error of the leaf W', H the mean second moment of
the input.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.leaf import Structured, dense, is_leaf, proper
from qlab.algebra.qtensor import QTensor, largest_step, shared_outer
from qlab.algebra.spec import Spec, same_grid, with_scale_dtype
from qlab.algebra.stats import Moment
from qlab.errors import QlabError

# Entries of the report that are measured, so that no step may note them.
MEASURED = {
    "spec",
    "shape",
    "bits_per_weight",
    "inputs",
    "weight_error",
    "largest_step",
    "zeros",
    "tokens",
    "loss",
    "expert_tokens",
    "experts_with_few_tokens",
}
Leaf = Tensor | Structured
WeightFn = Callable[[Tensor, Mapping[str, Any], Any], tuple[Leaf, Mapping[str, Any]]]


@dataclass(frozen=True)
class Step:
    """A step that makes each weight anew: fn(W_ok, statistics, spec) -> (leaf, notes). Where it
    rounds nothing, spec is None."""

    name: str
    fn: WeightFn
    spec: Spec | None


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far a leaf W' is from its weight W: |D| = |W' - W|, |W|, and the largest error in steps.

    Where the second moment H was observed also tr(D H D^T), tr(W H W^T), the tokens that H was
    observed on (None without H), and its channels.
    """

    D: float
    W: float
    steps: float = 0.0
    D_H: float = 0.0
    W_H: float = 0.0
    tokens: int | None = None
    channels: int = 0


@dataclass(frozen=True)
class Solved:
    """What a step made of one weight, what it notes, and the errors."""

    leaf: Leaf
    note: Mapping[str, Any]
    errors: Errors


class Copies(Mapping[str, Any]):
    """Statistics as a step gets them: copies, made when they are asked for, which it may write
    to."""

    def __init__(self, states: Mapping[str, Any]):
        self.states = states

    def __getitem__(self, name: str) -> Any:
        if name not in self.states:
            known = ", ".join(map(repr, self.states))
            raise QlabError(
                f"the step asks for the statistic {name!r} and has {known}; name it in `needs`"
            )
        return _copy(self.states[name])

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.states else default

    def __contains__(self, name: object) -> bool:
        return name in self.states

    def __iter__(self) -> Iterator[str]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)


def _copy(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, value)


# ------------------------------------------------------------------ a site
def solve(
    step: Step,
    graph: ModuleGraph,
    site: Site,
    seen: Mapping[str, Any],
    outer: Tensor | None,
) -> tuple[Leaf, dict[str, Any]]:
    """The leaf that the step makes of a site, in the site's layout, and what the report says of it.

    seen: the statistics of the site's input; for routed experts, one state per expert. outer: the
    global scale [1], or [e, 1], that the step is told.
    """
    if site.route is None:
        parts = [solve_weight(step, graph, site, {**seen, "outer": outer})]
        leaf = parts[0].leaf
    else:
        parts = _solve_experts(step, graph, site, seen, outer)
        try:
            leaf = _stacked([part.leaf for part in parts])
        except QlabError as error:
            raise QlabError(f"{graph.where(site)}: of what {step.name} made {error}") from error
    if isinstance(leaf, Tensor) and site.layout.endswith("k o"):
        leaf = leaf.mT.contiguous()  # codes are [o, k] in every layout
    note = {
        **errors_in_notes([part.errors for part in parts]),
        **merged([part.note for part in parts]),
    }
    return leaf, note


def _solve_experts(
    step: Step,
    graph: ModuleGraph,
    site: Site,
    seen: Mapping[str, Any],
    outer: Tensor | None,
) -> list[Solved]:
    """Each expert [o, k] of a site by itself. An expert's statistics may be observed only when they
    are asked for, and are let go of before the next expert's."""
    assert site.weight is not None

    def solve_expert(e: int) -> Solved:
        own = {name: states.states[e] for name, states in seen.items()}
        own["outer"] = None if outer is None else outer[e]
        return solve_weight(step, graph, site, own, e)

    return [solve_expert(e) for e in range(graph.params[site.weight].shape[0])]


def _form(leaf: Any) -> Any:
    """What leaves have to share to be stacked."""
    parts, form = pytree.tree_flatten(leaf)
    return [(t.shape, t.dtype) if isinstance(t, Tensor) else t for t in parts], form


def _stacked(leaves: Sequence[Any]) -> Any:
    """Leaves [o, k] of all experts as one [e, o, k]. Refuses experts of unlike leaves."""
    first, *others = (_form(leaf) for leaf in leaves)
    unlike = next((e + 1 for e, other in enumerate(others) if other != first), None)
    if unlike is not None:
        raise QlabError(
            f"expert {unlike} is unlike expert 0, and all experts lie in one leaf; give each the "
            "same form, ranks and dtypes"
        )
    return pytree.tree_map(lambda *parts: None if parts[0] is None else torch.stack(parts), *leaves)


# ------------------------------------------------------------------ one weight
def solve_weight(
    step: Step,
    graph: ModuleGraph,
    site: Site,
    seen: Mapping[str, Any],
    expert: int | None = None,
) -> Solved:
    """What the step makes of one weight, and its errors. Refuses what no file or report can hold.

    The step gets copies and its leaf is copied, so that it may write to both, now and later.
    """
    where = graph.where(site)
    W_ok = graph.weight_ok(site, expert)
    if not torch.isfinite(W_ok).all():
        raise QlabError(
            f"{where}.weight holds NaN or Inf; repair the checkpoint or keep() this site"
        )
    if graph.shares_memory(site):
        W_ok = W_ok.clone()
    spec = with_scale_dtype(step.spec, graph.dtype) if step.spec else None
    try:
        returned = step.fn(W_ok, Copies(seen), spec)
    except QlabError as error:
        of_expert = "" if expert is None else f", expert {expert}"
        raise QlabError(f"{where}{of_expert}: {error}") from error
    del W_ok  # the step may have written to it
    leaf, note = _leaf_and_note(returned, f"{where}: {step.name}")
    W_ok = graph.weight_ok(site, expert)
    if leaf.shape != W_ok.shape:
        raise QlabError(
            f"{where}: {step.name} made a weight {tuple(leaf.shape)} of one {tuple(W_ok.shape)}"
        )
    _refuse_nonfinite(leaf, f"{where}: {step.name} made")
    _refuse_unplanned(leaf, step.spec, f"{where}: {step.name}")
    return Solved(leaf, note, errors_of(W_ok, leaf, seen.get("second_moment")))


def _leaf_and_note(returned: Any, step: str) -> tuple[Leaf, Mapping[str, Any]]:
    """A copy of the leaf that a step returned, and its notes as JSON holds them. step: where it
    stands and its name, for errors."""
    if not _is_leaf_and_note(returned):
        parts = (
            [type(part).__name__ for part in returned]
            if isinstance(returned, tuple)
            else type(returned).__name__
        )
        raise QlabError(
            f"{step} returned {parts}; return (tensor or QTensor, notes), notes a mapping that "
            "may be empty"
        )
    leaf, note = returned
    try:
        note = json.loads(json.dumps(dict(note), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise QlabError(
            f"{step} notes what no report holds ({error}); note numbers and texts"
        ) from error
    taken = sorted(MEASURED & note.keys())
    if taken:
        raise QlabError(
            f"{step} notes {taken[0]!r}, which is measured and not said by a step; choose another "
            "name"
        )
    return _copy(leaf), note


def _is_leaf_and_note(returned: Any) -> bool:
    if not isinstance(returned, tuple) or len(returned) != 2:
        return False
    return is_leaf(returned[0]) and isinstance(returned[1], Mapping)


def _refuse_unplanned(leaf: Leaf, spec: Spec | None, step: str) -> None:
    codes = proper(leaf)
    actual = codes.spec if isinstance(codes, QTensor) else None
    as_planned = same_grid(actual, spec) if actual and spec else actual is spec
    if not as_planned:
        planned = f"is to round to {spec}" if spec else "is to round nothing"
        raise QlabError(
            f"{step} made {actual or 'plain numbers'} and {planned}, which is what was planned; "
            "return a QTensor of the spec, or a tensor where each_weight has none"
        )


def _refuse_nonfinite(leaf: Leaf, step: str) -> None:
    if isinstance(leaf, Tensor):
        if not torch.isfinite(leaf).all():
            raise QlabError(f"{step} a weight that holds NaN or Inf")
        return
    codes = proper(leaf)
    if isinstance(codes, QTensor) and not torch.isfinite(codes.scales.float()).all():
        raise QlabError(
            f"{step} scales that {codes.scales.dtype} does not hold (NaN or Inf); choose another "
            "scale dtype"
        )
    # Codes that are finite have a finite sum with finite scales, so only others are made dense.
    if codes is not leaf or not isinstance(codes, QTensor):
        _refuse_nonfinite(dense(leaf, torch.float32), step)


# ------------------------------------------------------------------ global scales
def outer_scales(graph: ModuleGraph, spec: Spec | None) -> dict[str, Tensor]:
    """Site path -> the outer scale that the site shares with the other sites of its source. Empty
    where the spec has no outer scale."""
    if spec is None or not spec.outer:
        return {}
    groups: dict[Any, list[Site]] = {}
    for site in graph.sites:
        if site.path not in graph.outers:
            experts = graph.weight_ok(site).shape[:-2]
            groups.setdefault((site.source, experts), []).append(site)
    outers = dict(graph.outers)
    for sites in groups.values():
        outer = shared_outer(map(graph.weight_ok, sites), spec)
        if outer is not None:
            outers |= {site.path: outer for site in sites}
    return outers


# ------------------------------------------------------------------ errors and notes
def errors_of(W_ok: Tensor, leaf: Leaf, moment: Moment | None) -> Errors:
    """How far a leaf [o, k] is from its weight."""
    D_ok = dense(leaf, torch.float32) - W_ok
    steps = 0.0
    codes = proper(leaf)
    if isinstance(codes, QTensor) and codes.perm is None:
        steps = largest_step(codes, D_ok)
    errors = Errors(D=float(D_ok.norm()), W=float(W_ok.norm()), steps=steps)
    if moment is None:
        return errors
    return replace(
        errors,
        D_H=moment.output_error(D_ok),
        W_H=moment.output_error(W_ok),
        tokens=moment.tokens,
        channels=len(moment.sum_kk),
    )


def errors_in_notes(parts: Sequence[Errors]) -> dict[str, Any]:
    """What the report says of a site's errors. parts: one per expert, or one in all. Losses of
    experts are weighted by their tokens."""
    error = math.hypot(*(part.D for part in parts))
    size = math.hypot(*(part.W for part in parts))
    notes: dict[str, Any] = {
        "weight_error": error / max(size, 1e-30),
        "largest_step": max(part.steps for part in parts),
    }
    counts = [part.tokens for part in parts if part.tokens is not None]
    if not counts:
        return notes
    notes["tokens"] = sum(counts)
    shares = [tokens / max(notes["tokens"], 1) for tokens in counts]
    D_H = sum(part.D_H * share for part, share in zip(parts, shares))
    W_H = sum(part.W_H * share for part, share in zip(parts, shares))
    notes["loss"] = D_H / max(W_H, 1e-30)
    if len(parts) > 1:
        notes["expert_tokens"] = counts
        # With fewer tokens than input channels, an expert's second moment is singular.
        notes["experts_with_few_tokens"] = [
            e
            for e, part in enumerate(parts)
            if part.tokens is not None and part.tokens < part.channels
        ]
    return notes


def merged(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a step notes of the experts of a site: one value where all agree, otherwise a list."""
    lists = {key: [note[key] for note in notes] for key in notes[0]}
    return {
        key: values[0] if all(value == values[0] for value in values) else values
        for key, values in lists.items()
    }
