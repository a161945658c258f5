"""One site under a step that makes its weight anew: what the step is given, and what of its result
is taken.

Legend: W_ok a weight in fp32.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.called import Failed, called
from qlab.algebra.cell import Cell, Feasible, Misfit, Weight, refuse_misfit, refuse_support
from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.leaf import Structured, is_leaf, proper
from qlab.algebra.measured import Errors, errors_in_notes, errors_of, merged, noted_by_step
from qlab.algebra.qtensor import QTensor, shared_outer
from qlab.algebra.spec import Spec, with_scale_dtype
from qlab.algebra.statistic import in_turn
from qlab.errors import QlabError

Leaf = Tensor | Structured
WeightFn = Callable[[Tensor, Mapping[str, Any], Any], tuple[Leaf, Mapping[str, Any]]]
CellFn = Callable[[Weight], Cell]


@dataclass(frozen=True)
class Step:
    """A step that makes each weight anew: fn(weight) -> cell. Where it rounds nothing, spec is
    None.

    of_arrays: it sees dense weights alone, and its errors are those from the weight that it was
    given; those of other steps are from the target.
    """

    name: str
    fn: CellFn
    spec: Spec | None
    of_arrays: bool = False


@dataclass(frozen=True, kw_only=True)
class Solved:
    """What a step made of one weight [o, k].

    Of leaf, target and support each is None where the step left it alone; a leaf that is its own
    target is that target. note: what the step says.
    """

    leaf: Any
    target: Tensor | None
    support: Tensor | None
    note: Mapping[str, Any]
    errors: Errors


@dataclass(frozen=True, kw_only=True)
class Placed:
    """The same of a site, as a graph holds it: leaf and target in the site's layout, the support
    [..., o, k], each None where the graph's own stays. aimed: the target is another."""

    leaf: Any
    target: Tensor | None
    aimed: bool
    support: Tensor | None
    note: dict[str, Any]


