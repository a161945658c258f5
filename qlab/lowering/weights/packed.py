"""A weight in packed 4-bit codes as one value, from the module that holds it to the kernel that
multiplies with it.

torch's operators take tensors and numbers and no values of classes. `for_dequantize`, `for_mm` and
`for_grouped_mm` give the arguments of qlab's operators in the order of their schemas, and nothing
else takes a `Packed` apart.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """W [n, k], or [e, n, k] for e experts, in the order in which a device's kernels read codes.

    words, scales, zeros: as `cpu.pack` or `cuda.pack` made them, those of experts with a leading
    axis e; zeros is None for a symmetric spec.
    perm: int64 [k], the input channel of every column of codes, or None. W's columns follow it.
    n, k: output and input channels, without padding.
    group: codes per scale.
    planes: how many planes of 4-bit codes (`nibbles`) W has: two for codes of more than four bits.
    layout: the name of the order of `words`.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    n: int
    k: int
    group: int
    planes: int
    layout: str

    def expert(self, e: int) -> "Packed":
        """The weight of one expert."""
        zeros = None if self.zeros is None else self.zeros[e]
        return self._replace(words=self.words[e], scales=self.scales[e], zeros=zeros)

    def for_dequantize(self) -> tuple[Any, ...]:
        """The arguments of qlab::dequantize."""
        sizes = self.n, self.k, self.group, self.planes, self.layout
        return self.words, self.scales, self.zeros, *sizes

    def for_mm(self, x: Tensor, dense: Tensor | None) -> tuple[Any, ...]:
        """The arguments of qlab::int4_mm."""
        form = self.n, self.group, self.planes, self.layout
        return x, self.words, self.scales, self.zeros, dense, *form

    def for_grouped_mm(self, x: Tensor, dense: Tensor | None, ends: Tensor) -> tuple[Any, ...]:
        """The arguments of qlab::int4_grouped_mm."""
        form = self.n, self.group, self.planes, self.layout
        return x, self.words, self.scales, self.zeros, dense, ends, *form


def stacked(experts: Sequence[Packed]) -> Packed:
    """The weights [n, k] of experts as one weight [e, n, k]."""
    zeros = [packed.zeros for packed in experts if packed.zeros is not None]
    return experts[0]._replace(
        words=torch.stack([packed.words for packed in experts]),
        scales=torch.stack([packed.scales for packed in experts]),
        zeros=torch.stack(zeros) if zeros else None,
    )


def unflattened(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    n: int,
    k: int,
    group: int,
    count: int,
    layout: str,
) -> Packed:
    """The weight whose `for_dequantize` these arguments are."""
    return Packed(
        words=words,
        scales=scales,
        zeros=zeros,
        perm=None,
        n=n,
        k=k,
        group=group,
        planes=count,
        layout=layout,
    )
