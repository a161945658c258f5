"""One stage run on one block: what it may see, what it reads, and the checks of what it returns."""

from dataclasses import replace

from qlab.algebra.called import Failed
from qlab.algebra.claims import (
    Observed,
    Seal,
    hides,
    reads_elsewhere,
    refuse_others,
    restored,
    shown,
    with_targets,
)
from qlab.algebra.graph import ModuleGraph
from qlab.algebra.groups import turning_with
from qlab.algebra.statistic import here
from qlab.algebra.stats import Need, Stats
from qlab.algebra.transform import Stage
from qlab.algebra.views import EachWeight, Gauged, Uncovered
from qlab.algebra.wires import open_wires, reached
from qlab.algebra.zeros import masked, narrowed
from qlab.errors import QlabError


def select(stage: Stage, graph: ModuleGraph) -> ModuleGraph:
    """The graph with the stage's sites and wires selected, of those that are selected already."""
    sites = [s for s in graph.sites if stage.touches(graph.where(s), s)]
    if isinstance(stage.view, Gauged) and stage.view.made_of is not None:
        sites = turning_with(graph, sites, stage.view.made_of)
    chosen = replace(graph, selected=frozenset(site.path for site in sites))
    if stage.view.wires is None:
        return chosen
    return replace(chosen, selected_wires=reached(chosen, stage.view.wires, stage.scope))


def keys_of(stage: Stage, graph: ModuleGraph) -> set[tuple[str, Need]]:
    """The statistics that a stage reads: of the inputs of the sites that it may touch, or of the
    wires that it works on."""
    chosen = select(stage, graph)
    if stage.view.wires is None:
        return {(site.source, need) for site in chosen.sites for need in stage.wants(site)}
    return {(wire.key, need) for wire in open_wires(chosen) for need in stage.needs}


def apply(stage: Stage, graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
    """Run one stage on its sites among the selected ones. The new graph has the same sites selected
    as the graph had.

    Refuses a stage that writes to its arguments, changes what no file holds, or touches or reads
    what its view does not show.
    """
    notes = {path: dict(note) for path, note in graph.notes.items()}
    chosen = select(stage, replace(graph, notes=notes))
    if isinstance(stage.view, Uncovered) and chosen.sites:
        raise QlabError(
            f"no rule covers {', '.join(map(graph.where, chosen.sites))}; add a pattern, with "
            "keep() to leave them"
        )
    seen = chosen
    if stage.view.site_by_site:
        seen = shown(chosen, upstream=isinstance(stage.view, Gauged))
    try:
        new, new_stats = _run_sealed(stage, seen, stats)
    except (RuntimeError, NotImplementedError, Failed) as error:
        if hides(seen) and "meta" in str(error).lower():
            raise QlabError(
                reads_elsewhere(stage.name, ", ".join(map(graph.where, chosen.sites)))
            ) from error
        raise
    refuse_others(stage.name, stage.spec, stage.view, seen, new)
    new = restored(with_targets(new, seen), seen, chosen)
    new = narrowed(stage.name, chosen, new)
    if stage.spec is None and not stage.view.keeps_function:
        new = masked(chosen, new)
    new = replace(new, selected=graph.selected, selected_wires=graph.selected_wires)
    return new, new_stats


def _in_memory(stage: Stage, stats: Stats) -> Stats:
    """The statistics, of which those that the stage reads are in memory. A step of one weight gets
    copies, which are made when it asks for them."""
    if isinstance(stage.view, EachWeight) and stage.view.by_expert:
        return stats
    return {key: here(state) if key[1] in stage.needs else state for key, state in stats.items()}


def _run_sealed(stage: Stage, graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
    """What the stage returns. Refuses one that writes to what it is given, or returns no pair."""
    given = Observed(_in_memory(stage, stats), stage.name, graph)
    as_before = dict(stats)
    seal = Seal(graph, given)
    returned = stage.apply(graph, given)
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise QlabError(
            f"the stage {stage.name!r} returned a {type(returned).__name__}; return (graph, stats)"
        )
    broken = seal.broken(graph, given)
    if broken:
        raise QlabError(
            f"the stage {stage.name!r} writes to {broken}, which others go on with; change a "
            "copy, and return that"
        )
    new, new_stats = returned
    return new, as_before if new_stats is given else new_stats