class Copies(Mapping[str, Any]):
    """Statistics as a step gets them: copies, made when they are asked for, which it may write
    to. where: what they are of, for errors."""

    def __init__(self, states: Mapping[str, Any], where: str = ""):
        self.states, self.where = states, where

    def __getitem__(self, name: str) -> Any:
        if name not in self.states:
            known = ", ".join(map(repr, self.states)) or "none"
            raise QlabError(
                f"{self.where}the step asks for the statistic {name!r} and has {known}; name it in "
                "`needs`"
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


def of_arrays(fn: WeightFn) -> CellFn:
    """A step of cells from a function of arrays: fn(W_ok, statistics, spec) -> (leaf, notes).

    Where it rounds nothing, the tensor that it makes is what later steps aim at.
    """

    def on_cell(weight: Weight) -> Cell:
        cell = weight.cell
        returned = fn(cell.leaf, weight.stats, cell.feasible.spec)  # type: ignore[arg-type]
        if not _is_leaf_and_note(returned):
            parts = (
                [type(part).__name__ for part in returned]
                if isinstance(returned, tuple)
                else type(returned).__name__
            )
            raise Misfit(
                f"{cell.name}: {cell.step} returned {parts}; return (tensor or QTensor, notes), "
                "notes a mapping that may be empty"
            )
        leaf, notes = returned
        target = cell.target
        if cell.feasible.spec is None and isinstance(leaf, Tensor):
            target = leaf
        return replace(cell, leaf=leaf, target=target, notes=notes)

    return on_cell


def _is_leaf_and_note(returned: Any) -> bool:
    if not isinstance(returned, tuple) or len(returned) != 2:
        return False
    return is_leaf(returned[0]) and isinstance(returned[1], Mapping)


# ------------------------------------------------------------------ a site
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
    given = _given(step, graph, site, expert)
    codes = proper(given.leaf)
    # Codes go on with the global scale that they have.
    stats = {**seen, "outer": codes.outer} if isinstance(codes, QTensor) else seen
    returned = _returned(step, Weight(where, given, Copies(stats), expert))
    leaf, note = _leaf_and_note(returned, f"{where}: {step.name}")
    _refuse_other_grid(given, returned)
    is_target = returned.target is returned.leaf and isinstance(leaf, Tensor)
    own = is_target and (step.of_arrays or returned.target is not given.target)
    aimed = None if own or returned.target is given.target else _copy(returned.target)
    support = None if returned.support is given.support else _copy(returned.support)
    same = returned.leaf is given.leaf and not step.of_arrays
    # The step may have written to what it was given, so the graph's own is measured against.
    del given, returned
    true = _cell(step, graph, site, expert)
    if support is not None:
        refuse_support(true, support)
        true = replace(true, feasible=replace(true.feasible, support=support))
    refuse_misfit(leaf, true)
    if aimed is not None:
        true = true.aim(aimed)
    return Solved(
        leaf=None if same and _equal(leaf, graph.leaf_ok(site, expert)) else leaf,
        target=cast(Tensor, leaf) if own else aimed,
        support=support,
        note=note,
        errors=errors_of(true.target, leaf, seen.get("second_moment")),
    )


def _returned(step: Step, weight: Weight) -> Cell:
    """What the step returns, with refusals of its own by the name of the weight."""
    where = weight.name if weight.expert is None else f"{weight.name}, expert {weight.expert}"
    try:
        returned = called(f"{where}: {step.name}", step.fn, weight)
    except (Misfit, Failed):
        raise
    except QlabError as error:
        raise QlabError(f"{where}: {error}") from error
    if not isinstance(returned, Cell):
        raise QlabError(
            f"{weight.name}: {step.name} returned a {type(returned).__name__}; return a cell, such "
            "as weight.cell.put(leaf)"
        )
    return returned


def _refuse_other_grid(given: Cell, returned: Cell) -> None:
    """Refuse a grid that the step was not planned with, which nothing behind it would see."""
    before, after = given.feasible.spec, returned.feasible.spec
    if before is None and after is not None:
        raise Misfit(
            f"{given.name}: {given.step} narrows the grid to {after}, and was planned without one; "
            "give each_cell that spec, or choose a rounding per weight with qlab.rules"
        )


def _cell(step: Step, graph: ModuleGraph, site: Site, expert: int | None) -> Cell:
    """The cell of one weight under a step, on the step's grid. Its tensors may be the graph's."""
    leaf = graph.weight_ok(site, expert) if step.of_arrays else graph.leaf_ok(site, expert)
    is_target = step.of_arrays or site.weight not in graph.targets
    target = leaf if isinstance(leaf, Tensor) and is_target else graph.target_ok(site, expert)
    codes = proper(leaf)
    spec = codes.spec if isinstance(codes, QTensor) else None
    if step.spec and not isinstance(leaf, Tensor):
        raise QlabError(
            f"{graph.where(site)} is quantized already; give each site one rounding method"
        )
    if step.spec:
        spec = with_scale_dtype(step.spec, graph.dtype)
    feasible = Feasible(spec, graph.support_ok(site, expert))
    return Cell(target=target, leaf=leaf, feasible=feasible, name=graph.where(site), step=step.name)


def _given(step: Step, graph: ModuleGraph, site: Site, expert: int | None) -> Cell:
    """The cell that a step gets: copies, which it may write to. Refuses NaN and Inf."""
    cell = _cell(step, graph, site, expert)
    W_ok, target, support = cell.leaf, cell.target, cell.support
    own = target is W_ok
    if isinstance(W_ok, Tensor):
        # the sum is the cheaper question
        if not W_ok.sum().isfinite() and not torch.isfinite(W_ok).all():
            raise QlabError(
                f"{cell.name}.weight holds NaN or Inf; repair the checkpoint or keep() this site"
            )
        if graph.shares_memory(site):
            W_ok = W_ok.clone()
    else:
        W_ok = _copy(W_ok)
    feasible = cell.feasible if support is None else replace(cell.feasible, support=support.clone())
    return replace(cell, leaf=W_ok, target=W_ok if own else target.clone(), feasible=feasible)


def _leaf_and_note(cell: Cell, step: str) -> tuple[Leaf, Mapping[str, Any]]:
    """A copy of the leaf that a step returned, and its notes as JSON holds them. step: where it
    stands and its name, for errors."""
    return _copy(cell.leaf), noted_by_step(step, cell.notes)


def _equal(a: Any, b: Any) -> bool:
    """Whether two leaves are the same, bit for bit."""
    ours, theirs = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return all(torch.equal(x, y) for x, y in zip(ours, theirs) if isinstance(x, Tensor))


# ------------------------------------------------------------------ global scales
def outer_scales(graph: ModuleGraph, spec: Spec | None) -> dict[str, Tensor]:
    """Site path -> the outer scale that the site shares with the other sites of its source. Empty
    where the spec has no outer scale."""
    if spec is None or not spec.outer:
        return {}
    groups: dict[Any, list[Site]] = {}
    for site in graph.sites:
        dense_yet = isinstance(graph.params[site.weight or ""], Tensor)
        if site.path not in graph.outers and dense_yet:
            experts = graph.weight_ok(site).shape[:-2]
            groups.setdefault((site.source, experts), []).append(site)
    outers = dict(graph.outers)
    for sites in groups.values():
        outer = shared_outer(map(graph.weight_ok, sites), spec)
        if outer is not None:
            outers |= {site.path: outer for site in sites}
    return outers
