"""Weights of 5 to 8 bits as bytes on a CPU, one scale for each row, beside bfloat16 activations.

    y = x @ W.T with W = (q - z) * s:   y_mn = s_n (sum_k x_mk q_nk - z_n sum_k x_mk)

`aten._weight_int8pack_mm(x, q, s)` computes the first sum for few tokens: it reads a byte for each
weight once, where two planes of 4 bits are read as two weights. For many tokens q is cast to
bfloat16, which holds every code, and multiplied densely; the scale follows.

    qlab::int8_mm(x, words, scales, zeros, dense)                  -> y [m, n]
    qlab::int8_grouped_mm(x, words, scales, zeros, dense, ends)    -> y [s, n]: rows
                                                                   ends[e-1]:ends[e] of x @ W_e.T
    qlab::int8_grouped_back(g, words, scales, zeros, ends)         -> its gradient by x [s, k]
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlab.algebra.experts import each_expert
from qlab.algebra.products import product_dtype
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int
from qlab.lowering.weights.cpu import dense_product
from qlab.lowering.weights.int4 import in_order, refuse_lost
from qlab.lowering.weights.setting import Setting, refuse_another_dtype

aten = torch.ops.aten
# Tokens up to which aten's int8 kernel is faster: on an AVX-512 processor it takes 0.4 of the time
# of a dense product at 1 token, and as long as a cast and a dense product at 16.
INT8_TOKENS = 8


class Bytes(NamedTuple):
    """W [n, k], or [e, n, k] for e experts: words int8 [..., n, k]; scales [..., n] in the dtype of
    the activations, which aten's kernel wants; zeros fp32 [..., n] or None; perm int64 [k], the
    input channel of every column of codes, or None."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    layout: str


def is_byte(leaf: QTensor) -> bool:
    """Whether the codes of a weight are integers for which 4 bits are too few."""
    return isinstance(leaf.spec, Int) and leaf.spec.bits > 4


def has_whole_rows(leaf: QTensor) -> bool:
    """Whether no row of a weight has more than one scale."""
    return leaf.spec.tile.sizes(leaf.shape)[1] == leaf.shape[-1]


def meant(leaf: QTensor, setting: Setting) -> bool:
    """Whether the codes are integers of 5 to 8 bits with one scale in a row, held for a CPU. Those
    with several are planes of 4 bits (`int4`)."""
    return is_byte(leaf) and has_whole_rows(leaf) and setting.device.type == "cpu"


def takes(leaf: QTensor, setting: Setting) -> str | None:
    """Why two planes of 4 bits are multiplied instead, or None."""
    if setting.dtype != torch.bfloat16:
        return f"no int8 kernel on a CPU takes {setting.dtype} activations; use torch.bfloat16"
    return None


def per_row_of(leaf: QTensor, part: Tensor) -> Tensor:
    """Scales or zeros of whole rows [..., a, 1] as one for each row [..., n]."""
    rows = leaf.spec.tile.sizes(leaf.shape)[0]
    return part[..., 0].repeat_interleave(rows, -1)[..., : leaf.shape[-2]]


def pack(path: str, leaf: QTensor, setting: Setting) -> Bytes:
    """The codes as they are. Refuses scales that the dtype does not hold."""
    refuse_lost(path, [leaf.scales], setting.dtype)

    zeros = None if leaf.zeros is None else per_row_of(leaf, leaf.zeros).float()
    return Bytes(
        words=leaf.codes.to(setting.device).contiguous(),
        scales=per_row_of(leaf, leaf.scales).to(setting.device, setting.dtype),
        zeros=None if zeros is None else zeros.to(setting.device),
        perm=None if leaf.perm is None else leaf.perm.to(setting.device),
        layout="int8-rows",
    )


def columns(weight: Bytes) -> Tensor:
    """W [..., n, k] with its columns in the order of the codes."""
    return dense_rows(weight.words, weight.scales, weight.zeros)


