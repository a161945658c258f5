"""One weight under a step that rounds: what the step is given, what it may return, and what is
noted of the errors that it made."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.qtensor import Leaf, QTensor, dense, largest_step, shared_outer
from qlab.algebra.spec import Spec, same_grid, with_scale_dtype
from qlab.algebra.stats import Moment
from qlab.errors import QlabError

# what a report says of a weight, whatever a step notes
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
WeightFn = Callable[[Tensor, Mapping[str, Any], Any], tuple[Leaf, Mapping[str, Any]]]


@dataclass(frozen=True)
class Errors:
    """|D|, |W| and the largest error in steps; of the second moment, if it was seen: tr(D H D^T),
    tr(W H W^T), tokens and channels."""

    D: float
    W: float
    steps: float = 0.0
    D_H: float = 0.0
    W_H: float = 0.0
    tokens: int | None = None
    channels: int = 0


@dataclass(frozen=True)
class Solved:
    leaf: Leaf
    note: Mapping[str, Any]
    errors: Errors


class Copies(Mapping[str, Any]):
    """Statistics as a step is handed them: of each a copy, made when it is asked for, which the
    step may write to."""

    def __init__(self, held: Mapping[str, Any]):
        self.held = held

    def __getitem__(self, name: str) -> Any:
        if name not in self.held:
            known = ", ".join(map(repr, self.held))
            raise QlabError(
                f"the step asks for the statistic {name!r} and has {known}; name it in `needs`"
            )
        return _copy(self.held[name])

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.held else default

    def __contains__(self, name: object) -> bool:
        return name in self.held

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def _copy(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, value)


def solve(
    name: str,
    fn: WeightFn,
    spec: Spec | None,
    graph: ModuleGraph,
    site: Site,
    seen: Mapping[str, Any],
    expert: int | None = None,
) -> Solved:
    """What the step `name` makes of one weight, and how far that is from it; refuses what no file
    and no report holds.

    The step gets copies and its leaf is copied, so that whatever it writes to, then or later, is
    its own.
    """
    where = graph.where(site)
    W_ok = graph.weight_ok(site, expert)
    if not torch.isfinite(W_ok).all():
        raise QlabError(
            f"{where}.weight holds NaN or Inf; repair the checkpoint or keep() this site"
        )
    if graph.shares_memory(site):
        W_ok = W_ok.clone()
    try:
        made = fn(W_ok, Copies(seen), with_scale_dtype(spec, graph.dtype) if spec else None)
    except QlabError as error:
        raise QlabError(
            f"{where}{'' if expert is None else f', expert {expert}'}: {error}"
        ) from error
    del W_ok
    leaf, note = _leaf_and_note(made, f"{where}: {name}")
    W_ok = graph.weight_ok(site, expert)
    if leaf.shape != W_ok.shape:
        raise QlabError(
            f"{where}: {name} made a weight {tuple(leaf.shape)} of one {tuple(W_ok.shape)}"
        )
    _refuse_nonfinite(leaf, f"{where}: {name} made")
    _refuse_unplanned(leaf, spec, f"{where}: {name}")
    return Solved(leaf, note, _errors(W_ok, leaf, seen.get("second_moment")))


def _refuse_unplanned(leaf: Leaf, spec: Spec | None, said: str) -> None:
    found = leaf.spec if isinstance(leaf, QTensor) else None
    if (found is None) != (spec is None) or (found and spec and not same_grid(found, spec)):
        planned = f"is to round to {spec}" if spec else "is to round nothing"
        raise QlabError(
            f"{said} made {found or 'plain numbers'} and {planned}, which is what was planned; "
            "return a QTensor of the spec, or a tensor where each_weight has none"
        )


def _leaf_and_note(made: Any, said: str) -> tuple[Leaf, Mapping[str, Any]]:
    """What a step returned, taken apart and copied."""
    if not (
        isinstance(made, tuple)
        and len(made) == 2
        and isinstance(made[0], Tensor | QTensor)
        and isinstance(made[1], Mapping)
    ):
        parts = (
            [type(part).__name__ for part in made]
            if isinstance(made, tuple)
            else type(made).__name__
        )
        raise QlabError(
            f"{said} returned {parts}; return (tensor or QTensor, notes), notes a mapping that "
            "may be empty"
        )
    try:
        note = json.loads(json.dumps(dict(made[1]), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise QlabError(
            f"{said} notes what no report holds ({error}); note numbers and texts"
        ) from error
    if taken := sorted(MEASURED & note.keys()):
        raise QlabError(
            f"{said} notes {taken[0]!r}, which is measured and not said by a step; choose another "
            "name"
        )
    return _copy(made[0]), note


def _refuse_nonfinite(leaf: Leaf, said: str) -> None:
    if isinstance(leaf, Tensor):
        if not torch.isfinite(leaf).all():
            raise QlabError(f"{said} a weight that holds NaN or Inf")
    elif not torch.isfinite(leaf.scales.float()).all():
        raise QlabError(
            f"{said} scales that {leaf.scales.dtype} does not hold (NaN or Inf); choose another "
            "scale dtype"
        )


def outer_scales(graph: ModuleGraph, spec: Spec | None) -> dict[str, Tensor]:
    """Site path -> the outer scale that it shares with the sites of its source; empty where the
    spec has none."""
    if spec is None or not spec.outer:
        return {}
    groups: dict[Any, list[Site]] = {}
    for site in (s for s in graph.sites if s.path not in graph.outers):
        groups.setdefault((site.source, graph.weight_ok(site).shape[:-2]), []).append(site)
    shared = [(sites, shared_outer(map(graph.weight_ok, sites), spec)) for sites in groups.values()]
    return {
        **graph.outers,
        **{site.path: outer for sites, outer in shared for site in sites if outer is not None},
    }


def stacked(leaves: Sequence[Leaf]) -> Leaf:
    """Leaves [o, k] of all experts as one [e, o, k]."""
    return pytree.tree_map(lambda *parts: None if parts[0] is None else torch.stack(parts), *leaves)


def _errors(W_ok: Tensor, leaf: Leaf, moment: Moment | None) -> Errors:
    D_ok = dense(leaf, torch.float32) - W_ok
    norms = (
        float(D_ok.norm()),
        float(W_ok.norm()),
        largest_step(leaf, D_ok) if isinstance(leaf, QTensor) and leaf.perm is None else 0.0,
    )
    if moment is None:
        return Errors(*norms)
    return Errors(
        *norms,
        moment.output_error(D_ok),
        moment.output_error(W_ok),
        moment.tokens,
        len(moment.sum_kk),
    )


def errors_in_notes(parts: Sequence[Errors]) -> dict[str, Any]:
    """The errors of one site, over all of its experts if it has some, each weighted by its
    tokens."""
    notes: dict[str, Any] = {
        "weight_error": math.hypot(*(p.D for p in parts))
        / max(math.hypot(*(p.W for p in parts)), 1e-30)
    }
    notes["largest_step"] = max(p.steps for p in parts)
    counts = [p.tokens for p in parts if p.tokens is not None]
    if counts:
        notes["tokens"] = sum(counts)
        share = [tokens / max(notes["tokens"], 1) for tokens in counts]
        D_H, W_H = (
            sum(q * s for q, s in zip(values, share))
            for values in ((p.D_H for p in parts), (p.W_H for p in parts))
        )
        notes["loss"] = D_H / max(W_H, 1e-30)
    if counts and len(parts) > 1:
        # with fewer tokens than input channels an expert's second moment is singular
        few = [e for e, p in enumerate(parts) if p.tokens is not None and p.tokens < p.channels]
        notes |= {"expert_tokens": counts, "experts_with_few_tokens": few}
    return notes


def merged(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a method says of its experts: one value where all agree, else a list."""
    values = {key: [note[key] for note in notes] for key in notes[0]}
    return {
        key: found[0] if all(v == found[0] for v in found) else found
        for key, found in values.items()
    }
