"""The ways to hold and multiply a quantized weight, as a table: the first kernel that takes a
weight holds it, and the reasons of those before it that were meant for it are kept.

A new kernel is a module with the functions of a row, and its row. Faster rows come first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlab.algebra.qtensor import QTensor
from qlab.lowering.weights import (
    codes,
    fp8,
    fp8_fp8,
    fused_floats,
    int4,
    int4_a8,
    int4_fp8,
    int4_int8,
    int4_int8_cuda,
    int8,
    int8_int8,
    sparse24,
)
from qlab.lowering.weights.codes import Coded
from qlab.lowering.weights.fp8 import Bytes8
from qlab.lowering.weights.fp8_fp8 import Floats
from qlab.lowering.weights.fused_floats import Fused
from qlab.lowering.weights.int4_a8 import Nibbles
from qlab.lowering.weights.int4_int8 import Interleaved
from qlab.lowering.weights.int8 import Bytes
from qlab.lowering.weights.int8_int8 import Integers
from qlab.lowering.weights.packed import Packed
from qlab.lowering.weights.setting import Setting
from qlab.lowering.weights.sparse24 import Sparse


def never_copied(device: torch.device, experts: bool) -> bool:
    """Products never take a dense copy."""
    return False


def never_slow(specs: Sequence[str], dtype: torch.dtype, device: torch.device) -> None:
    """Nothing keeps the weights from being fast."""


def of_channels(columns: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """value -> W [..., n, k], of a function that gives its columns in the order of the codes."""

    def dequantized(value: Any) -> Tensor:
        W = columns(value)
        return W if value.perm is None else W[..., value.perm.argsort()]

    return dequantized


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """One way to hold a quantized weight, [n, k] or [e, n, k] of experts, and to multiply with it.

    name: identifies the row in copies and pickles of a module.
    multiplies: what it multiplies with what, in words for tables.
    weight: the class of the value that holds a weight: its tensors first, named in `tensors`, then
    what else an operator needs, and last but for that its `layout`, the name of the order of words.
    meant: (leaf, setting) -> whether the row is for such numbers and such inputs, so that its
    reason is worth knowing where it does not take the weight.
    takes: (leaf, setting) -> why the kernel cannot multiply it there, or None. Asked only of what
    is meant. What stands before a semicolon is the short form.
    pack: (path, leaf, setting) -> the value.
    mm: (x [m, k], value, dense copy or None, bias or None) -> y [m, n].
    grouped_mm: (x [s, k], value, dense copy or None, ends [e]) -> y [s, n].
    columns: value -> the dense copy of W that products take.
    dequantized: value -> W.
    keeps_copy: (device, whether it is of experts) -> whether products ever take a dense copy.
    slowness: (the specs of all weights that it holds, dtype, device) -> what keeps them from being
    fast, for a warning, or None.
    rounds: whether products take x as it comes and round it themselves, as `setting.inputs` or
    `setting.activations` says. What that needs is part of the value. Other rows get x rounded.
    """

    name: str
    multiplies: str
    weight: Callable[..., Any]
    tensors: tuple[str, ...]
    meant: Callable[[QTensor, Setting], bool]
    takes: Callable[[QTensor, Setting], str | None]
    pack: Callable[[str, QTensor, Setting], Any]
    mm: Callable[[Tensor, Any, Tensor | None, Tensor | None], Tensor]
    grouped_mm: Callable[[Tensor, Any, Tensor | None, Tensor], Tensor]
    columns: Callable[[Any], Tensor]
    dequantized: Callable[[Any], Tensor]
    keeps_copy: Callable[[torch.device, bool], bool] = never_copied
    slowness: Callable[[Sequence[str], torch.dtype, torch.device], str | None] = never_slow
    rounds: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A row is one object in a process, also after a copy or a pickle of a module."""
        return kernel_named, (self.name,)


