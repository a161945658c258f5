"""Change the basis of a site's inputs without changing what the segment computes."""

from dataclasses import replace

import torch
from torch import Tensor

from qlab.algebra.graph import ModuleGraph, by_origin, by_source
from qlab.algebra.online import Multiply, Rotate
from qlab.algebra.stats import Stats, transport
from qlab.errors import QlabError

PROBES, INVERSE = 16, 1e-4  # rows, and how far they may come back off


def reparametrize(
    graph: ModuleGraph, stats: Stats, origin: str, M: Tensor, M_inv: Tensor
) -> tuple[ModuleGraph, Stats]:
    """x -> x @ M at the inputs of all sites of an origin, W -> W @ M_inv^T, statistics transported:
    the function stays.

    M and M_inv are vectors [k] (diagonals), matrices [k, k], or diagonals [e, 1, k] of experts that
    feed themselves. Every site of the origin must be selected, since they share its channels. M_inv
    is the inverse of M: of a rotation, M.T.
    """
    sharing = by_origin(graph.code.sites)[origin]
    outside = [graph.where(s) for s in sharing if s not in graph.sites]
    if outside:
        raise QlabError(
            f"{', '.join(outside)} shares its input with "
            f"{', '.join(map(graph.where, graph.sites))}; a reparametrization needs one rule for "
            "all of them"
        )
    _refuse_no_inverse(", ".join(map(graph.where, sharing)), M, M_inv)
    M = M.clone()  # the caller's own may change, and this stays with the input
    leaves, online = {}, dict(graph.online)
    for site in sharing:
        W_ok = graph.weight_ok(site)
        moved = W_ok * M_inv if M_inv.ndim != 2 else (W_ok.double() @ M_inv.T.double()).float()
        assert site.weight is not None
        leaves[site.weight] = moved.mT if site.layout.endswith("k o") else moved
        online[site.path] = (*online.get(site.path, ()), Rotate(M) if M.ndim == 2 else Multiply(M))
    for source in by_source(sharing):
        stats = transport(stats, source, M)
    return replace(graph.update(leaves), online=online), stats


def _refuse_no_inverse(where: str, M: Tensor, M_inv: Tensor) -> None:
    """Refuse matrices that do not undo each other, by what becomes of some rows x under x @ M @
    M_inv."""
    if M.shape != M_inv.shape or M.ndim not in (1, 2, 3):
        raise QlabError(
            f"M {tuple(M.shape)} and M_inv {tuple(M_inv.shape)} at the input of {where} differ in "
            "shape; give vectors [k], matrices [k, k] or diagonals [e, 1, k] of experts"
        )
    if M.ndim == 2:
        x_nk = torch.randn(
            PROBES, len(M), generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ).to(M.device)
        error = (x_nk @ M.double() @ M_inv.double() - x_nk).square().mean(0).sqrt()
    else:
        error = (M.double() * M_inv.double() - 1).abs()
    if not (error <= INVERSE).all():
        raise QlabError(
            f"M_inv is not the inverse of M at the input of {where}: x @ M @ M_inv differs from x "
            f"by {float(error.max()):.1e}; give the inverse itself, which of a rotation is M.T"
        )
