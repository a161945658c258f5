"""Exact sums of int8 products, and activations as the codes that they are made of."""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.algebra.grid import encode, minmax
from qlab.algebra.qtensor import round_codes
from qlab.lowering.weights.exact import spec_of

Part = Tensor | None
# Tokens that a CPU multiplies one by one: oneDNN reads the weight of one token as it lies, and
# orders it anew for several.
ONE_BY_ONE = 8
GPU_ROWS, GPU_MULTIPLE = 32, 8  # what CUDA's product of int8 needs: over 16 rows, multiples of 8


class Codes(NamedTuple):
    """Rounded activations: p int8 [m, k], scales fp32 [m, 1] or [1, 1], zeros alike or None."""

    p: Tensor
    scales: Tensor
    zeros: Part

    def of(self, rows: slice) -> "Codes":
        """Those of some rows."""
        if len(self.scales) == 1:
            return self._replace(p=self.p[rows])
        zeros = None if self.zeros is None else self.zeros[rows]
        return Codes(self.p[rows], self.scales[rows], zeros)


def rounded(x_mk: Tensor, perm: Part, scales: Part, zeros: Part, spec: str) -> Codes:
    """x in codes, as QuantizeInput rounds it, its channels in the order of the weight's."""
    grid, wide = spec_of(spec), x_mk.float()
    if scales is None:
        q = encode(minmax, wide, grid)
        p, scales, zeros = q.codes, q.scales, q.zeros
    else:
        p = round_codes(wide, scales, zeros, grid)
    return Codes(p if perm is None else p[:, perm], scales.float(), zeros)


def product(codes: Codes, words: Tensor, scales: Tensor, zeros: Part, sums: Part) -> Tensor:
    """y [m, n] in fp32 of codes and one weight [c, n, g]."""
    y = None
    for c, p in enumerate(codes.p.split(words.shape[-1], 1)):
        exact = integers(p, words[c])
        if zeros is not None:
            exact = exact - p.sum(1, keepdim=True, dtype=torch.int32) * zeros[c]
        if sums is not None:
            assert codes.zeros is not None
            exact = exact - codes.zeros.int() * sums[c]
        part = exact.float().mul_(scales[c])
        y = part if y is None else y.add_(part)
    assert y is not None
    return y.mul_(codes.scales)


def integers(p_mk: Tensor, q_nk: Tensor) -> Tensor:
    """p @ q.T in int32, exactly."""
    if p_mk.device.type == "cpu":
        p_mk = p_mk.contiguous()
        if len(p_mk) <= ONE_BY_ONE:
            return torch.cat([torch._int_mm(p_mk[i : i + 1], q_nk.mT) for i in range(len(p_mk))])
        return torch._int_mm(p_mk, q_nk.mT)
    m, n = len(p_mk), len(q_nk)
    padding_k = -p_mk.shape[1] % GPU_MULTIPLE
    p_mk = F.pad(p_mk, (0, padding_k, 0, max(GPU_ROWS - m, 0)))
    q_nk = F.pad(q_nk, (0, padding_k, 0, -n % GPU_MULTIPLE))
    return torch._int_mm(p_mk.contiguous(), q_nk.contiguous().mT)[:m, :n]


@cache
def is_exact() -> bool:
    """Whether the CPU's sums of int8 products are exact: without VNNI, oneDNN adds pairs of them in
    16 bits."""
    p = torch.full((GPU_ROWS, 64), 127, dtype=torch.int8)
    q = torch.where(torch.arange(64) % 2 == 0, -128, 127).to(torch.int8).expand(8, 64).contiguous()
    rows = (p[:1], p)
    return all(
        torch.equal(torch._int_mm(x, other.mT), x.int() @ other.int().mT)
        for x in rows
        for other in (q, p[:8].contiguous())
    )
