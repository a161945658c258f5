"""4- and 8-bit floats beside 16-bit activations on a GPU: dequantized in the registers of the
product, without a dense copy (`qlab_kernels.float_mm`).

    W_nk = f_n s_(n, group of k) q_nk        nvfp4, mxfp4, mxfp8, fp8 in blocks, groups and rows

Activations that a directory rounds are rounded in front of the product, as everywhere; capabilities
that multiply such numbers with each other (10.0) sum the same numbers, in 16 bits. On a CPU, where
the table has other rows, the operators compute the same in plain torch.

    qlab::floats_mm(x, words, scales, factors, n, group, layout)                  -> y [m, n]
    qlab::floats_grouped_mm(x, words, scales, factors, ends, n, group, layout)    -> y [s, n]
    qlab::floats_back(g, words, scales, factors, ends, k, group, layout)          -> by x [s, k]
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlab.algebra.experts import each_expert
from qlab.algebra.qtensor import QTensor, by_rows
from qlab.algebra.spec import Float
from qlab.errors import QlabError
from qlab.lowering.weights.cpu import dense_product
from qlab.lowering.weights.int4 import in_order
from qlab.lowering.weights.setting import Setting, refuse_another_dtype

Part = Tensor | None
ON_CPU = "mma2"  # the order of codes where no kernel reads them


class Fused(NamedTuple):
    """W [n, k], or [e, n, k] for e experts, as qlab_kernels.float_layout packs it.

    words: uint8 [..., n / 64, k / 64, 512 bits]. scales: those of groups, or None. factors: fp32 of
    rows. perm int64 [k], the input channel of every column of codes, or None. n, k: without
    padding. group: codes per scale, 0 for rows. dtype: of activations.
    """

    words: Tensor
    scales: Part
    factors: Tensor
    perm: Part
    n: int
    k: int
    group: int
    dtype: torch.dtype
    layout: str


def meant(leaf: QTensor, setting: Setting) -> bool:
    """Whether a weight has floats and is held for a GPU."""
    return isinstance(leaf.spec, Float) and setting.device.type == "cuda"


def takes(leaf: QTensor, setting: Setting) -> str | None:
    """Why the weight is dequantized for every call, or None."""
    from qlab_kernels.capability import KernelError
    from qlab_kernels.families.floats import refusal
    from qlab_kernels.float_layout import DROP, FINE, padded_columns, refusal_of_scales

    if leaf.spec.bits not in DROP:
        return f"no kernel multiplies floats of {leaf.spec.bits} bits; those of 4 and 8 have one"
    dtype = str(setting.dtype).removeprefix("torch.")
    group = _group(leaf)
    try:
        reason = refusal(torch.cuda.get_device_capability(setting.device), dtype)
        padded_columns(leaf.shape[-1], group)
    except KernelError as error:
        return str(error)
    if reason is None and group in FINE:
        return refusal_of_scales(by_rows(leaf).scales)
    return reason


def _group(leaf: QTensor) -> int:
    """Columns under one scale, 0 for whole rows."""
    cols, k = leaf.spec.tile.sizes(leaf.shape)[1], leaf.shape[-1]
    return 0 if cols >= k else cols


def pack(path: str, leaf: QTensor, setting: Setting) -> Fused:
    """The codes in the order of the device's kernels. Refuses scales of groups of 16 and 32 that
    their bytes do not hold, and a device without kernels."""
    from qlab_kernels import float_layout
    from qlab_kernels.capability import KernelError

    device, k = setting.device, leaf.shape[-1]
    scales = by_rows(leaf).scales.float().to(device)
    factors = torch.ones(leaf.shape[:-1], dtype=torch.float32, device=device)
    if leaf.outer is not None:
        factors = factors / leaf.outer.float().to(device)
    try:
        packed = float_layout.pack(
            leaf.codes.to(device),
            scales,
            factors,
            _group(leaf) or k,
            leaf.spec.bits,
            _order(device),
        )
    except KernelError as error:
        raise QlabError(f"{path}: {error}") from error
    return Fused(
        words=packed.words,
        scales=packed.scales,
        factors=packed.factors,
        perm=None if leaf.perm is None else leaf.perm.to(device),
        n=packed.n,
        k=packed.k,
        group=packed.group,
        dtype=setting.dtype,
        layout=packed.layout,
    )


def _order(device: torch.device) -> str:
    """The name of the order in which the device's kernels read codes."""
    from qlab_kernels.capability import target

    if device.type == "cpu":
        return ON_CPU
    return target(torch.cuda.get_device_capability(device)).layout


def columns(weight: Fused) -> Tensor:
    """W [..., n, k] with its columns in the order of the codes."""
    words, scales, factors, _, n, k, group, dtype, layout = weight
    return _dense(_packed(words, scales, factors, n, k, group, layout), dtype)


def mm(x_mk: Tensor, weight: Fused, dense: Part, bias: Part) -> Tensor:
    """y [m, n] = x @ W.T + b."""
    refuse_another_dtype(x_mk, weight.dtype)
    words, scales, factors, perm, n, _, group, _, layout = weight
    y = floats_mm(in_order(x_mk, perm), words, scales, factors, n, group, layout)
    return y if bias is None else y + bias


