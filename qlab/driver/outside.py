"""The linears outside the blocks (a vision tower, a projector, the head): left as they are, or
rounded without data by rule."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.graph import ModuleGraph, Site, lone_weight
from qlab.algebra.qtensor import Leaf, QTensor, dense
from qlab.algebra.transform import Transform
from qlab.driver.report import site_rows
from qlab.driver.siblings import Siblings
from qlab.driver.solve import solve_alone
from qlab.files.certificate import certify
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
    weight = f"{name}.weight"
    for parameter in (weight, skeleton.names.tied.get(weight, weight)):
        leaf = skeleton.names.file_name(parameter)
        is_coded = leaf.rpartition(".")[0] in skeleton.checkpoint.quantized
        if is_coded or leaf in skeleton.checkpoint.stored:
            return leaf
    return None


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


@dataclass(frozen=True, kw_only=True)
class OutsideLeaf:
    """A leaf of the files that belongs to no block, as it is written.

    rows: the report's row of the site, where the leaf was rounded. certificates: module -> its
    certificate, likewise.
    """

    name: str
    leaf: Leaf
    rows: Mapping[str, Any] = field(default_factory=dict)
    certificates: Mapping[str, Any] = field(default_factory=dict)


def outside_leaves(skeleton: Skeleton, recipe: Transform) -> Iterator[OutsideLeaf]:
    """Every leaf of the files that belongs to no block, one at a time: rounded where a stage of the
    recipe is for it, else dense as it was stored; then heads that share their weight with one that
    was rounded."""
    checkpoint, names = skeleton.checkpoint, skeleton.names
    rounded_sites = _rounded_sites(skeleton, recipe)
    siblings = _siblings(skeleton, recipe, rounded_sites)
    for name in dict.fromkeys([*names.outside_leaves(), *rounded_sites]):
        if name in rounded_sites:
            outer = siblings.outer(name.removesuffix(".weight"))
            yield _rounded(skeleton, recipe, name, rounded_sites[name], outer)
        else:
            yield OutsideLeaf(name=name, leaf=_dense(skeleton, checkpoint.leaf(name)))
    in_files = {*checkpoint.stored, *rounded_sites}
    for tied, keeper in names.tied.items():
        name, kept = names.file_name(tied), names.file_name(keeper)
        if kept in rounded_sites and name not in in_files:
            original = _original(skeleton, kept, rounded_sites[kept])
            yield OutsideLeaf(name=name, leaf=_dense(skeleton, original))


def rounded_outside(skeleton: Skeleton, recipe: Transform) -> Iterator[tuple[str, Leaf]]:
    """Every weight outside the blocks that a stage of the recipe rounds, by its name in the model,
    one at a time."""
    rounded_sites = _rounded_sites(skeleton, recipe)
    siblings = _siblings(skeleton, recipe, rounded_sites)
    for name, site in rounded_sites.items():
        outer = siblings.outer(name.removesuffix(".weight"))
        solved = _solved(skeleton, recipe, _original(skeleton, name, site), site, outer)
        yield f"{site.path}.weight", solved.params["weight"]


def _rounded_sites(skeleton: Skeleton, recipe: Transform) -> dict[str, Site]:
    """The weights outside the blocks that a stage of the recipe rounds, by the name under which
    they are written."""
    return {
        f"{skeleton.names.module_name(name)}.weight": site
        for name, site in outside_sites(skeleton).items()
        if any(stage.spec and stage.touches(name, site) for stage in recipe)
    }


def _siblings(skeleton: Skeleton, recipe: Transform, rounded_sites: Mapping[str, Site]) -> Siblings:
    """The global scales that the rounded weights share."""
    specs = {
        name.removesuffix(".weight"): stage.spec
        for name, site in rounded_sites.items()
        for stage in recipe
        if stage.spec and stage.touches(site.path, site)
    }

    def read(module: str) -> Tensor:
        name = f"{module}.weight"
        original = _original(skeleton, name, rounded_sites[name])
        return _dense(skeleton, original).to(skeleton.device, torch.float32)

    return Siblings(specs, read)


def _source_of(skeleton: Skeleton, name: str, site: Site) -> str:
    """The leaf of the files of which a rounded weight is made."""
    return weight_of(skeleton, site.path) or name


def _dense(skeleton: Skeleton, leaf: Leaf) -> Tensor:
    """A leaf without codes: they are in another format than the output."""
    return dense(leaf, skeleton.checkpoint.dtype) if isinstance(leaf, QTensor) else leaf


def _original(skeleton: Skeleton, name: str, site: Site) -> Leaf:
    """The leaf of the files of which a rounded weight is made, as it was stored."""
    return skeleton.checkpoint.leaf(_source_of(skeleton, name, site))


def _solved(
    skeleton: Skeleton, recipe: Transform, original: Leaf, site: Site, outer: Tensor | None
) -> ModuleGraph:
    """A weight outside the blocks, rounded by itself."""
    weight = _dense(skeleton, original).to(skeleton.device)
    dtype = skeleton.checkpoint.dtype
    return solve_alone(lone_weight(site.path, weight, dtype, outside=True, outer=outer), recipe)


def _rounded(
    skeleton: Skeleton, recipe: Transform, name: str, site: Site, outer: Tensor | None
) -> OutsideLeaf:
    """A weight outside the blocks, rounded by itself, with the certificate against what was
    read."""
    checkpoint, source = skeleton.checkpoint, _source_of(skeleton, name, site)
    original = _original(skeleton, name, site)
    solved = _solved(skeleton, recipe, original, site, outer)
    leaf = solved.params["weight"]
    certificates: dict[str, Any] = {}
    if isinstance(leaf, QTensor):
        certificate = certify(leaf, original if source in checkpoint.stored else None)
        made_of = {} if source == name else {"made_of": source}
        certificates[name.rpartition(".")[0]] = certificate | made_of
    return OutsideLeaf(name=name, leaf=leaf, rows=site_rows(solved), certificates=certificates)
