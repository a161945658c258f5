"""Change the basis of a site's inputs, and of its weight, so that the function stays.

Legend: W_ok weight [o, k], x its input, M the change of basis.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qlab.algebra.graph import ModuleGraph, Op, Site, by_origin, by_source
from qlab.algebra.online import MatMul, Multiply, Rotate, rotate
from qlab.algebra.stats import Stats, transport
from qlab.errors import QlabError

PROBES = 16  # rows x that show whether x @ M @ M_inv is x
INVERSE = 1e-4  # how far they may be off


def reparametrize(
    graph: ModuleGraph, stats: Stats, origin: str, M: Tensor, M_inv: Tensor
) -> tuple[ModuleGraph, Stats]:
    """x -> x @ M and W -> W @ M_inv^T at every site of an origin, so that the function stays.

    The statistics of the inputs are transported. Those that M cannot move are dropped.

    Args:
        graph: the segment, with all sites of the origin selected, since they share its channels.
        stats: (source, statistic) -> state.
        origin: the node whose channels reach the sites (`Site.origin`).
        M: the change of basis in fp32: a vector [k] (a scale per channel), a matrix [k, k], a
            matrix [n, n] for every n neighbouring channels, matrices [b, n, n] for b blocks of
            them, or for experts that feed themselves a scale of each [e, 1, k].
        M_inv: its inverse, in the same shape. Of a rotation that is M.T.

    Returns:
        The graph and statistics after it. M stays at the inputs as an operation at run time, until
        `absorb` folds it into what produces them.

    Raises:
        QlabError: a site of the origin is not selected or is quantized already, or M_inv is not
            the inverse of M.

    Example:
        >>> import qlab, torch
        >>> from qlab.algebra.graph import lone_weight
        >>> m_k = torch.tensor([1.0, 2.0, 4.0])
        >>> graph = lone_weight("proj", torch.ones(1, 3))
        >>> graph, stats = qlab.reparametrize(graph, {}, "proj", m_k, 1 / m_k)
        >>> graph.params["weight"], graph.online["proj"]
        (tensor([[1.0000, 0.5000, 0.2500]]), (Multiply(m_k=tensor([1., 2., 4.])),))
    """
    sharing = by_origin(graph.code.sites)[origin]
    unselected = [graph.where(s) for s in sharing if s not in graph.sites]
    if unselected:
        raise QlabError(
            f"{', '.join(unselected)} shares its input with "
            f"{', '.join(map(graph.where, graph.sites))}; a reparametrization needs one rule for "
            "all of them"
        )
    _refuse_no_inverse(", ".join(map(graph.where, sharing)), M, M_inv)
    M = M.clone()  # it stays with the input, and the caller may change his own
    leaves, targets, online = {}, {}, dict(graph.online)
    for site in sharing:
        W_ok = graph.weight_ok(site)
        _refuse_misfit(graph.where(site), W_ok, M)
        assert site.weight is not None
        leaves[site.weight] = _laid(site, _against(W_ok, M_inv))
        if site.weight in graph.targets:
            targets[site.weight] = _laid(site, _against(graph.target_ok(site), M_inv))
        online[site.path] = (*online.get(site.path, ()), _operation(M, W_ok.shape[-1]))
    for source in by_source(sharing):
        if any(of_source == source for of_source, _ in stats):
            stats = transport(stats, source, _whole(M, W_ok.shape[-1]))
    graph = graph.update(leaves)
    return replace(graph, online=online, targets={**graph.targets, **targets}), stats


def _laid(site: Site, W_ok: Tensor) -> Tensor:
    return W_ok.mT if site.layout.endswith("k o") else W_ok


def is_scale(M: Tensor) -> bool:
    """Whether a change of basis is diagonal: [k], or [e, 1, k] of experts."""
    return M.ndim == 1 or (M.ndim == 3 and M.shape[1] == 1)


def _against(W_ok: Tensor, M_inv: Tensor) -> Tensor:
    """W @ M_inv^T."""
    if is_scale(M_inv):
        return W_ok * M_inv
    if M_inv.ndim == 2 and len(M_inv) == W_ok.shape[-1]:
        return (W_ok.double() @ M_inv.T.double()).float()
    return rotate(W_ok.double(), M_inv.mT.double()).float()


def _operation(M: Tensor, k: int) -> Op:
    if is_scale(M):
        return Multiply(M)
    return Rotate(M) if M.shape == (k, k) else MatMul(M)


def _whole(M: Tensor, k: int) -> Tensor:
    """M as statistics are transported by it: blocks as the matrix [k, k] that they are together."""
    if is_scale(M) or M.shape == (k, k):
        return M
    return torch.block_diag(*(M if M.ndim == 3 else [M] * (k // len(M))))


def _refuse_misfit(where: str, W_ok: Tensor, M: Tensor) -> None:
    """Refuse an M that is for other channels than the weight's."""
    k, n = W_ok.shape[-1], M.shape[-1]
    blocks = len(M) if M.ndim == 3 and not is_scale(M) else None
    fits = n == k if is_scale(M) else k % n == 0 and blocks in (None, k // n)
    if not fits:
        raise QlabError(
            f"M {tuple(M.shape)} does not fit the {k} input channels of {where}; give a vector "
            "[k], or matrices [n, n] whose n divides k"
        )


def _refuse_no_inverse(where: str, M: Tensor, M_inv: Tensor) -> None:
    """Refuse an M_inv with which x @ M @ M_inv is not x for some random rows x."""
    square = is_scale(M) or (M.ndim in (2, 3) and M.shape[-1] == M.shape[-2])
    if M.shape != M_inv.shape or not square:
        raise QlabError(
            f"M {tuple(M.shape)} and M_inv {tuple(M_inv.shape)} at the input of {where} differ in "
            "shape; give vectors [k], matrices [k, k] or diagonals [e, 1, k] of experts"
        )
    if not is_scale(M):
        seeded = torch.Generator().manual_seed(0)
        drawn = torch.randn(PROBES, M.shape[-1], generator=seeded, dtype=torch.float64)
        x_nk = drawn.to(M.device)
        error = (x_nk @ M.double() @ M_inv.double() - x_nk).square().mean(-2).sqrt()
    else:
        error = (M.double() * M_inv.double() - 1).abs()
    if not (error <= INVERSE).all():
        raise QlabError(
            f"M_inv is not the inverse of M at the input of {where}: x @ M @ M_inv differs from x "
            f"by {float(error.max()):.1e}; give the inverse itself, which of a rotation is M.T"
        )
