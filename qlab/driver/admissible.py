"""Whether a recipe may do to a model what it says: which weights it reaches, what they become, and
whether the format and the engine hold that. Refused by name, before anything runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qlab.algebra.graph import Site, by_origin
from qlab.algebra.spec import Spec, with_scale_dtype
from qlab.algebra.tile import legal_groups
from qlab.algebra.transform import Stage, Transform
from qlab.codecs import CODECS, refusal_of_transposed
from qlab.codecs.engines import division, refusal, uniformity
from qlab.driver.sites import Sites
from qlab.errors import QlabError
from qlab.model.skeleton import Skeleton
from qlab.process.shown import some

KEEP_THEM = "leave them as they are (--keep PATTERN, or keep() in rules() in Python)"


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
    chosen = {name for name, site in model.sites.items() if stage.touches(name, site)}
    if not stage.scope.outside:  # a rule may be there to keep what no program shows
        chosen |= {name for name in model.unread if name in stage.scope}
    if stage.uncovered:
        if chosen:
            raise QlabError(
                f"no rule covers {some(sorted(chosen))}; add a pattern, with keep() to leave "
                "them as they are"
            )
        return
    if not chosen:
        raise QlabError(_matches_nothing(stage, model))
    if stage.reparametrizes:
        _refuse_split(stage, model, chosen)


def _matches_nothing(stage: Stage, model: Sites) -> str:
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
    return f"the stage {stage.name!r} matches no site ({stage.scope}); {hint}"


def _refuse_split(stage: Stage, model: Sites, chosen: set[str]) -> None:
    """A reparametrization takes all sites of an input, or none."""
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


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What decides whether a weight may become a spec: the model's names, the format, and the
    engine that is to load it (None: any)."""

    skeleton: Skeleton
    codec: str
    target: str | None

    def refusal(self, name: str, site: Site, shape: torch.Size, spec: Spec) -> str | None:
        """Why this weight may not become this spec, or None. Its tile fits the shape."""
        if site.route and not self.skeleton.names.expert_pieces(name):
            return (
                "quantized experts are written one by one, and transformers knows no names for "
                f"them in this architecture; {KEEP_THEM}"
            )
        if site.route and spec.tile.rows is None:
            return (
                "fused experts have a scale per group, channel or block; one per tensor would "
                "join projections that the files hold apart"
            )
        transposed = name in self.skeleton.names.transposed
        if site.layout not in ("o k", "e o k") and not transposed:
            return (
                f"readers of every format look for codes in linears, and this is none; {KEEP_THEM}"
            )
        held = CODECS[self.codec]
        refused = refusal_of_transposed(self.codec) if transposed else None
        refused = (
            refused
            or held.refusal(with_scale_dtype(spec, self.skeleton.checkpoint.dtype))
            or held.misfit(spec, shape)
        )
        if self.target and not refused:
            experts = site.route is not None
            refused = refusal(self.target, self.codec, spec, experts, shape[-1])
        return refused or held.risk(spec)


def check_specs(specs: Mapping[str, Spec | None], model: Sites, admission: Admission) -> None:
    """Refuse, each reason with its weights, what the codec's format cannot hold and what the engine
    does not load."""
    failed: dict[str, list[str]] = {}
    rounded = {name: spec for name, spec in specs.items() if spec}
    for name, spec in rounded.items():
        shape = model.shapes[name]
        try:
            spec.tile.check(shape)
        except QlabError as error:
            reason: str | None = f"{error}{_for_all_widths(spec, rounded, model)}"
        else:
            reason = admission.refusal(name, model.sites[name], shape, spec)
        if reason:
            failed.setdefault(reason, []).append(name)
    target = admission.target
    for names in _joined(model.sites):
        if target and (divided := division(target, {name: specs[name] for name in names})):
            failed.setdefault(divided, []).extend(names)
    for reason, names in failed.items():
        raise QlabError(f"{some(names)}: {reason}")
    CODECS[admission.codec].config(specs)  # refuses what no config can say of all of them
    if target and (several := uniformity(target, rounded)):
        raise QlabError(f"{several}; give all sites one")


def _for_all_widths(spec: Spec, rounded: Mapping[str, Spec], model: Sites) -> str:
    """The groups that divide every width that is to have this spec, where there are several."""
    widths = {model.shapes[name][-1] for name, its in rounded.items() if its == spec}
    common = ", ".join(map(str, legal_groups(math.gcd(*widths)))) or "none"
    return f"; for all {len(widths)} widths {common}" if len(widths) > 1 else ""


def _joined(sites: Mapping[str, Site]) -> list[list[str]]:
    """Sites of one module that engines may join: they share an input, or are the experts of a
    mixture."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, site in sites.items():
        if not site.router:
            module, source = name.rpartition(".")[0], "" if site.route else site.source
            groups.setdefault((module, source), []).append(name)
    return list(groups.values())
