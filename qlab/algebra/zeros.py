"""Zeros of a mask: where a step that rounds nothing sets weights to 0 they stay 0 (the graph's
supports), or the step that moves them is refused."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qlab.algebra.cell import moved, moves
from qlab.algebra.graph import ModuleGraph, Site
from qlab.errors import QlabError

NOTE = "zeros"  # the share of a site's weights that a step set to 0, in its report


def narrowed(step: str, before: ModuleGraph, after: ModuleGraph) -> ModuleGraph:
    """The graph after a step, with the zeros that the graph before it had. Refuses a step that
    moves some."""
    if not before.supports:
        return after
    supports = dict(after.supports)
    for name, support in before.supports.items():
        if supports.get(name) is not support:
            supports[name] = support & supports.get(name, support)
    for site in _changed(before, after):
        support_ok = supports.get(site.weight or "")
        lost = 0 if support_ok is None else _lost(after, site, support_ok)
        if lost:
            raise QlabError(f"{before.where(site)}: {step} {moves(lost)}")
    return replace(after, supports=supports)


def masked(before: ModuleGraph, after: ModuleGraph) -> ModuleGraph:
    """The graph after a step that rounds nothing. Where the step set weights to 0 they stay 0; what
    they were is still their target. The notes of a site hold the share of its weights."""
    notes, supports, targets = dict(after.notes), dict(after.supports), dict(after.targets)
    for site in _changed(before, after):
        name = site.weight or ""
        if not (isinstance(before.params[name], Tensor) and isinstance(after.params[name], Tensor)):
            continue
        pairs = list(_weights(before, after, site))
        shares = [float(((W_after == 0) & (W != 0)).float().mean()) for W, W_after in pairs]
        if not any(shares):
            continue
        notes[site.path] = {**notes.get(site.path, {}), NOTE: sum(shares) / len(shares)}
        if after.supports.get(name) is before.supports.get(name):  # else the step said it
            supports[name] = _of_all([W_after != 0 for _, W_after in pairs], site)
        if name not in targets:
            targets[name] = _unmasked(before, site, [W_after for _, W_after in pairs])
    return replace(after, notes=notes, supports=supports, targets=targets)


def _unmasked(before: ModuleGraph, site: Site, after: list[Tensor]) -> Tensor:
    """What a masked weight is to be near to, in the layout of the site: itself, and where it was
    set to 0 the target that it had. That target as it is where nothing else changed."""
    experts = _experts(before, site)
    targets = [before.target_ok(site, expert) for expert in experts]
    name = site.weight or ""
    if all(torch.equal(W[W != 0], T[W != 0]) for W, T in zip(after, targets)):
        return before.targets.get(name, before.params[name])
    whole = _of_all([torch.where(W != 0, W, T) for W, T in zip(after, targets)], site)
    return whole.mT.contiguous() if site.layout.endswith("k o") else whole


def _of_all(parts: list[Tensor], site: Site) -> Tensor:
    return parts[0] if site.route is None else torch.stack(parts)


def _changed(before: ModuleGraph, after: ModuleGraph) -> list[Site]:
    """The sites whose leaf is another now."""
    return [
        site
        for site in before.sites
        if site.weight and after.params[site.weight] is not before.params[site.weight]
    ]


def _lost(after: ModuleGraph, site: Site, support: Tensor) -> int:
    """How many weights off the support are not 0."""
    if site.route is None:
        return moved(after.leaf_ok(site), support)
    return sum(moved(after.leaf_ok(site, e), support[e]) for e in range(len(support)))


def _experts(graph: ModuleGraph, site: Site) -> list[int | None]:
    return [None] if site.route is None else list(range(graph.params[site.weight or ""].shape[0]))


def _weights(
    before: ModuleGraph, after: ModuleGraph, site: Site
) -> Iterator[tuple[Tensor, Tensor]]:
    """A weight [o, k] before and after, expert by expert where there are several."""
    for expert in _experts(before, site):
        yield before.weight_ok(site, expert), after.weight_ok(site, expert)
