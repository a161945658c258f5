"""One site under a step that makes its weight anew: one weight, or each of its experts, and what
they become as a graph holds them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.measured import errors_in_notes, merged
from qlab.algebra.rounding import Solved, Step, solve_weight
from qlab.algebra.statistic import in_turn
from qlab.errors import QlabError


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What a step made of a site, as a graph holds it: leaf and target in the site's layout, the
    support [..., o, k], each None where the graph's own stays. aimed: the target is another."""

    leaf: Any
    target: Tensor | None
    aimed: bool
    support: Tensor | None
    note: dict[str, Any]


def solve(
    step: Step,
    graph: ModuleGraph,
    site: Site,
    seen: Mapping[str, Any],
    outer: Tensor | None,
) -> Placed:
    """What the step makes of a site, and what the report says of it.

    seen: the statistics of the site's input; for routed experts, one state per expert. outer: the
    global scale [1], or [e, 1], that the step is told.
    """
    if site.route is None:
        parts = [solve_weight(step, graph, site, {**seen, "outer": outer})]
    else:
        parts = _solve_experts(step, graph, site, seen, outer)
    note = {
        **errors_in_notes([part.errors for part in parts]),
        **merged([part.note for part in parts]),
    }
    aimed = any(part.target is not None for part in parts)
    own = aimed and all(part.target is part.leaf for part in parts)  # each is its own target
    return Placed(
        leaf=_leaf_of(step, graph, site, parts),
        target=_target_of(graph, site, parts) if aimed and not own else None,
        aimed=aimed,
        support=_support_of(graph, site, parts),
        note=note,
    )


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

    def given(e: int) -> dict[str, Any]:
        own = {name: states.states[e] for name, states in seen.items()}
        return {**own, "outer": None if outer is None else outer[e]}

    def run(e: int, own: Mapping[str, Any]) -> Solved:
        return solve_weight(step, graph, site, own, e)

    each = next((states.each for states in seen.values()), in_turn)
    return each(given, run, graph.params[site.weight].shape[0])


def _experts(site: Site, parts: Sequence[Solved]) -> Sequence[int | None]:
    return [None] if site.route is None else range(len(parts))


def _laid(site: Site, leaf: Any) -> Any:
    """A leaf [..., o, k] in the layout of the site, which is that of its tensors alone."""
    turned = isinstance(leaf, Tensor) and site.layout.endswith("k o")
    return leaf.mT.contiguous() if turned else leaf


def _leaf_of(step: Step, graph: ModuleGraph, site: Site, parts: Sequence[Solved]) -> Any:
    if all(part.leaf is None for part in parts):
        return None
    if site.route is None:
        return _laid(site, parts[0].leaf)
    leaves = [
        graph.leaf_ok(site, e) if part.leaf is None else part.leaf
        for e, part in zip(_experts(site, parts), parts)
    ]
    try:
        return _laid(site, _stacked(leaves))
    except QlabError as error:
        raise QlabError(f"{graph.where(site)}: of what {step.name} made {error}") from error


def _target_of(graph: ModuleGraph, site: Site, parts: Sequence[Solved]) -> Tensor:
    targets = [
        graph.target_ok(site, e) if part.target is None else part.target
        for e, part in zip(_experts(site, parts), parts)
    ]
    return _laid(site, targets[0] if site.route is None else torch.stack(targets))


def _support_of(graph: ModuleGraph, site: Site, parts: Sequence[Solved]) -> Tensor | None:
    if all(part.support is None for part in parts):
        return None
    everywhere = next(torch.ones_like(part.support) for part in parts if part.support is not None)
    supports: list[Tensor] = []
    for e, part in zip(_experts(site, parts), parts):
        before = graph.support_ok(site, e)
        supports.append(
            part.support if part.support is not None else everywhere if before is None else before
        )
    return supports[0] if site.route is None else torch.stack(supports)


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
