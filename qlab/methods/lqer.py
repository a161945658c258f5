"""LQER: a low rank stands beside the codes and makes up for what rounding lost (Zhang et al. 2024).

    W' = codes + B A,   B A the best of rank r for |(E - B A) S|,   E = W - codes

S = I in LQER; S = diag(s), s_k = mean|x_k| / sqrt(min * max) of all k, in L2QER. With U_r the r
leading left singular vectors of E S, B A = U_r U_r^T E, so S is never inverted.

Legend: W_ok weight, E_ok what its codes are off, U_or orthonormal columns.
"""

import math
from functools import partial

import torch
from torch import Tensor

from qlab.algebra.cell import Cell, Weight
from qlab.algebra.leaf import LowRank, Sum, dense, proper
from qlab.algebra.operations import Operations
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Spec
from qlab.algebra.tile import is_size
from qlab.algebra.transform import Transform, costing, each_cell
from qlab.errors import QlabError

RANK = 32
BESIDE = "codes with a low rank beside them"


def leading(X_ok: Tensor, rank: int) -> Tensor:
    """The left singular vectors U [o, r] of X with the largest singular values, in fp64."""
    X = X_ok.double()
    if X.shape[0] <= X.shape[1]:
        return torch.linalg.eigh(X @ X.T).eigenvectors[:, -rank:]
    V_kr = torch.linalg.eigh(X.T @ X).eigenvectors[:, -rank:]
    return torch.linalg.qr(X @ V_kr).Q


def lost(weight: Weight, step: str) -> Tensor:
    """E [o, k], what the weight is off its target. Refuses a weight that no step before rounded or
    pruned."""
    cell = weight.cell
    if cell.leaf is cell.target:
        raise QlabError(
            f"{step} makes up for what a step before it lost, and none rounded this weight; put a "
            f"rounding before it, such as chain(rtn(spec), {step}())"
        )
    return cell.target - dense(cell.leaf, torch.float32)


def beside(cell: Cell, E_ok: Tensor, U_or: Tensor) -> Cell:
    """The cell with U (U^T E) beside its leaf, in the dtype of the scales, or in bfloat16 where
    those have 8 bits or there are none."""
    codes = proper(cell.leaf)
    dtype = _stored(codes.scales.dtype if isinstance(codes, QTensor) else None)
    A_rk = U_or.T @ E_ok.to(U_or.dtype)
    thin = LowRank(U_or.to(dtype).contiguous(), A_rk.to(dtype))
    return cell.put(Sum((cell.leaf, thin)), rank=U_or.shape[1])


def _stored(scales: torch.dtype | None) -> torch.dtype:
    """The dtype of the factors beside codes with scales of a dtype; None where there are none."""
    return scales if scales is not None and scales.itemsize > 1 else torch.bfloat16


def bits_of(rank: int, shape: torch.Size, spec: Spec | None) -> float:
    """The bits of a low rank beside a weight [..., o, k]."""
    *experts, o, k = shape
    numbers = math.prod(experts) * min(rank, o, k) * (o + k)
    return 8.0 * _stored(spec.scale_dtype if spec else None).itemsize * numbers


def check_rank(rank: int, step: str) -> None:
    """Refuse a rank that is none."""
    if not is_size(rank) or rank < 1:
        raise QlabError(f"{step}'s rank is {rank!r}; give a whole number from 1 on, such as {RANK}")


def lqer(rank: int = RANK) -> Transform:
    """LQER: the singular vectors of the rounding error, beside the codes. It needs no data.

    Args:
        rank: r of the product; a weight with a smaller side takes that.

    Returns:
        A transform of one stage, to be put behind a rounding. Formats hold no low rank: evaluate or
        lower what `qlab.apply` makes of it.

    Raises:
        QlabError: the rank is below 1, or (when it runs) no step before it rounded the weight.

    Source:
        Zhang et al. 2024, LQER: Low-Rank Quantization Error Reconstruction for LLMs.

    Example:
        >>> import qlab
        >>> [stage.name for stage in qlab.chain(qlab.rtn("int4-g64"), qlab.lqer(16))]
        ['rtn', 'lqer']
    """
    check_rank(rank, "lqer")

    def fn(weight: Weight) -> Cell:
        E_ok = lost(weight, "lqer")
        return beside(weight.cell, E_ok, leading(E_ok, rank))

    detail, bits = f"rank {rank}", partial(bits_of, rank)
    stages = each_cell("lqer", fn, detail=detail, leaves=BESIDE, beside=bits)
    return costing(stages, Operations(rows=8))  # singular vectors


def l2qer(rank: int = RANK) -> Transform:
    """L2QER: the same of errors that weigh by the mean size of the inputs that they meet.

    Args:
        rank: see `lqer`.

    Returns:
        See `lqer`. It needs calibration data.

    Raises:
        QlabError: See `lqer`.

    Source:
        Zhang et al. 2024, LQER: Low-Rank Quantization Error Reconstruction for LLMs (L2QER).

    Example:
        >>> import qlab
        >>> (stage,) = qlab.l2qer()
        >>> stage.name, stage.detail, sorted(stage.needs)
        ('l2qer', 'rank 32', ['absmean'])
    """
    check_rank(rank, "l2qer")

    def fn(weight: Weight) -> Cell:
        E_ok = lost(weight, "l2qer")
        total_k, tokens = weight.stats["absmean"]
        s_k = scaling(total_k / tokens) if tokens else torch.ones_like(total_k)
        return beside(weight.cell, E_ok, leading(E_ok * s_k, rank))

    detail, bits = f"rank {rank}", partial(bits_of, rank)
    stages = each_cell("l2qer", fn, {"absmean"}, detail=detail, leaves=BESIDE, beside=bits)
    return costing(stages, Operations(rows=8))  # singular vectors


def scaling(absmean_k: Tensor) -> Tensor:
    """s_k = mean|x_k| / sqrt(min * max). Channels that are always 0 count as the least that is
    not."""
    positive = absmean_k[absmean_k > 0]
    if not len(positive):
        return torch.ones_like(absmean_k)
    return absmean_k.clamp_min(float(positive.min())) / (positive.min() * positive.max()).sqrt()
