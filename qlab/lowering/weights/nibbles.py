"""Any integer weight as planes of 4-bit codes, the one form that every int4 kernel multiplies.

    bits <= 4:  W = (q - z) * s, with q in -8..7: narrower codes are stored in 4 bits
    bits  > 4:  code = 16 * hi + lo + 8, so W = hi * 16s + (lo - (z - 8)) * s: two planes side by
                side along k, with x beside itself

    y = x @ W.T = [x | x] @ [hi plane | lo plane].T

A 5- to 8-bit weight takes 8 bits, a 2- or 3-bit one takes 4. Groups wider than a kernel's are cut
into some that repeat a scale.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Spec
from qlab.errors import QlabError

GROUPS = (256, 128, 64, 32)  # what aten's and qlab's own kernels read
ROW_MULTIPLE = 64  # whole rows that 32 does not divide are padded to it


@dataclass(frozen=True, kw_only=True)
class Planes:
    """q: int8 [n, count * k_padded] in -8..7. scales, zeros: fp32 [n, count * k_padded / group];
    zeros is None when symmetric.

    k: the true number of input channels. The channels appended to it weigh nothing, because the
    activations are zero there.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor | None
    k: int
    group: int
    count: int

    def to(self, device: torch.device) -> "Planes":
        """The same on a device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, q=self.q.to(device), scales=self.scales.to(device), zeros=zeros)


def refusal(spec: Spec, shape: torch.Size) -> str | None:
    """Why no int4 kernel multiplies such a weight [..., o, k], or None."""
    if not isinstance(spec, Int):
        return f"{spec} has no kernel; kernels multiply integer codes"
    (o, k), (rows, cols) = shape[-2:], spec.tile.sizes(shape)
    if o % rows or k % cols:
        return f"blocks of {rows}x{cols} that do not divide a weight {tuple(shape)} have no kernel"
    if (cols + _padding(k, cols)) % GROUPS[-1]:
        return (
            f"groups of {cols} have no int4 kernel; quantize with groups of 32, 64, 128, 256 or "
            "whole rows"
        )
    return None


def planes_of(path: str, leaf: QTensor, whole_rows: bool = False) -> Planes:
    """A quantized weight [o, k] as planes, its channels in the order of the codes. whole_rows: the
    kernel reads one scale per row without cutting the row into groups.

    Errors: whatever `refusal` names.
    """
    reason = refusal(leaf.spec, leaf.shape)
    if reason:
        raise QlabError(f"{path}: {reason}")
    rows, cols = leaf.spec.tile.sizes(leaf.shape)
    k = leaf.shape[1]
    if whole_rows and cols == k and leaf.spec.bits <= 4:
        group, pad = k, 0
    else:
        pad = _padding(k, cols)
        group = next(g for g in GROUPS if (cols + pad) % g == 0)
    repeat = (cols + pad) // group
    scales = leaf.scales.float().repeat_interleave(rows, 0).repeat_interleave(repeat, 1)
    zeros = None
    if leaf.zeros is not None:
        zeros = leaf.zeros.float().repeat_interleave(rows, 0).repeat_interleave(repeat, 1)
    if leaf.spec.bits <= 4:
        q = F.pad(leaf.codes, (0, pad))
        return Planes(q=q, scales=scales, zeros=zeros, k=k, group=group, count=1)
    hi, lo = leaf.codes >> 4, (leaf.codes & 15) - 8
    lo_zeros = (torch.zeros_like(scales) if zeros is None else zeros) - 8
    q = torch.cat([F.pad(hi, (0, pad)), F.pad(lo, (0, pad))], 1)
    return Planes(
        q=q,
        scales=torch.cat([16 * scales, scales], 1),
        zeros=torch.cat([torch.zeros_like(scales), lo_zeros], 1),
        k=k,
        group=group,
        count=2,
    )


def _padding(k: int, cols: int) -> int:
    """How many channels are appended to a row of k where it is one group."""
    return plane_width(k) - k if cols == k else 0


def plane_width(k: int) -> int:
    """Channels of one plane of a weight with k input channels."""
    return k if k % GROUPS[-1] == 0 else -(-k // ROW_MULTIPLE) * ROW_MULTIPLE


def spread(x_mk: Tensor, count: int) -> Tensor:
    """The activations that the planes multiply, contiguous: padded with zeros to a plane's width;
    for two planes, beside themselves."""
    padding = plane_width(x_mk.shape[1]) - x_mk.shape[1]
    if padding:
        x_mk = F.pad(x_mk, (0, padding))
    return x_mk.contiguous() if count == 1 else torch.cat([x_mk, x_mk], 1)
