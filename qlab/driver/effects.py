"""What a recipe does beside rounding weights: whether it has an effect in the run at hand, and
whether the format has a place for it.

Asked before any work: a stage without an effect and an operation without a place would else be left
out in silence.
"""

from collections.abc import Mapping, Sequence

from qlab.algebra.graph import Code, ModuleGraph, Op, Site
from qlab.algebra.online import QuantizeInput, matrix_of
from qlab.algebra.running import select
from qlab.algebra.scope import matches
from qlab.algebra.spec import Spec
from qlab.algebra.transform import Stage, Transform
from qlab.algebra.views import EachWeight, Folded, PlainCache, Uncovered, WholeBlock
from qlab.algebra.wires import full_name, open_wires, wires
from qlab.codecs import CODECS, Codec
from qlab.codecs.around import Around, Places
from qlab.codecs.engines import refusal_at_run_time, refusal_of_inputs
from qlab.driver.around import EXPERTS, place_of
from qlab.driver.observe import DRIFT, Inputs
from qlab.driver.reach import sites_made_of
from qlab.driver.sites import Sites
from qlab.errors import QlabError
from qlab.model.online import attentions
from qlab.process.shown import some

Online = Mapping[str, tuple[Op, ...]]  # site -> what happens to its input at run time


def refuse_without_effect(recipe: Transform, named: Mapping[str, Site], inputs: Inputs) -> None:
    """Refuse a stage that compares with the reference where nothing can differ from that, and one
    that rounds inputs of routers alone, which stay as they are."""
    for stage in recipe:
        sites = [site for name, site in named.items() if stage.touches(name, site)]
        if stage.view.operations and sites and all(site.router for site in sites):
            raise QlabError(
                f"the stage {stage.name!r} would change nothing: {stage.scope} names routers, "
                "which stay as they are; leave it away there"
            )
        if not DRIFT & stage.needs:
            continue
        if inputs == "reference":
            raise QlabError(
                f"the stage {stage.name!r} corrects how far inputs are from the unquantized "
                "model's, which with inputs='reference' they never are; use inputs='quantized', "
                "or a recipe without it (gptaq is gptq then)"
            )
        touched = [name for name, site in named.items() if stage.touches(name, site)]
        if touched and not any(_drifts(stage, named[name]) for name in touched):
            raise QlabError(
                f"the stage {stage.name!r} would change nothing of {touched[0]}: rows of routed "
                "experts have no pairs in the unquantized model, and routers stay as they are; "
                "leave it away there"
            )


def _drifts(stage: Stage, site: Site) -> bool:
    return bool(DRIFT & stage.wants(site)) and not site.router


def online_of(recipe: Transform, sites: Sites) -> Online:
    """Site -> what stages say beforehand that they put on its input."""
    found: dict[str, tuple[Op, ...]] = {}
    for stage in recipe:
        view = stage.view
        if not view.operations:
            continue
        turned = sites_made_of(stage, sites)
        for name, site in sites.sites.items():
            at_input = view.wires is None or matches(view.wires, f"{name}:in")
            reached = stage.touches(name, site) if turned is None else name in turned
            if at_input and reached and not site.router:
                found[name] = (*found.get(name, ()), *view.operations)
    return found


def input_specs(online: Online) -> dict[str, str]:
    """Site -> how its input is rounded, in words."""
    roundings = [(name, op) for name, ops in online.items() for op in ops]
    return {name: str(op.input_spec) for name, op in roundings if isinstance(op, QuantizeInput)}


def refuse_left(recipe: Transform, stage: Stage, graph: ModuleGraph, codec: Codec) -> None:
    """Refuse what the last stage before those that round left on an input, if the format has no
    place for it: nothing behind it could still fold that into weights. Where inputs are solved one
    after another, what folds comes when all of them are, wherever the recipe has it."""
    at = recipe.index(stage)
    behind = recipe[at + 1 :]
    may_fold = stage.view.site_by_site and any(isinstance(s.view, Folded) for s in recipe[:at])
    if (
        may_fold
        or stage.spec is not None
        or any(later.spec is None and not isinstance(later.view, Uncovered) for later in behind)
    ):
        return
    for site in graph.sites:
        ops, name = graph.online.get(site.path, ()), graph.where(site)
        spec = next(
            (later.spec for later in behind if later.spec and later.touches(name, site)), None
        )
        reason = codec.refusal(spec, ops) if spec and ops else None
        if reason:
            raise QlabError(f"{name} still needs an operation at run time: {reason}")


def refuse_unheld(
    online: Online,
    specs: Mapping[str, Spec | None],
    named: Mapping[str, Site],
    codec: str,
    target: str | None = None,
) -> None:
    """Refuse operations on inputs for which the format has no place, and matrices that the engine
    does not multiply with, by the names of their sites."""
    around = CODECS[codec].around
    failed: dict[str, list[str]] = {}
    for name, ops in online.items():
        spec = specs[name]
        reason = _unheld(ops, spec, named[name], codec)
        if reason is None and spec and target:
            reason = _untaken(ops, spec, target, experts=bool(named[name].route))
        turns = [op for op in ops if matrix_of(op) is not None]
        if reason is None and turns and around and target:
            _, rows = around.encode({name: {"input": (*turns,)}})
            reason = refusal_at_run_time(target, rows)
        if reason:
            failed.setdefault(reason, []).append(name)
    for reason, names in failed.items():
        raise QlabError(f"{some(names)}: {reason}")


