"""The linears around the blocks (a vision tower, a projector, the head): left as they are, or
rounded without data by rule."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.graph import Site, lone_weight
from qlab.algebra.qtensor import Leaf, QTensor, dense
from qlab.algebra.transform import Transform
from qlab.driver.report import site_rows
from qlab.driver.siblings import Siblings
from qlab.driver.solve import solve_alone
from qlab.model.skeleton import Skeleton


def outside_sites(skeleton: Skeleton) -> dict[str, Site]:
    """Every linear that no block holds, by its name in the model. One tied to the embedding is
    among them: once it is rounded it has a weight of its own, beside the embedding, which stays."""
    inside = tuple(f"{path}." for path in skeleton.blocks)
    names = [
        name
        for name in skeleton.names.linears()
        if not name.startswith(inside) and name not in skeleton.names.transposed
    ]
    return {
        name: Site(path=name, weight=f"{name}.weight", bias=None, source=name, outside=True)
        for name in names
        if weight_of(skeleton, name)
    }


def weight_of(skeleton: Skeleton, name: str) -> str | None:
    """The leaf of the files that is a linear's weight: its own, or, where they have none, the
    embedding that it is tied to."""
    checkpoint, weight = skeleton.checkpoint, f"{name}.weight"
    found = [skeleton.names.file_name(w) for w in (weight, skeleton.names.tied.get(weight, weight))]
    return next(
        (
            w
            for w in found
            if w in checkpoint.stored or w.rpartition(".")[0] in checkpoint.quantized
        ),
        None,
    )


def carried(skeleton: Skeleton) -> set[str]:
    """The tensors of the files that no module of the model takes: masks and tables that it computes
    itself, other ends."""
    taken = skeleton.model.state_dict().keys()
    names = {stored: stored.rpartition(".") for stored in skeleton.checkpoint.stored}
    return {
        stored
        for stored, (module, _, kind) in names.items()
        if f"{skeleton.names.model_name(module)}.{kind}" not in taken
    }


def outside_leaves(
    skeleton: Skeleton, recipe: Transform, rows: Callable[[Mapping[str, Any]], None]
) -> Iterator[tuple[str, Leaf]]:
    """Every leaf of the files that belongs to no block, one at a time: rounded where a stage of the
    recipe is for it, else dense as it was stored; with the heads that are rounded and were tied.
    rows: takes the report's row of each rounded one."""
    checkpoint = skeleton.checkpoint
    chosen = {
        f"{skeleton.names.module_name(name)}.weight": site
        for name, site in outside_sites(skeleton).items()
        if any(stage.spec and stage.touches(name, site) for stage in recipe)
    }

    def read(name: str) -> Tensor:
        leaf = checkpoint.leaf(
            weight_of(skeleton, chosen[name].path) or name if name in chosen else name
        )
        return (
            dense(leaf, checkpoint.dtype) if isinstance(leaf, QTensor) else leaf
        )  # the output is in another format than the files

    specs = {
        name.removesuffix(".weight"): stage.spec
        for name, site in chosen.items()
        for stage in recipe
        if stage.spec and stage.touches(site.path, site)
    }
    siblings = Siblings(
        specs, lambda module: read(f"{module}.weight").to(skeleton.device, torch.float32)
    )
    for name in dict.fromkeys([*skeleton.names.outside_leaves(), *chosen]):
        site, leaf = chosen.get(name), read(name)
        if site is None:
            yield name, leaf
            continue
        alone = lone_weight(
            site.path,
            leaf.to(skeleton.device),
            checkpoint.dtype,
            outside=True,
            outer=siblings.outer(name.removesuffix(".weight")),
        )
        solved = solve_alone(alone, recipe)
        rows(site_rows(solved))
        yield name, solved.params["weight"]
    for (
        name,
        keeper,
    ) in skeleton.names.tied.items():  # the files hold it by the name of a head that is rounded
        if skeleton.names.file_name(keeper) in chosen and skeleton.names.file_name(name) not in {
            *checkpoint.stored,
            *chosen,
        }:
            yield skeleton.names.file_name(name), read(skeleton.names.file_name(keeper))
