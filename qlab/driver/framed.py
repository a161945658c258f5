"""What a recipe that chooses the basis of the hidden states makes of the model around its blocks,
and whether it can."""

from collections.abc import Mapping
from itertools import takewhile

from torch import Tensor

from qlab.algebra.frame import framing, turning
from qlab.algebra.graph import Code, ModuleGraph, Site
from qlab.algebra.running import apply
from qlab.algebra.transform import Stage, Transform
from qlab.algebra.views import EverySegment, WholeModel, WholeModelBasis
from qlab.driver.lossless import refuse_changed
from qlab.errors import QlabError
from qlab.model.around import around_code, call_around, load_around
from qlab.model.skeleton import Skeleton
from qlab.process.shown import some


def refuse_unturnable(
    skeleton: Skeleton, recipe: Transform, codes: Mapping[str, Code], sites: Mapping[str, Site]
) -> None:
    """Refuse a step that chooses the basis of a model which no basis but its own fits, before any
    work, by the segment and its operation."""
    first, late = _choosing(recipe)
    if len(first) > 1 or late:
        stage = [*first[1:], *late][0]
        raise QlabError(
            f"{stage.name} chooses the basis of the hidden states, which is one for a model and "
            "comes before every other step; put it first in the recipe, and once"
        )
    for stage in first:
        _refuse_part(stage, sites)
        around = around_code(skeleton)
        groups = {path: turning(code, stage.name, path) for path, code in codes.items()}
        groups[""] = turning(around, stage.name, "")
        if len({(group.size, group.centred) for group in groups.values()}) > 1:
            raise QlabError(
                f"{stage.name} turns all segments by one matrix, and some of {skeleton.prefix} "
                "norm their inputs after their mean and others not; leave it out"
            )
        _refuse_unfollowed(stage, skeleton, around)


def _choosing(recipe: Transform) -> tuple[Transform, Transform]:
    """The steps that choose the basis, or will when they have measured the model: those at the
    beginning of the recipe, and those behind another step."""
    begins = EverySegment | WholeModel
    before = len(list(takewhile(lambda stage: isinstance(stage.view, begins), recipe)))
    chooses = EverySegment | WholeModelBasis
    first, late = (
        tuple(stage for stage in part if isinstance(stage.view, chooses))
        for part in (recipe[:before], recipe[before:])
    )
    return first, late


def _refuse_part(stage: Stage, sites: Mapping[str, Site]) -> None:
    left_out = [
        name for name, site in sites.items() if not site.outside and name not in stage.scope
    ]
    if left_out:
        raise QlabError(
            f"{stage.name} turns all weights of a model, and its rule leaves out {some(left_out)}; "
            "put it in front of rules() and outside of at()"
        )


def _refuse_unfollowed(stage: Stage, skeleton: Skeleton, around: Code) -> None:
    """Refuse parameters around the blocks that text alone does not use: what they add to the stream
    would keep its basis."""
    used = {
        around.params[n.name] for n in around.graph.nodes if n.name in around.params and n.users
    }
    inside = tuple(f"{path}." for path in skeleton.blocks)
    others = [
        name
        for name, _ in skeleton.model.named_parameters(remove_duplicate=False)
        if not name.startswith(inside) and name not in used
    ]
    if others:
        raise QlabError(
            f"{stage.name} turns what enters the first block, and the program of text alone does "
            f"not show what {some(others)} adds to it; leave {stage.name} out, rotate_heads and "
            "rotate_online remain"
        )


def turned_around(skeleton: Skeleton, recipe: Transform) -> dict[str, Tensor]:
    """The parameters around the blocks that take another value in the recipe's basis, by their
    names in the model, in float32; empty without such a basis."""
    first, _ = framing(recipe)
    if not first:
        return {}
    before = after = load_around(skeleton)
    for stage in first:
        after = _checked(skeleton, stage, after)
    return {
        name: leaf
        for name, leaf in after.params.items()
        if leaf is not before.params[name] and isinstance(leaf, Tensor)
    }


def _checked(skeleton: Skeleton, stage: Stage, graph: ModuleGraph) -> ModuleGraph:
    turned, _ = apply(stage, graph, {})
    refuse_changed(stage, graph, turned, call_around(skeleton), lambda: iter(()))
    return turned
