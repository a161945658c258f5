"""Weights that several blocks share: the files hold them once, so a recipe may make one of each."""

from collections.abc import Collection, Mapping
from typing import Any

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.qtensor import Leaf, QTensor
from qlab.algebra.spec import Spec
from qlab.algebra.transform import Transform
from qlab.driver.sites import Sites
from qlab.driver.writing import written_as
from qlab.errors import QlabError
from qlab.files.certificate import fingerprint, hash_of, promised
from qlab.model.pieces import Piece
from qlab.model.skeleton import Skeleton


def refuse_dividing(
    skeleton: Skeleton, recipe: Transform, found: Sites, specs: Mapping[str, Spec | None]
) -> None:
    """Refuse a recipe that could make two of a weight that blocks share, before any work."""
    for name, other in _pairs(skeleton, found).items():
        if specs[name] != specs[other]:
            raise QlabError(
                f"{name} and {other} are one weight, and the recipe makes one "
                f"{specs[name] or 'dense'} and the other {specs[other] or 'dense'}; give both one "
                "rule"
            )
        for stage in recipe:
            touched = any(stage.touches(site, found.sites[site]) for site in (name, other))
            if touched and (stage.needs or not stage.view.site_by_site):
                raise QlabError(
                    f"{name} and {other} are one weight, of which the stage {stage.name!r} would "
                    "make two, from what reaches each block; use rtn or hqq there, or keep() them"
                )


def _pairs(skeleton: Skeleton, found: Sites) -> dict[str, str]:
    """Site of a block -> the site of an earlier block whose weight is the same one."""
    first: dict[str, str] = {}
    pairs = {}
    for path, code in found.codes.items():
        for site in code.sites:
            name, weight = f"{path}.{site.path}", f"{path}.{site.weight}"
            other = first.setdefault(skeleton.names.tied.get(weight, weight), name)
            if other != name:
                pairs[name] = other
    return pairs


def shared(
    skeleton: Skeleton, graph: ModuleGraph, changed: Collection[str]
) -> dict[str, dict[str, Any]]:
    """What a block made of tensors that another block writes: the hash of each. Empty where there
    is none. changed: as of `changed`."""
    rows = {}
    for name, leaf in graph.params.items():
        full = f"{graph.path}.{name}"
        if skeleton.writes(full) or not skeleton.programs.uses(full):
            continue
        for piece in written_as(skeleton, graph, name):
            made = _hash(skeleton, piece, leaf) if piece.name in changed else None
            rows[full] = {"of": piece.name, "hash": made}
    return {"shared": rows} if rows else {}


def _hash(skeleton: Skeleton, piece: Piece, leaf: Leaf) -> str:
    part = piece.of(leaf)
    if isinstance(part, QTensor):
        return fingerprint(part)
    return hash_of(part.to(skeleton.names.stored_dtype(piece)))


def refuse_divided(notes: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a recipe that made two of what the files hold once. notes: of all blocks."""
    certified = {f"{name}.weight": promised(row) for name, row in notes["certificates"].items()}
    written = {**notes["changed"], **certified}
    for name, row in notes.get("shared", {}).items():
        if written.get(row["of"]) != row["hash"]:
            raise QlabError(
                f"{name} and {row['of']} are one tensor of the model, and the recipe makes two of "
                "it; use a method that gives both blocks the same, such as rtn, or keep both"
            )
