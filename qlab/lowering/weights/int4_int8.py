"""Integer weights times activations rounded to int8 on a CPU: `qlab_kernels.int4_int8` as a row of
the table.

    qlab::int4_int8_mm(x, words, scales, zeros, n, group, path)            -> y [m, n]
    qlab::int4_int8_grouped_mm(x, words, scales, zeros, ends, n, ...)      -> y [s, n]: rows
        ends[e-1]:ends[e] of x by expert e
    qlab::int4_int8_forward(x, words, ...)                                 -> the first without its
        gradient
    qlab::int4_int8_pair, int4_int8_triple(x, words, ..., words, ...)      -> y [m, n] of each of
        two or three weights; x is rounded once

The compiled library registers them, so that a compiled graph calls them without Python: the
compiler pass takes those without a gradient, because the gradient of the first is Python. zeros is
empty for a symmetric weight, and `path` a number of `qlab_kernels.int4_int8.PATHS`, 0 for the best.
Products have a gradient by x, through the dequantized weight and as if x were not rounded.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlab.algebra.experts import each_expert
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int
from qlab.errors import QlabError
from qlab.lowering.weights.int4 import expert, in_order
from qlab.lowering.weights.setting import Setting

BLOCK = 32  # channels of x that share a scale; groups of W are multiples of it
# one tensor for all weights is one input of a compiled graph; wherever the first import happens, it
# has a device and can be saved for a gradient
with torch.inference_mode(False):
    NONE = torch.empty(0, dtype=torch.int8, device="cpu")


class Interleaved(NamedTuple):
    """W [n, k], or [e, n, k] of experts, 16 rows side by side.

    words, scales, zeros: as `qlab_kernels.int4_int8` orders them, with a leading axis for experts;
    zeros int8, empty for a symmetric spec. Scales have the narrowest dtype that holds them exactly.
    perm: int64 [k], the input channel of every column of codes, or None.
    n, k: output and input channels, without padding. group: channels per scale.
    dtype: of the activations. layout: the name of the order of the words.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor
    perm: Tensor | None
    n: int
    k: int
    group: int
    dtype: torch.dtype
    layout: str

    def for_mm(self, path: int = 0) -> tuple[Any, ...]:
        """The arguments of qlab::int4_int8_mm behind x."""
        return self.words, self.scales, self.zeros, self.n, self.group, path


# ---------------------------------------------------------------- the row
def meant(leaf: QTensor, setting: Setting) -> bool:
    """Whether a weight has integer codes, and its activations are to be rounded to int8 on a
    CPU."""
    is_asked = setting.activations == "int8" and setting.inputs is None
    return is_asked and setting.device.type == "cpu" and isinstance(leaf.spec, Int)


def takes(leaf: QTensor, setting: Setting) -> str | None:
    """Why the kernel cannot multiply a weight, or None. It is compiled where it was not yet."""
    from qlab_kernels.compiled import Uncompiled
    from qlab_kernels.int4_int8 import best_path

    (o, k), (rows, cols) = leaf.shape[-2:], leaf.spec.tile.sizes(leaf.shape)
    if o % rows or k % cols:
        return f"blocks of {rows}x{cols} do not divide it"
    if cols % BLOCK and cols != k:
        return f"groups of {cols} are no multiple of {BLOCK} channels"
    if leaf.outer is not None:
        return "its scales are themselves quantized"
    if leaf.zeros is not None and not _are_octets(leaf.zeros):
        return "its zero points are no integers of 8 bits"
    try:
        best_path()
    except Uncompiled as error:
        return f"it is not compiled here: {error}"
    return None


def _are_octets(zeros: Tensor) -> bool:
    wide = zeros.float()
    return bool(((wide == wide.round()) & (wide >= -128) & (wide <= 127)).all())


