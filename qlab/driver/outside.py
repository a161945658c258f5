"""The linears outside the blocks (a vision tower, a projector, the head): left as they are, or
rounded without data by rule."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.frame import framing
from qlab.algebra.graph import ModuleGraph, Site, lone_weight
from qlab.algebra.qtensor import Leaf, QTensor, dense
from qlab.algebra.transform import Transform
from qlab.driver.framed import turned_around
from qlab.driver.report import site_rows
from qlab.driver.siblings import Siblings
from qlab.driver.solve import solve_alone
from qlab.files.certificate import certify, hash_of
from qlab.model.around import around_code, source_of
from qlab.model.pieces import Piece
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
    certificate, likewise. changed: its hash, where it was turned into another basis.
    """

    name: str
    leaf: Leaf
    rows: Mapping[str, Any] = field(default_factory=dict)
    certificates: Mapping[str, Any] = field(default_factory=dict)
    changed: Mapping[str, str] = field(default_factory=dict)


def outside_leaves(skeleton: Skeleton, recipe: Transform) -> Iterator[OutsideLeaf]:
    """Every leaf of the files that belongs to no block, one at a time: rounded where a stage of the
    recipe is for it, else dense as it was stored, or as it is in the recipe's basis; then heads
    that share their weight with one that was rounded."""
    checkpoint, names = skeleton.checkpoint, skeleton.names
    turned = _turned(skeleton, recipe)
    rounded_sites = _rounded_sites(skeleton, recipe)
    siblings = _siblings(skeleton, recipe, rounded_sites, turned)
    for name in dict.fromkeys([*names.outside_leaves(), *rounded_sites, *turned]):
        if name in rounded_sites:
            outer = siblings.outer(name.removesuffix(".weight"))
            yield _rounded(skeleton, recipe, name, rounded_sites[name], outer, turned)
        elif name in turned:
            yield OutsideLeaf(name=name, leaf=turned[name], changed={name: hash_of(turned[name])})
        else:
            yield OutsideLeaf(name=name, leaf=_dense(skeleton, checkpoint.leaf(name)))
    in_files = {*checkpoint.stored, *rounded_sites, *turned}
    for tied, keeper in names.tied.items():
        name, kept = names.file_name(tied), names.file_name(keeper)
        if kept in rounded_sites and name not in in_files:
            original = _original(skeleton, kept, rounded_sites[kept])
            yield OutsideLeaf(name=name, leaf=_dense(skeleton, original))


def rounded_outside(skeleton: Skeleton, recipe: Transform) -> Iterator[tuple[str, Leaf]]:
    """Every weight outside the blocks that the recipe makes another, by its name in the model, one
    at a time: what it rounds, and what is in another basis."""
    turned = _turned(skeleton, recipe)
    rounded_sites = _rounded_sites(skeleton, recipe)
    siblings = _siblings(skeleton, recipe, rounded_sites, turned)
    for name, site in rounded_sites.items():
        outer = siblings.outer(name.removesuffix(".weight"))
        weight = turned.get(name, _original(skeleton, name, site))
        solved = _solved(skeleton, recipe, weight, site, outer)
        yield f"{site.path}.weight", solved.params["weight"]
    around = around_code(skeleton).params.values() if turned else ()
    for name in dict.fromkeys(around):
        stored = skeleton.names.file_name(name)
        if stored in turned and stored not in rounded_sites:
            yield name, turned[stored]


def parted(skeleton: Skeleton, recipe: Transform, rounded: Iterable[str]) -> bool:
    """Whether a head has a weight of its own in what the recipe makes of the model, which the files
    of the model tie to its embedding. rounded: the linears around the blocks that are rounded."""
    tied = {*skeleton.names.tied, *skeleton.names.tied.values()}
    first, _ = framing(recipe)
    inside = tuple(f"{path}." for path in skeleton.blocks)
    turned = bool(first) and any(not name.startswith(inside) for name in tied)
    return turned or any(f"{name}.weight" in tied for name in rounded)


def _turned(skeleton: Skeleton, recipe: Transform) -> dict[str, Tensor]:
    """What is in another basis around the blocks, by its names in the files and as it is stored."""
    return {
        skeleton.names.file_name(name): leaf.to(_stored_dtype(skeleton, name)).cpu()
        for name, leaf in turned_around(skeleton, recipe).items()
    }


def _stored_dtype(skeleton: Skeleton, name: str) -> torch.dtype:
    piece = Piece(skeleton.names.file_name(source_of(skeleton, name)))
    return skeleton.names.stored_dtype(piece)


def _rounded_sites(skeleton: Skeleton, recipe: Transform) -> dict[str, Site]:
    """The weights outside the blocks that a stage of the recipe rounds, by the name under which
    they are written."""
    return {
        f"{skeleton.names.module_name(name)}.weight": site
        for name, site in outside_sites(skeleton).items()
        if any(stage.spec and stage.touches(name, site) for stage in recipe)
    }


def _siblings(
    skeleton: Skeleton,
    recipe: Transform,
    rounded_sites: Mapping[str, Site],
    turned: Mapping[str, Tensor],
) -> Siblings:
    """The global scales that the rounded weights share."""
    specs = {
        name.removesuffix(".weight"): stage.spec
        for name, site in rounded_sites.items()
        for stage in recipe
        if stage.spec and stage.touches(site.path, site)
    }

    def read(module: str) -> Tensor:
        name = f"{module}.weight"
        original = turned.get(name, _original(skeleton, name, rounded_sites[name]))
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
    _, behind = framing(recipe)
    return solve_alone(lone_weight(site.path, weight, dtype, outside=True, outer=outer), behind)


def _rounded(
    skeleton: Skeleton,
    recipe: Transform,
    name: str,
    site: Site,
    outer: Tensor | None,
    turned: Mapping[str, Tensor],
) -> OutsideLeaf:
    """A weight outside the blocks, rounded by itself, with the certificate against what was
    read."""
    checkpoint, source = skeleton.checkpoint, _source_of(skeleton, name, site)
    original = _original(skeleton, name, site)
    solved = _solved(skeleton, recipe, turned.get(name, original), site, outer)
    leaf = solved.params["weight"]
    certificates: dict[str, Any] = {}
    if isinstance(leaf, QTensor):
        certificate = certify(leaf, original if source in checkpoint.stored else None)
        made_of = {} if source == name else {"made_of": source}
        certificates[name.rpartition(".")[0]] = certificate | made_of
    return OutsideLeaf(name=name, leaf=leaf, rows=site_rows(solved), certificates=certificates)