def refuse_unheld_leaves(recipe: Transform, named: Mapping[str, Site], codec: str) -> None:
    """Refuse leaves that are neither numbers nor codes, by the names of their weights."""
    for stage in recipe:
        if isinstance(stage.view, EachWeight | WholeBlock) and stage.view.leaves:
            touched = [
                name
                for name, site in named.items()
                if stage.touches(name, site) and not site.router
            ]
            if not touched:  # a rule for matrices that no program shows
                continue
            raise QlabError(
                f"the stage {stage.name!r} makes of {some(touched)} {stage.view.leaves}, for which "
                f"{codec} has no place; evaluate or lower what qlab.apply makes of it, or leave "
                "the stage out"
            )


def refuse_unheld_values(
    recipe: Transform, codes: Mapping[str, Code], codec: str, target: str | None = None
) -> None:
    """Refuse inserts on values that are no inputs of weights, for which the format has no place, or
    the engine none, by the names of their wires."""
    around = CODECS[codec].around
    modules: dict[str, dict[str, tuple[Op, ...]]] = {}  # what stages say that they put there
    for stage in recipe:
        if stage.view.wires is None:
            continue
        unheld: list[str] = []
        for path, code in codes.items():
            chosen = select(stage, ModuleGraph(code, {}, path))
            for wire in (wire for wire in open_wires(chosen) if wire.kind != "in"):
                at = place_of(path, code, wire)
                if around is None or at is None or not stage.view.operations:
                    unheld.append(full_name(path, wire.name))
                    continue
                module, place = at
                before = modules.setdefault(module, {}).get(place, ())
                modules[module][place] = (*before, *stage.view.operations)
        if unheld:
            raise QlabError(
                f"the stage {stage.name!r} puts operations on {some(unheld)}, for which {codec} "
                "has no place; evaluate the recipe with qlab.apply, or leave the stage out"
            )
    if around is not None and modules:
        _refuse_unheld_around(modules, codes, around, target)
        _refuse_several_widths(recipe, codes, codec)


def _refuse_several_widths(recipe: Transform, codes: Mapping[str, Code], codec: str) -> None:
    """Refuse a scale per token of a head where heads differ in width: a configuration says it as
    groups of one size."""
    per_token = [
        stage
        for stage in recipe
        if isinstance(stage.view, PlainCache) and not stage.view.stores_scales
    ]
    there = [wire for code in codes.values() for wire in wires(code).values()]
    widths = {w.channels // w.heads for w in there if w.kind in ("key", "value")}
    if per_token and len(widths) > 1:
        raise QlabError(
            f"keys and values have heads of {' and '.join(map(str, sorted(widths)))} channels, and "
            f"{codec} says one width of {per_token[0].detail} for all; store a scale per head or "
            "tensor (KV_INT8_HEAD and alike)"
        )


def _refuse_unheld_around(
    modules: Mapping[str, Places], codes: Mapping[str, Code], around: Around, target: str | None
) -> None:
    """Refuse what happens at attentions where the format has no place for it, or none for all of
    them together, or the engine does not do it."""
    failed: dict[str, list[str]] = {}
    for module, places in modules.items():
        reason = around.refusal(places)
        if reason:
            failed.setdefault(reason, []).append(module)
    for reason, names in failed.items():
        raise QlabError(
            f"stages put operations on what is read in {some(names)}: {reason}; or evaluate the "
            "recipe with qlab.apply"
        )
    _, rows = around.encode(modules)
    around.config(rows, [name for path, code in codes.items() for name in attentions(path, code)])
    reason = refusal_at_run_time(target, rows) if target else None
    if reason:
        raise QlabError(f"{some(list(modules))}: {reason}")


def _untaken(ops: Sequence[Op], spec: Spec, target: str, experts: bool) -> str | None:
    """Why the engine does not round an input so, or None."""
    roundings = [op.input_spec for op in ops if isinstance(op, QuantizeInput)]
    reasons = [refusal_of_inputs(target, spec, inputs, experts) for inputs in roundings]
    return next(filter(None, reasons), None)


def _unheld(ops: Sequence[Op], spec: Spec | None, site: Site, codec: str) -> str | None:
    turns = [matrix_of(op) is not None for op in ops]
    if CODECS[codec].around and site.route and any(turns):
        return EXPERTS
    if CODECS[codec].around and spec is None and all(turns):
        return None
    if spec is None:
        return (
            "its input is rounded at run time and its weight is not, which no format holds; "
            "round the weight too, or leave it out"
        )
    return CODECS[codec].refusal(spec, ops)
