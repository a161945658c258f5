"""Which weights of a model a recipe reaches, and what it rounds them to."""

from collections.abc import Mapping

from qlab.algebra.cached import refuse_latent
from qlab.algebra.crossed import crossed
from qlab.algebra.graph import ModuleGraph, Site, by_origin
from qlab.algebra.groups import made_of
from qlab.algebra.running import select
from qlab.algebra.scope import matches
from qlab.algebra.scores import refuse_seen_shifts, scores
from qlab.algebra.spec import Spec
from qlab.algebra.transform import Stage, Transform
from qlab.algebra.views import Gauged, OnWires, PlainCache, Shifted, Uncovered
from qlab.algebra.wires import full_name, nearest, wires
from qlab.driver.admissible import KEEP_THEM
from qlab.driver.sites import Sites
from qlab.errors import QlabError, warn
from qlab.process.shown import some


def specs_of(recipe: Transform, sites: Mapping[str, Site]) -> dict[str, Spec | None]:
    """What each weight is rounded to; refuses one that two stages round."""
    specs: dict[str, Spec | None] = dict.fromkeys(sites)
    for stage in recipe:
        if stage.spec is None:
            continue
        for name, site in sites.items():
            if not stage.touches(name, site):
                continue
            if specs[name] is not None:
                raise QlabError(
                    f"{name} is rounded by two stages, to {specs[name]} and to {stage.spec}; "
                    "give each site one"
                )
            specs[name] = stage.spec
    return specs


def refuse_unread(stage: Stage, unread: Mapping[str, str]) -> None:
    """Refuse a stage that would change weights in which the program shows no site."""
    if stage.scope.outside or stage.spec is None:
        return
    covered = [name for name in unread if name in stage.scope]
    if covered:
        raise QlabError(
            f"{covered[0]} {unread[covered[0]]}, so qlab cannot quantize {some(covered)}; "
            f"{KEEP_THEM}"
        )


def check_scope(stage: Stage, model: Sites) -> None:
    """Refuse a stage without a site, sites without a rule, and a rule that splits an input."""
    if stage.view.wires is not None:
        _check_wires(stage, stage.view.wires, model)
        return
    chosen = {name for name, site in model.sites.items() if stage.touches(name, site)}
    turned = sites_made_of(stage, model)
    if turned is not None:
        chosen = turned
        _refuse_unmade(stage, model, turned)
    if not stage.scope.outside:  # a rule may be there to keep what no program shows
        chosen |= {name for name in model.unread if name in stage.scope}
    if isinstance(stage.view, Uncovered):
        if chosen:
            raise QlabError(
                f"no rule covers {some(sorted(chosen))}; add a pattern, with keep() to leave "
                "them as they are"
            )
        return
    if not chosen:
        raise QlabError(_matches_nothing(stage, model))
    if isinstance(stage.view, Gauged):
        _refuse_split(stage, model, chosen)


def sites_made_of(stage: Stage, model: Sites) -> set[str] | None:
    """The sites whose inputs are made of what a gauge names; None of a step that names none."""
    if not isinstance(stage.view, Gauged) or stage.view.made_of is None:
        return None
    graphs = [ModuleGraph(code, {}, path) for path, code in model.codes.items()]
    return {g.where(s) for g in (select(stage, graph) for graph in graphs) for s in g.sites}


def _refuse_unmade(stage: Stage, model: Sites, turned: set[str]) -> None:
    """Refuse a gauge that names nothing that can turn, with the nearest names."""
    if turned:
        return
    assert isinstance(stage.view, Gauged) and stage.view.made_of is not None
    names = [
        full_name(path, name)
        for path, code in model.codes.items()
        for aliases in made_of(code).values()
        for name in sorted(aliases)
    ]
    pattern = stage.view.made_of
    raise QlabError(
        f"the gauge {stage.name!r} matches nothing that can turn ({pattern} at {stage.scope}); "
        f"of outputs and values that may {nearest(pattern, names)}"
    )


def _check_wires(stage: Stage, pattern: str, model: Sites) -> None:
    """Refuse a stage that works on wires, of which it matches none."""
    graphs = [ModuleGraph(code, {}, path) for path, code in model.codes.items()]
    chosen = [select(stage, graph) for graph in graphs]
    if isinstance(stage.view, Gauged):
        for graph in chosen:
            scores(graph, stage.name)  # refuses a rule that splits queries and keys
    if isinstance(stage.view, Shifted):
        for graph in chosen:
            refuse_seen_shifts(graph, stage.name)
    if isinstance(stage.view, PlainCache):
        _refuse_other_caches(stage, model)
    if any(graph.selected_wires for graph in chosen):
        return
    touched = [site for name, site in model.sites.items() if stage.touches(name, site)]
    if stage.view.operations and touched and all(site.router for site in touched):
        return  # `effects` refuses it by the routers' names
    names = [
        full_name(graph.path, name)
        for graph in graphs
        for wire in wires(graph.code).values()
        for name in (wire.name, *wire.also)
    ]
    raise QlabError(
        f"the stage {stage.name!r} matches no wire ({pattern} at {stage.scope}); "
        f"{nearest(pattern, names)}"
    )