def grouped_mm(x_sk: Tensor, weight: Fused, dense: Part, ends: Tensor) -> Tensor:
    """y [s, n]: rows ends[e-1]:ends[e] of x @ W_e.T."""
    refuse_another_dtype(x_sk, weight.dtype)
    words, scales, factors, perm, n, _, group, _, layout = weight
    x_sk = in_order(x_sk, perm)
    return floats_grouped_mm(x_sk, words, scales, factors, ends, n, group, layout)


def _packed(
    words: Tensor, scales: Part, factors: Tensor, n: int, k: int, group: int, layout: str
) -> Any:
    """The weight as qlab_kernels takes it."""
    from qlab_kernels.float_layout import PackedFloats

    bits = words.shape[-1] // 512
    return PackedFloats(words, scales, factors, n, k, bits, group, layout)


def _dense(packed: Any, dtype: torch.dtype) -> Tensor:
    """W [..., n, k], rounded once."""
    from qlab_kernels.reference_float_mm import dequantize

    return dequantize(packed, dtype)


def _problem(op: str, x: Tensor, packed: Any, experts: int) -> Any:
    """The product's key in the config cache."""
    from qlab_kernels import Problem

    return Problem(
        op=f"float{packed.bits}_{op}",
        cc=torch.cuda.get_device_capability(x.device),
        device=torch.cuda.get_device_name(x.device),
        dtype=str(x.dtype).removeprefix("torch."),
        group=packed.group or packed.k,
        zeros=False,
        n=packed.n,
        k=packed.k,
        m=len(x),
        experts=experts,
    )


def launched_mm(x_mk: Tensor, packed: Any) -> Tensor:
    """y [m, n] by a kernel, in the configuration of the cache. No synchronization."""
    from qlab_kernels import cache
    from qlab_kernels.float_mm import float_mm

    if not len(x_mk):
        return x_mk.new_empty(0, packed.n)
    return float_mm(x_mk, packed, cache.lookup(_problem("mm", x_mk, packed, 1)).config)


def launched_grouped_mm(x_sk: Tensor, packed: Any, ends: Tensor) -> Tensor:
    """y [s, n] by one grouped kernel, which reads `ends` on the device."""
    from qlab_kernels import cache
    from qlab_kernels.float_mm import float_grouped_mm

    problem = _problem("grouped_mm", x_sk, packed, len(packed.words))
    return float_grouped_mm(x_sk, packed, ends.to(torch.int32), cache.lookup(problem).config)


# ---------------------------------------------------------------- operators
@torch.library.custom_op("qlab::floats_mm", mutates_args=())
def floats_mm(
    x: Tensor, words: Tensor, scales: Part, factors: Tensor, n: int, group: int, layout: str
) -> Tensor:
    """y [m, n] in x's dtype."""
    packed = _packed(words, scales, factors, n, x.shape[1], group, layout)
    if x.device.type == "cpu":
        return dense_product(x, _dense(packed, x.dtype))
    return launched_mm(x, packed)


@floats_mm.register_fake
def _(x, words, scales, factors, n, group, layout):
    return x.new_empty(x.shape[0], n)


@torch.library.custom_op("qlab::floats_grouped_mm", mutates_args=())
def floats_grouped_mm(
    x: Tensor,
    words: Tensor,
    scales: Part,
    factors: Tensor,
    ends: Tensor,
    n: int,
    group: int,
    layout: str,
) -> Tensor:
    """y [s, n] in x's dtype, each row by its own expert's weight; words, scales and factors have a
    leading axis of experts."""
    packed = _packed(words, scales, factors, n, x.shape[1], group, layout)
    if x.device.type != "cpu":
        return launched_grouped_mm(x, packed, ends)
    W = _dense(packed, x.dtype)
    return each_expert(x, ends, lambda e, x_mk: dense_product(x_mk, W[e]))


@floats_grouped_mm.register_fake
def _(x, words, scales, factors, ends, n, group, layout):
    return x.new_empty(x.shape[0], n)


# cudagraph_unsafe: the host waits for `ends`
@torch.library.custom_op("qlab::floats_back", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def floats_back(
    g: Tensor,
    words: Tensor,
    scales: Part,
    factors: Tensor,
    ends: Part,
    k: int,
    group: int,
    layout: str,
) -> Tensor:
    """The gradient by x [s, k], from the gradient g [s, n] by the result. One expert that has rows
    is dense at a time.

    ends: those of experts, or None of one weight."""
    lone, n = ends is None, g.shape[1]
    ends = torch.tensor([len(g)], dtype=torch.int64) if ends is None else ends

    def by_x(e: int, g_mn: Tensor) -> Tensor:
        if not len(g_mn):
            return g_mn.new_empty(0, k)
        q, s, f = words, scales, factors
        if not lone:
            q, s, f = words[e], None if scales is None else scales[e], factors[e]
        return dense_product(g_mn, _dense(_packed(q, s, f, n, k, group, layout), g_mn.dtype).mT)

    return each_expert(g, ends, by_x)


@floats_back.register_fake
def _(g, words, scales, factors, ends, k, group, layout):
    return g.new_empty(g.shape[0], k)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, words, scales, factors, *ends, _, group, layout = inputs
    ctx.save_for_backward(words, scales, factors, ends[0] if ends else None)
    ctx.form = x.shape[1], group, layout


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return floats_back(g, *ctx.saved_tensors, *ctx.form), *[None] * 6


def _grouped_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return floats_back(g, *ctx.saved_tensors, *ctx.form), *[None] * 7


floats_mm.register_autograd(_gradients, setup_context=_save)
floats_grouped_mm.register_autograd(_grouped_gradients, setup_context=_save)
