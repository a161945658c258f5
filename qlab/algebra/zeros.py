"""Zeros of a mask: weights that a step set to 0 without rounding stay 0 behind it, or the step that
moves them is refused."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.leaf import dense, proper
from qlab.errors import QlabError

NOTE = "zeros"  # the share of a site's weights that a step set to 0, in its report


def refuse_lost(step: str, before: ModuleGraph, after: ModuleGraph) -> None:
    """Refuse a step that moves zeros which a step before it set."""
    for site in _changed(before, after):
        if before.notes.get(site.path, {}).get(NOTE):
            lost = sum(_lost(W, W_after) for W, W_after in _weights(before, after, site))
            if lost:
                raise QlabError(
                    f"{before.where(site)}: {step} moves {lost} weights that a step before it set "
                    "to 0; round to nearest there (rtn keeps zeros), or let one step choose "
                    "zeros and codes together"
                )


def noted(before: ModuleGraph, after: ModuleGraph) -> ModuleGraph:
    """The graph after a step that rounds nothing. The notes of a site hold the share of its weight
    that the step set to 0."""
    notes = dict(after.notes)
    for site in _changed(before, after):
        shares = [
            float(((W_after == 0) & (W != 0)).float().mean())
            for W, W_after in _weights(before, after, site)
        ]
        if any(shares):
            notes[site.path] = {**notes.get(site.path, {}), NOTE: sum(shares) / len(shares)}
    return replace(after, notes=notes)


def _changed(before: ModuleGraph, after: ModuleGraph) -> list[Site]:
    """The sites whose weight was dense and is another now."""
    names = {name for name, leaf in after.params.items() if leaf is not before.params[name]}
    return [
        site
        for site in before.sites
        if site.weight in names and isinstance(before.params[site.weight], Tensor)
    ]


def _lost(W: Tensor, W_after: Tensor) -> int:
    """How many zeros of W are none in W_after; all weights where W itself has none, since then a
    step between moved its zeros."""
    pruned = W == 0
    return int((W_after[pruned] != 0).sum()) if pruned.any() else W.numel()


def _weights(
    before: ModuleGraph, after: ModuleGraph, site: Site
) -> Iterator[tuple[Tensor, Tensor]]:
    """A weight [o, k] before and after, expert by expert where there are several."""
    leaf = after.params[site.weight or ""]
    for expert in range(leaf.shape[0]) if len(leaf.shape) == 3 else [None]:
        W = before.weight_ok(site, expert)
        if isinstance(leaf, Tensor):
            yield W, after.weight_ok(site, expert)
        else:
            yield W, dense(proper(_part(leaf, expert)), torch.float32)


def _part(leaf: Any, expert: int | None) -> Any:
    return leaf if expert is None else pytree.tree_map_only(Tensor, lambda t: t[expert], leaf)