def pack(path: str, leaf: QTensor, setting: Setting) -> Interleaved:
    """A weight as the kernel reads it."""
    from qlab_kernels.int4_int8 import pack

    bits, k = 4 if leaf.spec.bits <= 4 else 8, leaf.shape[-1]
    is_fused = leaf.codes.ndim == 3
    leaves = [expert(leaf, e) for e in range(len(leaf.codes))] if is_fused else [leaf]
    zeros = [_beside(part, part.zeros) for part in leaves if part.zeros is not None]
    words = [pack(part.codes, bits) for part in leaves]
    scales = [_beside(part, part.scales) for part in leaves]
    cols = leaf.spec.tile.sizes(leaf.shape)[1]
    return Interleaved(
        words=torch.stack(words) if is_fused else words[0],
        scales=_narrowest(torch.stack(scales) if is_fused else scales[0]),
        zeros=torch.stack(zeros).to(torch.int8).view(*_leading(leaf), *zeros[0].shape)
        if zeros
        else NONE,
        perm=leaf.perm,
        n=leaf.shape[-2],
        k=k,
        group=-(-cols // BLOCK) * BLOCK,
        dtype=setting.dtype,
        layout=f"int{bits}-rows16",
    )


def _leading(leaf: QTensor) -> torch.Size:
    """[] of a weight, [e] of experts."""
    return leaf.codes.shape[:-2]


def _beside(leaf: QTensor, of_tiles: Tensor) -> Tensor:
    """Scales or zeros of a leaf [o, k], one for each row and group, in the kernel's order."""
    from qlab_kernels.int4_int8 import beside

    rows = leaf.spec.tile.sizes(leaf.shape)[0]
    return beside(of_tiles.float().repeat_interleave(rows, 0))


def _narrowest(scales: Tensor) -> Tensor:
    """The scales in the narrowest dtype that holds all of them exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scales.to(dtype).float(), scales):
            return scales.to(dtype)
    return scales


def mm(x_mk: Tensor, weight: Interleaved, dense: Tensor | None, bias: Tensor | None) -> Tensor:
    """y [m, n] = x @ W.T + b."""
    ops = torch.ops.qlab
    # the gradient of the first is Python, also where nobody wants one
    has_gradient = torch.is_grad_enabled() or torch.compiler.is_compiling()
    product = ops.int4_int8_mm if has_gradient else ops.int4_int8_forward
    y = product(in_order(x_mk, weight.perm), *weight.for_mm())
    return y if bias is None else y + bias


def grouped_mm(x_sk: Tensor, weight: Interleaved, dense: Tensor | None, ends: Tensor) -> Tensor:
    """y [s, n]: rows ends[e-1]:ends[e] of x @ W_e.T."""
    words, scales, zeros, *form = weight.for_mm()
    x = in_order(x_sk, weight.perm)
    return torch.ops.qlab.int4_int8_grouped_mm(x, words, scales, zeros, ends, *form)


def columns(weight: Interleaved) -> Tensor:
    """W [..., n, k] with its columns in the order of the codes."""
    words, scales, zeros, n, group, _ = weight.for_mm()
    if words.ndim == 3:
        return _dense(words, scales, zeros, n, weight.k, group, weight.dtype)
    parts = zip(words, scales, zeros if len(zeros) else [zeros] * len(words))
    return torch.stack([_dense(*part, n, weight.k, group, weight.dtype) for part in parts])


def _dense(
    words: Tensor, scales: Tensor, zeros: Tensor, n: int, k: int, group: int, dtype: torch.dtype
) -> Tensor:
    """W [n, k] = (q - z) * s, formed in fp32 and rounded once."""
    from qlab_kernels.int4_int8 import apart, unpack

    def of_channels(beside: Tensor) -> Tensor:
        return apart(beside.float(), n).repeat_interleave(group, 1)[:, :k]

    q = unpack(words, n, k).float()
    return ((q - of_channels(zeros) if len(zeros) else q) * of_channels(scales)).to(dtype)


# ---------------------------------------------------------------- operators
WEIGHTS = {"int4_int8_mm": 1, "int4_int8_forward": 1, "int4_int8_pair": 2, "int4_int8_triple": 3}


def _schema(count: int) -> str:
    """Of a product with so many weights."""
    parts = [f"Tensor words_{i}, Tensor scales_{i}, Tensor zeros_{i}" for i in range(count)]
    rows = [f"int n_{i}" for i in range(count)]
    returned = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
    return f"(Tensor x, {', '.join([*parts, *rows])}, int group, int path) -> {returned}"


def _of_library(name: str) -> Any:
    """The operator in a process that did not pack the weight: the library's takes its place."""

    def load_and_call(x: Tensor, *arguments: Any) -> Tensor:
        _load(x.device)
        return getattr(torch.ops.qlab, name)(x, *arguments)

    return load_and_call


def _fake(x: Tensor, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
    rows = [a for a in arguments[:-2] if not isinstance(a, Tensor)]
    ys = tuple(x.new_empty(x.shape[0], n) for n in rows)
    return ys if len(ys) > 1 else ys[0]


for _name, _count in WEIGHTS.items():
    torch.library.define(f"qlab::{_name}", _schema(_count))
    torch.library.impl(f"qlab::{_name}", "CompositeExplicitAutograd")(_of_library(_name))
    torch.library.register_fake(f"qlab::{_name}")(_fake)
    if _name != "int4_int8_mm":
        torch.library.impl(f"qlab::{_name}", "Autograd", torch.library.fallthrough_kernel)
torch.library.define(
    "qlab::int4_int8_grouped_mm",
    "(Tensor x, Tensor words, Tensor scales, Tensor zeros, Tensor ends, int n, int group, int path)"
    " -> Tensor",
)
torch.library.impl("qlab::int4_int8_grouped_mm", "CompositeExplicitAutograd")(
    _of_library("int4_int8_grouped_mm")
)


def _load(device: torch.device) -> None:
    from qlab_kernels.compiled import Uncompiled
    from qlab_kernels.int4_int8 import best_path

    if device.type != "cpu":
        raise QlabError(f"weights lowered with activations='int8' for a CPU got x on {device}")
    try:
        best_path()
    except Uncompiled as error:
        raise QlabError(
            f"a model lowered with activations='int8' cannot run here: {error}; lower it without"
        ) from error


@torch.library.register_fake("qlab::int4_int8_grouped_mm")
def _(x, words, scales, zeros, ends, n, group, path):
    return x.new_empty(x.shape[0], n)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, *tensors, n, group, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.form = n, x.shape[1], group, x.dtype


def _gradients(ctx: Any, g_mn: Tensor) -> tuple[Tensor | None, ...]:
    return g_mn @ _dense(*ctx.saved_tensors, *ctx.form), *[None] * 6


def _grouped_gradients(ctx: Any, g_sn: Tensor) -> tuple[Tensor | None, ...]:
    words, scales, zeros, ends = ctx.saved_tensors

    def product(e: int, g_mn: Tensor) -> Tensor:
        return g_mn @ _dense(words[e], scales[e], zeros[e] if len(zeros) else zeros, *ctx.form)

    return each_expert(g_sn, ends, product), *[None] * 7


torch.library.register_autograd("qlab::int4_int8_mm", _gradients, setup_context=_save)
torch.library.register_autograd(
    "qlab::int4_int8_grouped_mm", _grouped_gradients, setup_context=_save
)