INT4_INT8 = Kernel(
    name="int4_int8",
    multiplies="integers of 4 or 8 bits x activations rounded to int8, on a CPU",
    weight=Interleaved,
    tensors=("words", "scales", "zeros", "perm"),
    meant=int4_int8.meant,
    takes=int4_int8.takes,
    pack=int4_int8.pack,
    mm=int4_int8.mm,
    grouped_mm=int4_int8.grouped_mm,
    columns=int4_int8.columns,
    dequantized=of_channels(int4_int8.columns),
    rounds=True,
)
INT4_INT8_CUDA = Kernel(
    name="int4_int8_cuda",
    multiplies="integers of up to 4 bits, as int8 x activations rounded to integers, on a GPU",
    weight=Nibbles,
    tensors=("words", "scales", "zeros", "perm", "in_scales"),
    meant=int4_int8_cuda.meant,
    takes=int4_int8_cuda.takes,
    pack=int4_int8_cuda.pack,
    mm=int4_a8.mm,
    grouped_mm=int4_a8.grouped_mm,
    columns=int4_a8.columns,
    dequantized=of_channels(int4_a8.columns),
    rounds=True,
)
INT4_FP8 = Kernel(
    name="int4_fp8",
    multiplies="integers of up to 4 bits, as 8-bit floats x activations rounded to 8-bit floats",
    weight=Nibbles,
    tensors=("words", "scales", "zeros", "perm", "in_scales"),
    meant=int4_fp8.meant,
    takes=int4_fp8.takes,
    pack=int4_fp8.pack,
    mm=int4_a8.mm,
    grouped_mm=int4_a8.grouped_mm,
    columns=int4_a8.columns,
    dequantized=of_channels(int4_a8.columns),
    rounds=True,
)
FP8_FP8 = Kernel(
    name="fp8_fp8",
    multiplies="8-bit floats x activations rounded to 8-bit floats",
    weight=Floats,
    tensors=("words", "scales", "in_scales"),
    meant=fp8_fp8.meant,
    takes=fp8_fp8.takes,
    pack=fp8_fp8.pack,
    mm=fp8_fp8.mm,
    grouped_mm=fp8_fp8.grouped_mm,
    columns=fp8_fp8.dequantized,
    dequantized=fp8_fp8.dequantized,
    rounds=True,
)
SPARSE24 = Kernel(
    name="sparse24",
    multiplies="integers of 8 bits without their zeros x activations rounded to integers",
    weight=Sparse,
    tensors=("words", "scales", "sums", "perm", "in_scales", "in_zeros"),
    meant=sparse24.meant,
    takes=sparse24.takes,
    pack=sparse24.pack,
    mm=sparse24.mm,
    grouped_mm=sparse24.grouped_mm,
    columns=sparse24.columns,
    dequantized=of_channels(sparse24.columns),
    rounds=True,
)
INT8_INT8 = Kernel(
    name="int8_int8",
    multiplies="integers of 8 bits x activations rounded to integers",
    weight=Integers,
    tensors=("words", "scales", "zeros", "sums", "perm", "in_scales", "in_zeros"),
    meant=int8_int8.meant,
    takes=int8_int8.takes,
    pack=int8_int8.pack,
    mm=int8_int8.mm,
    grouped_mm=int8_int8.grouped_mm,
    columns=int8_int8.columns,
    dequantized=of_channels(int8_int8.columns),
    rounds=True,
)
INT8 = Kernel(
    name="int8",
    multiplies="integers as bytes x bfloat16 activations",
    weight=Bytes,
    tensors=("words", "scales", "zeros", "perm"),
    meant=int8.meant,
    takes=int8.takes,
    pack=int8.pack,
    mm=int8.mm,
    grouped_mm=int8.grouped_mm,
    columns=int8.columns,
    dequantized=of_channels(int8.columns),
    keeps_copy=int8.keeps_copy,
)
INT4 = Kernel(
    name="int4",
    multiplies="integers as planes of 4 bits x activations",
    weight=Packed,
    tensors=("words", "scales", "zeros", "perm"),
    meant=int4.meant,
    takes=int4.takes,
    pack=int4.pack,
    mm=int4.mm,
    grouped_mm=int4.grouped_mm,
    columns=int4.columns,
    dequantized=of_channels(int4.columns),
    keeps_copy=int4.keeps_copy,
    slowness=int4.slowness,
)
FP8 = Kernel(
    name="fp8",
    multiplies="8-bit floats, cast for every call x bfloat16 activations",
    weight=Bytes8,
    tensors=("words", "scales", "perm"),
    meant=fp8.meant,
    takes=fp8.takes,
    pack=fp8.pack,
    mm=fp8.mm,
    grouped_mm=fp8.grouped_mm,
    columns=fp8.columns,
    dequantized=of_channels(fp8.columns),
    keeps_copy=fp8.keeps_copy,
    slowness=fp8.slowness,
)
FUSED_FLOATS = Kernel(
    name="fused_floats",
    multiplies="4- and 8-bit floats, dequantized in the product x 16-bit activations, on a GPU",
    weight=Fused,
    tensors=("words", "scales", "factors", "perm"),
    meant=fused_floats.meant,
    takes=fused_floats.takes,
    pack=fused_floats.pack,
    mm=fused_floats.mm,
    grouped_mm=fused_floats.grouped_mm,
    columns=fused_floats.columns,
    dequantized=of_channels(fused_floats.columns),
)
CODES = Kernel(
    name="codes",
    multiplies="codes dequantized for every call x activations",
    weight=Coded,
    tensors=("words", "scales", "zeros", "outer", "perm"),
    meant=codes.meant,
    takes=codes.takes,
    pack=codes.pack,
    mm=codes.mm,
    grouped_mm=codes.grouped_mm,
    columns=codes.dequantized,
    dequantized=codes.dequantized,
    keeps_copy=codes.keeps_copy,
    slowness=codes.slowness,
)
KERNELS = (
    INT4_INT8,
    INT4_INT8_CUDA,
    INT4_FP8,
    SPARSE24,
    INT8_INT8,
    FP8_FP8,
    INT8,
    INT4,
    FP8,
    FUSED_FLOATS,
    CODES,
)


class Passed(NamedTuple):
    """A row that was meant for a weight and does not take it."""

    row: str
    reason: str

    @property
    def short(self) -> str:
        """The reason in brief."""
        return f"not {self.row}: {self.reason.partition(';')[0]}"


class Choice(NamedTuple):
    """The row that multiplies a weight, and those that were passed over."""

    kernel: Kernel
    passed: tuple[Passed, ...]


def choose(leaf: QTensor, setting: Setting) -> Choice:
    """The first kernel that takes a weight."""
    passed: list[Passed] = []
    for kernel in KERNELS[:-1]:
        if not kernel.meant(leaf, setting):
            continue
        reason = kernel.takes(leaf, setting)
        if reason is None:
            return Choice(kernel, tuple(passed))
        passed.append(Passed(kernel.name, reason))
    return Choice(KERNELS[-1], tuple(passed))


def kernel_named(name: str) -> Kernel:
    """The row of a name."""
    return next(kernel for kernel in KERNELS if kernel.name == name)
