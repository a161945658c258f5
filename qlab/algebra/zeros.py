"""Zeros of a mask: what a step sets to 0 that rounds nothing stays 0 behind it, or the step that
moves it is refused."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.qtensor import QTensor, dense
from qlab.errors import QlabError

NOTE = "zeros"  # the share of a site's weights that a step set to 0, in its report


def refuse_lost(step: str, before: ModuleGraph, after: ModuleGraph) -> None:
    """Refuse a step behind one that pruned, if what was 0 is so no more."""
    for site in _changed(before, after):
        if before.notes.get(site.path, {}).get(NOTE):
            lost = sum(_lost(W, made) for W, made in _weights(before, after, site))
            if lost:
                raise QlabError(
                    f"{before.where(site)}: {step} moves {lost} weights that a step before it set "
                    "to 0; round to nearest there (rtn keeps zeros), or let one step choose "
                    "zeros and codes together"
                )


def noted(before: ModuleGraph, after: ModuleGraph) -> ModuleGraph:
    """The graph after a step that rounds nothing, with the share of each weight that it set to 0 in
    its notes."""
    notes = dict(after.notes)
    for site in _changed(before, after):
        shares = [
            float(((made == 0) & (W != 0)).float().mean())
            for W, made in _weights(before, after, site)
        ]
        if any(shares):
            notes[site.path] = {**notes.get(site.path, {}), NOTE: sum(shares) / len(shares)}
    return replace(after, notes=notes)


def _changed(before: ModuleGraph, after: ModuleGraph) -> list[Site]:
    """The sites of another weight, which was dense."""
    names = {name for name, leaf in after.params.items() if leaf is not before.params[name]}
    return [
        site
        for site in before.sites
        if site.weight in names and isinstance(before.params[site.weight], Tensor)
    ]


def _lost(W: Tensor, made: Tensor) -> int:
    pruned = W == 0
    return int((made[pruned] != 0).sum()) if pruned.any() else W.numel()


def _weights(
    before: ModuleGraph, after: ModuleGraph, site: Site
) -> Iterator[tuple[Tensor, Tensor]]:
    """A weight [o, k] before and after, expert by expert where there are several."""
    leaf = after.params[site.weight or ""]
    for expert in range(leaf.shape[0]) if len(leaf.shape) == 3 else [None]:
        made = (
            dense(_part(leaf, expert), torch.float32)
            if isinstance(leaf, QTensor)
            else after.weight_ok(site, expert)
        )
        yield before.weight_ok(site, expert), made


def _part(leaf: QTensor, expert: int | None) -> QTensor:
    return leaf if expert is None else pytree.tree_map_only(Tensor, lambda t: t[expert], leaf)
