"""Quantizers are tuples of pure stages (graph, stats) -> (graph, stats); chaining them is tuple
concatenation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from qlab.algebra.claims import Observed, Seal, reads_elsewhere, refuse_others, restored, shown
from qlab.algebra.graph import ModuleGraph, Op, Site
from qlab.algebra.qtensor import QTensor
from qlab.algebra.rounding import WeightFn, errors_in_notes, merged, outer_scales, solve, stacked
from qlab.algebra.scope import Scope
from qlab.algebra.spec import Spec
from qlab.algebra.stats import Stats
from qlab.algebra.zeros import noted, refuse_lost
from qlab.errors import QlabError

Apply = Callable[[ModuleGraph, Stats], tuple[ModuleGraph, Stats]]


@dataclass(frozen=True)
class Stage:
    """One pure step. needs: statistics it reads. spec: the grid it rounds to (None: it rounds
    nothing).

    detail: its settings in words. scope: the sites it may touch.
    """

    name: str
    needs: frozenset[str]
    apply: Apply
    spec: Spec | None = None
    detail: str = ""
    scope: Scope = field(default_factory=Scope)
    reparametrizes: bool = False  # it moves inputs, so the sites of one input belong together
    # what it does to a site depends on the weights and statistics of that site's input only
    sitewise: bool = False
    lossless: bool = (
        False  # it keeps the function whatever it finds, so it may wait until every site is solved
    )
    online: tuple[
        Op, ...
    ] = ()  # what it puts on its sites' inputs at run time, in the form that a codec is asked about
    # how many matrices [k, k] in fp32 it holds at once beside its statistics
    workspace: int = 1
    uncovered: bool = False  # the last stage of `rules`: any site in its scope is an error

    def wants(self, site: Site) -> frozenset[str]:
        """The statistics that it reads of this site's input: no drift of experts, whose rows have
        no pairs in the reference."""
        return self.needs - {"drift"} if site.route else self.needs

    def touches(self, name: str, site: Site) -> bool:
        """Whether it may change a site of this full name. A router is never rounded, and needs no
        rule."""
        unrounded = site.router and (self.spec is not None or self.uncovered)
        return site.outside == self.scope.outside and name in self.scope and not unrounded


Transform = tuple[Stage, ...]


def chain(*transforms: Transform) -> Transform:
    """One after the other. chain() is the identity and chain is associative."""
    return sum(transforms, ())


def at(pattern: str, transform: Transform) -> Transform:
    """The transform restricted to the sites whose full name matches the pattern."""
    return tuple(
        replace(s, scope=replace(s.scope, include=(pattern, *s.scope.include))) for s in transform
    )


def outside(transform: Transform) -> Transform:
    """The transform on linears around the blocks (a vision tower, a projector, the head), which
    other stages leave alone.

    Every stage works on one weight at a time and without data, since nothing runs there; others are
    refused by name.
    """
    for stage in transform:
        if stage.needs or stage.online or not stage.sitewise:
            reason = (
                f"observes {', '.join(sorted(stage.needs))}"
                if stage.needs
                else "changes more than weights"
            )
            raise QlabError(
                f"the stage {stage.name!r} {reason}, and weights around the blocks are rounded "
                "one by one without data; use rtn or hqq for them"
            )
    return tuple(replace(stage, scope=replace(stage.scope, outside=True)) for stage in transform)


def keep() -> Transform:
    """Leave the sites as they are: what a rule says of layers that stay unquantized."""
    return (Stage("keep", frozenset(), lambda graph, stats: (graph, stats), sitewise=True),)


def rules(table: Mapping[str, Transform]) -> Transform:
    """The first matching pattern decides. A pattern without a site, and a site without a pattern,
    are errors."""
    stages: list[Stage] = []
    earlier: tuple[str, ...] = ()
    for pattern, transform in table.items():
        for stage in at(pattern, transform or keep()):
            stages.append(
                replace(stage, scope=replace(stage.scope, exclude=stage.scope.exclude + earlier))
            )
        earlier = (*earlier, pattern)
    last = Stage(
        "rules",
        frozenset(),
        lambda g, s: (g, s),
        scope=Scope(exclude=earlier),
        uncovered=True,
        sitewise=True,
    )
    return (*stages, last)


def select(stage: Stage, graph: ModuleGraph) -> ModuleGraph:
    """The graph with only the stage's sites selected, out of those that are selected already."""
    return replace(
        graph, selected=frozenset(s.path for s in graph.sites if stage.touches(graph.where(s), s))
    )


