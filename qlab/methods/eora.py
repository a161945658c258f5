"""EoRA: a low rank beside the codes that loses least of the outputs, in the eigenspace of the
inputs (Liu et al. 2024).

    W' = codes + B A,   B A of rank r with the least tr((E - B A) H (E - B A)^T),   E = W - codes

With H = Q D Q^T and M = Q D^1/2 the loss is |(E - B A) M|^2, and the best is U_r U_r^T E, where U_r
are the r leading left singular vectors of E M.

Legend: E_ok what codes are off, H_kk mean second moment of the input.
"""

from functools import partial

import torch
from torch import Tensor

from qlab.algebra.cell import Cell, Weight
from qlab.algebra.operations import Operations
from qlab.algebra.transform import Transform, costing, each_cell
from qlab.methods.lqer import BESIDE, RANK, beside, bits_of, check_rank, leading, lost


def root(H_kk: Tensor) -> Tensor:
    """M [k, k] in fp64 with M M^T = H. Directions that no input has weigh as little as those that
    fp32 does not tell from none, so that a rank left over goes to them."""
    D_k, Q_kk = torch.linalg.eigh(H_kk.double())
    limits = torch.finfo(torch.float32)
    least = max(float(D_k[-1]), limits.tiny) * len(D_k) * limits.eps
    return Q_kk * D_k.clamp_min(least).sqrt()


def eora(rank: int = RANK) -> Transform:
    """EoRA: a low rank beside the codes with the least output error of its rank.

    Args:
        rank: r of the product; a weight with a smaller side takes that.

    Returns:
        A transform of one stage, to be put behind a rounding or a mask. It needs calibration data.
        Formats hold no low rank: evaluate or lower what `qlab.apply` makes of it.

    Raises:
        QlabError: the rank is below 1, or (when it runs) no step before it rounded the weight.

    Source:
        Liu et al. 2024, EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace
        Low-Rank Approximation.

    Example:
        >>> import qlab
        >>> recipe = qlab.chain(qlab.gptq("int3-g64"), qlab.eora(rank=64))
        >>> [(stage.name, stage.detail) for stage in recipe][-1]
        ('eora', 'rank 64')
    """
    check_rank(rank, "eora")

    def fn(weight: Weight) -> Cell:
        E_ok = lost(weight, "eora")
        M_kk = root(weight.stats["second_moment"].mean_kk)
        return beside(weight.cell, E_ok, leading(E_ok.double() @ M_kk, rank))

    detail, bits = f"rank {rank}", partial(bits_of, rank)
    stages = each_cell("eora", fn, {"second_moment"}, detail=detail, leaves=BESIDE, beside=bits)
    return costing(stages, Operations(square=1 / 2, rows=28))
