"""One weight under a step that makes it anew: what the step is given, and what of its result is
taken.

Legend: W_ok a weight in fp32.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.called import Failed, called
from qlab.algebra.cell import Cell, Feasible, Misfit, Weight, refuse_misfit, refuse_support
from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.leaf import Structured, is_leaf, proper
from qlab.algebra.measured import (
    AT_ONCE,
    Errors,
    errors_of,
    joined_errors,
    merged,
    noted_by_step,
)
from qlab.algebra.qtensor import QTensor, joined_rows, shared_outer
from qlab.algebra.spec import Spec, with_scale_dtype
from qlab.algebra.statistic import Elsewhere, here
from qlab.errors import QlabError

Leaf = Tensor | Structured
WeightFn = Callable[[Tensor, Mapping[str, Any], Any], tuple[Leaf, Mapping[str, Any]]]
CellFn = Callable[[Weight], Cell]
Fused = Callable[[Tensor, Spec], tuple[QTensor, Errors] | None]


@dataclass(frozen=True)
class Step:
    """A step that makes each weight anew: fn(weight) -> cell. Where it rounds nothing, spec is
    None.

    of_arrays: it sees dense weights alone, and its errors are those from the weight that it was
    given; those of other steps are from the target. by_rows: it rounds the rows of each tile by
    themselves, so that it may be given a weight in parts of its rows. fused: fused(W_ok, spec) is
    the same leaf with its errors, of a weight in its own dtype, or None for weights that it does
    not take; of steps that note `note` of every weight.
    """

    name: str
    fn: CellFn
    spec: Spec | None
    of_arrays: bool = False
    by_rows: bool = False
    fused: Fused | None = None
    note: Mapping[str, Any] = field(default_factory=dict)


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
    if isinstance(value, Elsewhere):
        return value.read()
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


# ------------------------------------------------------------------ one weight
def solve_weight(
    step: Step,
    graph: ModuleGraph,
    site: Site,
    seen: Mapping[str, Any],
    expert: int | None = None,
) -> Solved:
    """What the step makes of one weight, and its errors. Refuses what no file or report can hold.

    A step by rows makes it in parts, each from the cast to fp32 to its errors.
    """
    fused = _fused(step, graph, site, expert)
    if fused is not None:
        return fused
    W = graph.params[site.weight or ""]
    if not step.by_rows or step.spec is None or not isinstance(W, Tensor):
        return _solve_rows(step, graph, site, seen, expert)
    o, k = W.shape[-2:]
    shape = torch.Size((k, o) if site.layout.endswith("k o") else (o, k))
    parts = [
        _solve_rows(step, _with_rows(graph, site, rows), site, seen, expert)
        for rows, _ in step.spec.tile.parts(shape, AT_ONCE)
    ]
    if len(parts) == 1:
        return parts[0]
    return Solved(
        leaf=joined_rows([part.leaf for part in parts]),
        target=None,
        support=None,
        note=merged([part.note for part in parts]),
        errors=joined_errors([part.errors for part in parts]),
    )


def _fused(step: Step, graph: ModuleGraph, site: Site, expert: int | None) -> Solved | None:
    """`solve_weight` in one pass, where the step has one that takes the weight. What it makes is
    its own and on the grid, so that nothing is copied or asked of it."""
    W, masked = graph.params[site.weight or ""], site.weight in graph.supports
    if step.fused is None or step.spec is None or masked or not isinstance(W, Tensor):
        return None
    W_ok = W if expert is None else W[expert]
    W_ok = W_ok.mT if site.layout.endswith("k o") else W_ok
    made = step.fused(W_ok, with_scale_dtype(step.spec, graph.dtype))
    if made is None:
        return None
    leaf, errors = made
    return Solved(leaf=leaf, target=None, support=None, note=step.note, errors=errors)


def _with_rows(graph: ModuleGraph, site: Site, rows: slice) -> ModuleGraph:
    """The graph with some rows of a site's dense weight, its target and its support."""
    name = site.weight or ""
    rows_of_leaf = (..., rows) if site.layout.endswith("k o") else (..., rows, slice(None))

    def cut(tensors: Mapping[str, Any], index: Any) -> dict[str, Any]:
        return {**tensors, name: tensors[name][index]} if name in tensors else dict(tensors)

    return replace(
        graph,
        params=cut(graph.params, rows_of_leaf),
        targets=cut(graph.targets, rows_of_leaf),
        supports=cut(graph.supports, (..., rows, slice(None))),
    )


def _solve_rows(
    step: Step,
    graph: ModuleGraph,
    site: Site,
    seen: Mapping[str, Any],
    expert: int | None,
) -> Solved:
    """`solve_weight` of all rows of the graph's weight.

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
    del codes, given, returned
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
        errors=errors_of(true.target, leaf, here(seen.get("second_moment"))),
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