def apply(stage: Stage, graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
    """Run one stage on the selected sites of its scope; the result has the same sites selected as
    the graph had.

    Errors: a stage that writes to what it is given, changes what no file holds, or does not keep to
    its sites though it is sitewise.
    """
    notes = {path: dict(note) for path, note in graph.notes.items()}
    chosen = select(stage, replace(graph, notes=notes))
    if stage.uncovered and chosen.sites:
        raise QlabError(
            f"no rule covers {', '.join(map(graph.where, chosen.sites))}; add a pattern, with "
            "keep() to leave them"
        )
    seen = shown(chosen, upstream=stage.reparametrizes) if stage.sitewise else chosen
    given, found = Observed(stats, stage.name, seen), dict(stats)
    seal = Seal(seen, given)
    try:
        made = stage.apply(seen, given)
    except (RuntimeError, NotImplementedError) as error:
        if seen is not chosen and "meta" in str(error).lower():
            raise QlabError(
                reads_elsewhere(stage.name, ", ".join(map(graph.where, chosen.sites)))
            ) from error
        raise
    if not (isinstance(made, tuple) and len(made) == 2):
        raise QlabError(
            f"the stage {stage.name!r} returned a {type(made).__name__}; return (graph, stats)"
        )
    new, after = made
    if broken := seal.broken(seen, given):
        raise QlabError(
            f"the stage {stage.name!r} writes to {broken}, which others go on with; change a "
            "copy, and return that"
        )
    refuse_others(stage.name, stage.spec, stage.sitewise, seen, new)
    done = restored(new, seen, chosen)
    refuse_lost(stage.name, chosen, done)
    masks = stage.spec is None and not (stage.lossless or stage.reparametrizes)
    done = noted(chosen, done) if masks else done
    return replace(done, selected=graph.selected), found if after is given else after


# ------------------------------------------------------------------ authoring
def each_weight(
    name: str,
    fn: WeightFn,
    spec: Spec | None,
    needs: frozenset[str] = frozenset(),
    detail: str = "",
) -> Transform:
    """A lossy stage: every selected weight W_ok (fp32) becomes fn(W_ok, its statistics, spec) ->
    (leaf, notes).

    The leaf is a QTensor of that spec, or, where the spec is None, a tensor: a stage that rounds
    nothing, such as one that prunes. The zeros that it makes are kept by the stages behind it, or
    those are refused. Routers are left alone.

    fn gets copies, which it may write to. The spec that fn gets has its scale dtype settled.
    detail: the stage's own settings, for plans and provenance.

    Beside the statistics, fn finds "outer": the global scale where the spec has one (NVFP4), else
    None. It is one for all selected weights of a source, since engines fuse those (q, k and v; gate
    and up).

    Notes go into the report, with the relative weight error |W - W'| / |W|, the largest error in
    steps and, where the second moment is at hand, the relative calibration loss tr(D H D^T) / tr(W
    H W^T), D = W' - W.
    """

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        leaves, notes = {}, dict(graph.notes)
        outers = outer_scales(graph, spec)
        for site in graph.sites:
            if site.router:
                continue
            assert site.weight is not None  # weight_ok refuses it otherwise
            seen = {need: stats[site.source, need] for need in needs}
            outer = outers.get(site.path)
            if site.route is None:
                solved = [solve(name, fn, spec, graph, site, {**seen, "outer": outer})]
                leaf = solved[0].leaf
            else:
                experts = range(graph.params[site.weight].shape[0])
                # a state may be observed when it is asked for, and is held no longer than its
                # expert takes
                solved = [
                    solve(
                        name,
                        fn,
                        spec,
                        graph,
                        site,
                        {
                            **{n: state.states[e] for n, state in seen.items()},
                            "outer": None if outer is None else outer[e],
                        },
                        e,
                    )
                    for e in experts
                ]
                leaf = stacked([s.leaf for s in solved])
            leaves[site.weight] = (
                leaf
                if isinstance(leaf, QTensor) or site.layout.endswith("o k")
                else leaf.mT.contiguous()
            )
            said = {
                **errors_in_notes([s.errors for s in solved]),
                **merged([s.note for s in solved]),
            }
            notes[site.path] = {**notes.get(site.path, {}), **said}
        return replace(graph.update(leaves), notes=notes), stats

    return (Stage(name, needs, run, spec, detail, sitewise=True),)
