"""A quantizer is a tuple of pure stages (graph, stats) -> (graph, stats).

`chain` concatenates such tuples, `at` and `rules` narrow their stages to some sites, and
`each_weight` makes a stage of a function of one weight. `qlab.algebra.running` runs a stage.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.operations import Operations
from qlab.algebra.placing import solve
from qlab.algebra.rounding import CellFn, Fused, Step, WeightFn, of_arrays, outer_scales
from qlab.algebra.scope import Scope
from qlab.algebra.spec import Spec
from qlab.algebra.stats import COMPARING, Need, Stats, name_of, named
from qlab.algebra.views import EachWeight, EverySegment, Uncovered, View, WholeSegment
from qlab.errors import QlabError

Apply = Callable[[ModuleGraph, Stats], tuple[ModuleGraph, Stats]]


@dataclass(frozen=True)
class Stage:
    """One pure step of a transform.

    name: as reports and errors call it. needs: the statistics that it reads. apply: the step
    itself. view: what it sees, from which follows when it runs and what is checked of it. spec: the
    grid it rounds to; None where it rounds nothing. detail: its settings in words. scope: the sites
    that it may touch. workspace: how many fp32 matrices [k, k] it holds at once beside its
    statistics. at_once: the numbers of a weight of which it makes copies at once, where it solves
    rows in parts (None: all). operations: how many it takes for one weight; None where nobody has
    said.
    """

    name: str
    needs: frozenset[Need]
    apply: Apply
    view: View = field(default_factory=WholeSegment)
    _: KW_ONLY
    spec: Spec | None = None
    detail: str = ""
    scope: Scope = field(default_factory=Scope)
    workspace: int = 1
    at_once: int | None = None
    operations: Operations | None = None

    def wants(self, site: Site) -> frozenset[Need]:
        """The statistics that it reads of this site's input. Routed experts have no drift: their
        rows have no counterpart in the reference model."""
        return self.needs - COMPARING if site.route else self.needs

    def touches(self, name: str, site: Site) -> bool:
        """Whether it may change the site of this full name. Routers are never rounded, and need no
        rule."""
        rounds = self.spec is not None or isinstance(self.view, Uncovered)
        return (
            site.outside == self.scope.outside
            and name in self.scope
            and not (site.router and rounds)
        )


Transform = tuple[Stage, ...]


def costing(transform: Transform, operations: Operations) -> Transform:
    """The transform whose steps each declare so many operations for a weight."""
    return tuple(replace(stage, operations=operations) for stage in transform)


def unchanged(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
    """The step that changes nothing."""
    return graph, stats


def makes_weights(recipe: Transform) -> bool:
    """Whether some stage makes other weights than the model's: codes, or dense ones of another
    function, as a mask and learning do, or those of another basis of the whole model."""
    return any(
        stage.spec is not None
        or isinstance(stage.view, EverySegment)
        or not (
            stage.view.keeps_function
            or stage.view.operations
            or stage.view.wires is not None
            or stage.apply is unchanged
        )
        for stage in recipe
    )


def puts_on_values(recipe: Transform) -> bool:
    """Whether some stage puts operations on values that are no inputs of weights, and says which:
    what attention reads is rounded."""
    return any(
        stage.view.wires is not None
        and not stage.view.wires.endswith(":in")
        and stage.view.operations
        and not stage.view.keeps_function
        for stage in recipe
    )


def chain(*transforms: Transform) -> Transform:
    """One transform after the other. chain() is the identity, and chain is associative.

    Args:
        *transforms: in the order in which they run.

    Returns:
        The transform that runs all of their stages.

    Example:
        >>> import qlab
        >>> int4 = qlab.parse_spec("int4-g64")
        >>> [stage.name for stage in qlab.chain(qlab.awq_scale(int4), qlab.gptq(int4))]
        ['awq_scale', 'absorb', 'gptq']
    """
    return sum(transforms, ())


def at(pattern: str, transform: Transform) -> Transform:
    """The transform on those sites alone whose full name matches a pattern.

    Args:
        pattern: a glob over full names ("*.mlp.*"), or "re:" and a regular expression that matches
            the whole name.
        transform: what to restrict. Restrictions add up: a site has to match all of them.

    Returns:
        The restricted transform.

    Example:
        >>> import qlab
        >>> (stage,) = qlab.at("*.mlp.*", qlab.rtn(qlab.parse_spec("int4-g64")))
        >>> str(stage.scope)
        '*.mlp.*'
    """
    return tuple(
        replace(stage, scope=replace(stage.scope, include=(pattern, *stage.scope.include)))
        for stage in transform
    )


def outside(transform: Transform) -> Transform:
    """The transform on the linears around the blocks (a vision tower, a projector, the head).

    All other transforms leave those as they are. Nothing runs around the blocks, so each stage has
    to work on one weight at a time, without data.

    Args:
        transform: rtn or hqq, or stages of your own that need no statistics.

    Returns:
        The transform, for those linears and no others.

    Raises:
        QlabError: a stage observes inputs, or changes more than weights.

    Example:
        >>> import qlab
        >>> (stage,) = qlab.outside(qlab.rtn(qlab.parse_spec("int8-channel")))
        >>> str(stage.scope)
        'every site around the blocks'
    """
    for stage in transform:
        if stage.needs or stage.view.operations or not stage.view.site_by_site:
            reason = (
                f"observes {', '.join(sorted(map(name_of, stage.needs)))}"
                if stage.needs
                else "changes more than weights"
            )
            raise QlabError(
                f"the stage {stage.name!r} {reason}, and weights around the blocks are rounded "
                "one by one without data; use rtn or hqq for them"
            )
    return tuple(replace(stage, scope=replace(stage.scope, outside=True)) for stage in transform)


def keep() -> Transform:
    """Leave sites as they are: a rule for layers that are not quantized.

    Returns:
        A transform that changes nothing.

    Example:
        >>> import qlab
        >>> [stage.name for stage in qlab.keep()]
        ['keep']
    """
    return (Stage("keep", frozenset(), unchanged, EachWeight()),)


def rules(table: Mapping[str, Transform]) -> Transform:
    """One transform per pattern, where the first pattern that matches a site decides.

    Args:
        table: pattern (see `at`) -> transform, in order of precedence.

    Returns:
        The transform. A pattern that matches no site, and a site that matches no pattern, are
        errors when it is planned or applied.

    Example:
        >>> import qlab
        >>> int4 = qlab.parse_spec("int4-g64")
        >>> for stage in qlab.rules({"*.mlp.*": qlab.rtn(int4), "*": qlab.keep()}):
        ...     print(stage.name, "at", stage.scope)
        rtn at *.mlp.*
        keep at * and not *.mlp.*
        rules at not *.mlp.* and not *
    """
    stages: list[Stage] = []
    earlier: tuple[str, ...] = ()
    for pattern, transform in table.items():
        for stage in at(pattern, transform or keep()):
            scope = replace(stage.scope, exclude=stage.scope.exclude + earlier)
            stages.append(replace(stage, scope=scope))
        earlier = (*earlier, pattern)
    last = Stage(
        "rules",
        frozenset(),
        unchanged,
        Uncovered(),
        scope=Scope(exclude=earlier),
    )
    return (*stages, last)


def each_weight(
    name: str,
    fn: WeightFn,
    spec: Spec | None,
    needs: Iterable[Need] = frozenset(),
    detail: str = "",
) -> Transform:
    """A method from a function of one weight: fn(W_ok, stats, spec) -> (leaf, notes).

    Every selected weight but routers becomes the leaf. Zeros that a stage without a spec makes are
    kept by the stages behind it, or those are refused.

    Args:
        name: the stage's name in plans, reports and errors.
        fn: gets W_ok, the weight in fp32 [o, k], its statistics by name, and the spec with its
            scale dtype filled in. Those are copies, which it may write to. It returns a QTensor of
            that spec, or a tensor [o, k] where the spec is None, and notes for the report: numbers
            and texts by name. Beside what it needs, the statistics hold "outer": the global scale
            [1] of an nvfp4 spec, one for all selected weights of an input, since engines fuse them
            (q, k and v; gate and up). It is None for other specs.
        spec: the grid that fn rounds to; None where it rounds nothing, as a mask does.
        needs: statistics of the weight's input, of qlab.algebra.stats.STATS: "second_moment",
            "drift", "held_out", "absmax", "absmean", "minmax", "sample"; and of your own, as
            qlab.Stat.
        detail: settings in words, for plans and reports.

    Returns:
        A transform of one stage. Its report holds the notes, the relative error `|W - W'| / |W|`,
        the largest error in steps and, with "second_moment", the loss tr(D H D^T) / tr(W H W^T)
        with D = W' - W.

    Example:
        >>> import qlab
        >>> def prune(W_ok, stats, spec):
        ...     small = W_ok.abs() < W_ok.abs().median()
        ...     return W_ok.masked_fill(small, 0), {"pruned": float(small.float().mean())}
        >>> mask = qlab.each_weight("prune", prune, spec=None)
        >>> [stage.name for stage in qlab.chain(mask, qlab.rtn(qlab.parse_spec("int4-g64")))]
        ['prune', 'rtn']
    """
    step = Step(name, of_arrays(fn), spec, of_arrays=True)
    return _each(step, named(needs), detail, EachWeight())


def each_row(
    name: str,
    fn: WeightFn,
    spec: Spec,
    detail: str = "",
    note: Mapping[str, Any] | None = None,
    fused: Fused | None = None,
) -> Transform:
    """`each_weight` for a method without data that rounds the rows of each tile by themselves: fn
    is given a large weight in parts of its rows, and its notes are the same for all of them. note,
    fused: see `Step`."""
    made = of_arrays(fn)
    step = Step(name, made, spec, of_arrays=True, by_rows=True, fused=fused, note=note or {})
    return _each(step, frozenset(), detail, EachWeight())


def each_cell(
    name: str,
    fn: CellFn,
    needs: Iterable[Need] = (),
    spec: Spec | None = None,
    detail: str = "",
    leaves: str = "",
    beside: Callable[[torch.Size, Spec | None], float] | None = None,
) -> Transform:
    """A method from a function of one cell: fn(weight) -> cell.

    A cell is a weight with its target, the leaf that holds it now, and where it may lie (grid and
    support); of a mixture of experts one expert's at a time. The function puts a leaf into it
    (`cell.put`), narrows it (`cell.narrow`) or aims it elsewhere (`cell.aim`). A step without a
    spec that narrows the support is a mask, which every later step keeps; one that puts codes where
    a step before it rounded improves them, on the same grid.

    Args:
        name: the stage's name in plans, reports and errors.
        fn: gets `weight`, with weight.cell, weight.stats (statistics by name, and "outer", the
            global scale of an nvfp4 spec), weight.name and weight.expert. All tensors are copies,
            which it may write to. It returns a cell. cell.feasible.spec is the grid with its scale
            dtype filled in, and cell.support the mask.
        needs: statistics of the weight's input, as in `each_weight`.
        spec: the grid that fn rounds to; None where it rounds nothing.
        detail: settings in words, for plans and reports.
        leaves: what it puts that is neither a tensor nor codes, in words such as "a low rank". No
            format holds such a leaf, so a plan refuses to write the recipe.
        beside: (shape [..., o, k], spec or None) -> the bits of that which stand beside the codes,
            as plans count them.

    Returns:
        A transform of one stage. Its report holds the notes, and the errors from the target as in
        `each_weight`.

    Raises:
        QlabError: when it runs, and what fn returns is no cell, is off the grid or off the support,
            is of another shape, or holds NaN or Inf.

    Example:
        >>> import qlab
        >>> def larger_half(weight):
        ...     size = weight.cell.target.abs()
        ...     return weight.cell.narrow(support=size >= size.median())
        >>> mask = qlab.each_cell("larger_half", larger_half)
        >>> [stage.name for stage in qlab.chain(mask, qlab.gptq("int4-g64"))]
        ['larger_half', 'gptq']
    """
    view = EachWeight(leaves, beside)
    return _each(Step(name, fn, spec), named(needs), detail, view)


def _each(step: Step, needs: frozenset[Need], detail: str, view: EachWeight) -> Transform:
    """The transform of one stage that runs the step on every selected weight but routers."""

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        leaves: dict[str, Any] = {}
        notes, targets, supports = dict(graph.notes), {}, dict(graph.supports)
        outers = outer_scales(graph, step.spec)
        for site in graph.sites:
            if site.router:
                continue
            assert site.weight is not None  # every site of a program has one
            seen = {name_of(need): stats[site.source, need] for need in needs}
            new = solve(step, graph, site, seen, outers.get(site.path))
            notes[site.path] = {**notes.get(site.path, {}), **new.note}
            if new.leaf is not None:
                leaves[site.weight] = new.leaf
                if not new.aimed:
                    before = graph.targets.get(site.weight, graph.params[site.weight])
                    targets[site.weight] = before
            if new.target is not None:
                targets[site.weight] = new.target
            if new.support is not None:
                supports[site.weight] = new.support
        after = graph.update(leaves)
        tensors = {name: t for name, t in targets.items() if isinstance(t, Tensor)}
        return (
            replace(after, notes=notes, targets={**after.targets, **tensors}, supports=supports),
            stats,
        )

    view = replace(view, by_expert=True)
    return (Stage(step.name, needs, run, view, spec=step.spec, detail=detail),)