def dense_rows(words: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """(q - z) * s [..., n, k] in the scales' dtype."""
    q = words.to(scales.dtype)
    if zeros is not None:
        q.sub_(zeros[..., None])
    return q.mul_(scales[..., None])


def keeps_copy(device: torch.device, experts: bool) -> bool:
    """Whether a dense copy of the weight would ever be multiplied: for many tokens."""
    return True


def mm(x_mk: Tensor, weight: Bytes, dense: Tensor | None, bias: Tensor | None) -> Tensor:
    """y [m, n] = x @ W.T + b."""
    y = int8_mm(in_order(x_mk, weight.perm), weight.words, weight.scales, weight.zeros, dense)
    return y if bias is None else y + bias


def grouped_mm(x_sk: Tensor, weight: Bytes, dense: Tensor | None, ends: Tensor) -> Tensor:
    """y [s, n]: rows ends[e-1]:ends[e] of x @ W_e.T."""
    x_sk = in_order(x_sk, weight.perm)
    return int8_grouped_mm(x_sk, weight.words, weight.scales, weight.zeros, dense, ends)


# ---------------------------------------------------------------- operators
@torch.library.custom_op("qlab::int8_mm", mutates_args=())
def int8_mm(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, dense: Tensor | None
) -> Tensor:
    """y [m, n] in x's dtype. dense: a copy of W that many tokens are multiplied with, or None."""
    refuse_another_dtype(x, scales.dtype)
    m = len(x)
    if m == 0:
        return x.new_empty(0, len(words))
    if m > INT8_TOKENS and dense is not None:
        return dense_product(x, dense)
    if m <= INT8_TOKENS:
        y = aten._weight_int8pack_mm(x.contiguous(), words, scales)
    else:
        wide = product_dtype(x)
        y = ((x.to(wide) @ words.to(wide).mT) * scales).to(x.dtype)
    if zeros is None:
        return y
    sums = x.sum(1, keepdim=True, dtype=torch.float32)
    return (y - sums * (zeros * scales)).to(x.dtype)


@int8_mm.register_fake
def _(x, words, scales, zeros, dense):
    refuse_another_dtype(x, scales.dtype)
    return x.new_empty(x.shape[0], words.shape[0])


# cudagraph_unsafe: the host waits for `ends`
@torch.library.custom_op(
    "qlab::int8_grouped_mm", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def int8_grouped_mm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    dense: Tensor | None,
    ends: Tensor,
) -> Tensor:
    """y [s, n] in x's dtype, each row by its own expert's weight; words, scales, zeros and dense
    have a leading axis of experts."""
    refuse_another_dtype(x, scales.dtype)

    def product(e: int, x_mk: Tensor) -> Tensor:
        z, copy = (None if part is None else part[e] for part in (zeros, dense))
        return int8_mm(x_mk, words[e], scales[e], z, copy)

    return each_expert(x, ends, product)


@int8_grouped_mm.register_fake
def _(x, words, scales, zeros, dense, ends):
    refuse_another_dtype(x, scales.dtype)
    return x.new_empty(x.shape[0], words.shape[1])


@torch.library.custom_op(
    "qlab::int8_grouped_back", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def int8_grouped_back(
    g: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, ends: Tensor
) -> Tensor:
    """The gradient by x [s, k] of int8_grouped_mm, from the gradient g [s, n] by its result. One
    expert that has rows is dense at a time."""

    def product(e: int, g_mn: Tensor) -> Tensor:
        if not len(g_mn):
            return g_mn.new_empty(0, words.shape[-1])
        z = None if zeros is None else zeros[e]
        return dense_product(g_mn, dense_rows(words[e], scales[e], z).mT)

    return each_expert(g, ends, product)


@int8_grouped_back.register_fake
def _(g, words, scales, zeros, ends):
    return g.new_empty(g.shape[0], words.shape[2])


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, words, scales, zeros, _, *ends = inputs
    ctx.save_for_backward(words, scales, zeros, *ends)


def _gradients(ctx: Any, g_mn: Tensor) -> tuple[Tensor | None, ...]:
    return dense_product(g_mn, dense_rows(*ctx.saved_tensors).mT), *[None] * 4


def _grouped_gradients(ctx: Any, g_sn: Tensor) -> tuple[Tensor | None, ...]:
    return int8_grouped_back(g_sn, *ctx.saved_tensors), *[None] * 5


int8_mm.register_autograd(_gradients, setup_context=_save)
int8_grouped_mm.register_autograd(_grouped_gradients, setup_context=_save)