def _refuse_other_caches(stage: Stage, model: Sites) -> None:
    """Refuse to round a cache that holds no keys and values as attention reads them."""
    refuse_latent(model.codes, stage.detail)
    without = unseen(stage, model)
    if without:
        raise QlabError(
            f"{some(without)} caches a state and no keys and values, so {stage.detail} is no "
            "scheme of its cache; leave the cache as it is, or round what the other blocks cache "
            "by qlab.kv_cache"
        )


def unseen(stage: Stage, model: Sites) -> list[str]:
    """The blocks that a step on what attentions read leaves as they are, since their programs show
    no attention: what those compute in its place is none, or is not traced."""
    pattern = stage.view.wires
    if pattern is None:
        return []
    names: set[str] = set()  # of what it reaches elsewhere
    blind: list[str] = []
    for path, code in model.codes.items():
        attentions = {wire.name for wire in wires(code).values() if wire.of_attention}
        names |= attentions & (select(stage, ModuleGraph(code, {}, path)).selected_wires or set())
        blind += [] if attentions else [path]
    return [path for path in blind if any(_is_for(stage, pattern, path, name) for name in names)]


def warn_of_crossed(recipe: Transform, model: Sites) -> None:
    """Name the inputs that a step leaves as they are, since a step in front of it puts operations
    on values that their scales would fold across."""
    for i, stage in enumerate(recipe):
        if not isinstance(stage.view, Gauged) or stage.view.wires or stage.view.operations:
            continue
        for before in recipe[:i]:
            names = _crossed(stage, before, model) if isinstance(before.view, OnWires) else []
            if names:
                warn(
                    f"{stage.name} leaves the inputs of {some(names)} as they are: {before.name} "
                    f"in front of it stands on values that it would move; write {before.name} "
                    f"behind {stage.name}, unless that is meant"
                )


def _crossed(stage: Stage, before: Stage, model: Sites) -> list[str]:
    """The sites that one step turns and whose folds cross the wires of another."""
    names = []
    for path, code in model.codes.items():
        graph = ModuleGraph(code, {}, path)
        standing = select(before, graph).selected_wires or frozenset()
        names += [
            graph.where(site)
            for site in select(stage, graph).sites
            if standing & {*crossed(code).get(site.origin, ())} and not site.router
        ]
    return names


def _is_for(stage: Stage, pattern: str, path: str, wire: str) -> bool:
    """Whether a step would work on a wire of this name, if there were one in the block."""
    name = full_name(path, wire)
    in_scope = name.rpartition(":")[0] in stage.scope or name in stage.scope
    return in_scope and (matches(pattern, wire) or matches(pattern, name))


def _matches_nothing(stage: Stage, model: Sites) -> str:
    """Why a stage touches no weight, and which names there are."""
    routers = [name for name, site in model.sites.items() if name in stage.scope and site.router]
    if routers:
        return (
            f"the stage {stage.name!r} is for {some(routers)} only, which choose or weigh "
            "experts; routers stay as they are, as every engine reads them: leave the rule out"
        )
    if stage.scope.outside:
        return (
            f"the stage {stage.name!r} matches no linear ({stage.scope}); those are "
            f"{some(list(model.around)) or 'none'}"
        )
    beside = [name for name in model.around if name in stage.scope]
    example = next(iter([*model.sites, *model.unread]), "none")
    hint = f"outside() reaches {some(beside)}" if beside else f"sites are named like {example}"
    if isinstance(stage.view, Gauged) and stage.scope.include and not beside:
        known = [f"{name}:in" for name in model.sites]
        strange = [p for p in stage.scope.include if not any(matches(p, n) for n in model.sites)]
        pattern = [*strange, stage.scope.include[-1]][0]
        hint = f"of the inputs that it may turn {nearest(f'{pattern}:in', known)}"
    return f"the stage {stage.name!r} matches no site ({stage.scope}); {hint}"


def _refuse_split(stage: Stage, model: Sites, chosen: set[str]) -> None:
    """Refuse a rule that gives a reparametrization some of the sites of an input, and not all."""
    for path, code in model.codes.items():
        for group in by_origin(code.sites).values():
            names = [f"{path}.{site.path}" for site in group]
            inside = [name for name in names if name in chosen]
            if inside and len(inside) < len(names):
                rest = ", ".join(name for name in names if name not in chosen)
                raise QlabError(
                    f"{', '.join(inside)} shares its input with {rest}, and the rule for "
                    f"{stage.name} splits them; a reparametrization needs one rule for all "
                    "sites of an input"
                )
