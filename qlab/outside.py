"""The linears around the blocks (a vision tower, a projector, the head): left as they are, or rounded without data by rule."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qlab.graph import Site, lone_weight
from qlab.model.skeleton import Skeleton
from qlab.qtensor import Leaf, QTensor, dense
from qlab.report import site_rows
from qlab.sweep import solve
from qlab.transform import Transform


def outside_sites(skeleton: Skeleton) -> dict[str, Site]:
    """Every linear that no block holds and that has a weight of its own in the files, by its name in the model."""
    inside = tuple(f"{path}." for path in skeleton.blocks)
    names = [name for name in skeleton.linears() if not name.startswith(inside) and _has_own_weight(skeleton, name)]
    return {name: Site(name, f"{name}.weight", None, name, "", outside=True) for name in names}


def _has_own_weight(skeleton: Skeleton, name: str) -> bool:
    """Whether the files hold a linear's weight; a tied head's is the embedding's."""
    checkpoint, module = skeleton.checkpoint, skeleton.module_name(name)
    return f"{name}.weight" not in skeleton.tied and (f"{module}.weight" in checkpoint.stored or module in checkpoint.quantized)


def outside_leaves(skeleton: Skeleton, recipe: Transform, rows: Callable[[Mapping[str, Any]], None]) -> Iterator[tuple[str, Leaf]]:
    """Every leaf of the files that belongs to no block, one at a time: rounded where a stage of the recipe is for it, else dense
    as it was stored. rows: takes the report's row of each rounded one."""
    checkpoint = skeleton.checkpoint
    sites = {skeleton.module_name(name): site for name, site in outside_sites(skeleton).items()}
    for name in skeleton.outside_leaves():
        module, leaf = name.rpartition(".")[0], checkpoint.leaf(name)
        if isinstance(leaf, QTensor):  # the files' own format ends here: the output is in another one
            leaf = dense(leaf, checkpoint.dtype)
        site = sites.get(module) if name == f"{module}.weight" else None
        if site is None or not any(stage.spec and stage.touches(site.path, site) for stage in recipe):
            yield name, leaf
            continue
        solved, _ = solve(lone_weight(site.path, leaf.to(skeleton.device), outside=True), recipe, lambda graph, wanted: {})
        rows(site_rows(solved))
        yield name, solved.params["weight"]
