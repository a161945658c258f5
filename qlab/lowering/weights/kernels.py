"""The ways to hold and multiply a quantized weight, as a table: the first kernel that takes a
weight holds it.

A new storage is a module with the functions of a row, and its row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.qtensor import QTensor
from qlab.lowering.weights import codes, int4
from qlab.lowering.weights.codes import Coded
from qlab.lowering.weights.packed import Packed


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """One way to hold a quantized weight, [n, k] or [e, n, k] of experts, and to multiply with it.

    name: identifies the row in copies and pickles of a module.
    weight: the class of the value that holds a weight: its tensors first, named in `tensors`, then
    what else an operator needs.
    takes: leaf -> why the kernel cannot hold it, or None.
    pack: (path, leaf, dtype of the activations, device) -> the value.
    mm: (x [m, k], value, dense copy or None, bias or None) -> y [m, n].
    grouped_mm: (x [s, k], value, dense copy or None, ends [e]) -> y [s, n].
    columns: value -> the dense copy of W that products take.
    dequantized: value -> W.
    keeps_copy: (device, whether it is of experts) -> whether products ever take a dense copy.
    slowness: (the specs of all weights that it holds, dtype, device) -> what keeps them from being
    fast, for a warning, or None.
    """

    name: str
    weight: Callable[..., Any]
    tensors: tuple[str, ...]
    takes: Callable[[QTensor], str | None]
    pack: Callable[[str, QTensor, torch.dtype, torch.device], Any]
    mm: Callable[[Tensor, Any, Tensor | None, Tensor | None], Tensor]
    grouped_mm: Callable[[Tensor, Any, Tensor | None, Tensor], Tensor]
    columns: Callable[[Any], Tensor]
    dequantized: Callable[[Any], Tensor]
    keeps_copy: Callable[[torch.device, bool], bool]
    slowness: Callable[[Sequence[str], torch.dtype, torch.device], str | None]

    def __reduce__(self) -> tuple[Any, ...]:
        """A row is one object in a process, also after a copy or a pickle of a module."""
        return kernel_named, (self.name,)


INT4 = Kernel(
    name="int4",
    weight=Packed,
    tensors=("words", "scales", "zeros", "perm"),
    takes=int4.takes,
    pack=int4.pack,
    mm=int4.mm,
    grouped_mm=int4.grouped_mm,
    columns=int4.columns,
    dequantized=int4.dequantized,
    keeps_copy=int4.keeps_copy,
    slowness=int4.slowness,
)
CODES = Kernel(
    name="codes",
    weight=Coded,
    tensors=("words", "scales", "zeros", "outer", "perm"),
    takes=codes.takes,
    pack=codes.pack,
    mm=codes.mm,
    grouped_mm=codes.grouped_mm,
    columns=codes.dequantized,
    dequantized=codes.dequantized,
    keeps_copy=codes.keeps_copy,
    slowness=codes.slowness,
)
KERNELS = (INT4, CODES)


def kernel_for(leaf: QTensor) -> Kernel:
    """The first kernel that takes a weight."""
    return next(kernel for kernel in KERNELS if kernel.takes(leaf) is None)


def kernel_named(name: str) -> Kernel:
    """The row of a name."""
    return next(kernel for kernel in KERNELS if kernel.name == name)
