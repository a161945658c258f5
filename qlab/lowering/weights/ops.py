"""The operators of packed weights: qlab::dequantize, int4_mm and int4_grouped_mm, for a CPU and for
CUDA. Those of all other weights are in `codes.py`, and that of rounded inputs in `inputs.py`.

    qlab::dequantize(words, scales, zeros, n, k, group, count, layout)        -> W [n, k] = (q - z)
        * s
    qlab::int4_mm(x, words, scales, zeros, dense, n, group, count, layout)    -> y [m, n] = x @ W.T
    qlab::int4_grouped_mm(x, words, scales, zeros, dense, ends, n, ...)       -> y [m, n]: rows
        ends[e-1]:ends[e] of x @ W_e.T
    qlab::int4_grouped_back(g, words, scales, zeros, dense, ends, k, ...)     -> its gradient by x
        [m, k]: rows of g @ W_e

The arguments are the fields of a `Packed`, which its methods `for_...` give in this order. x [m, k]
is in the scales' dtype, any m. dense: a copy of W, or None. Products have a gradient by x, through
the dequantized weight; codes and scales have none.
All of them are opaque to torch.compile; `rewrite` turns the first and a matmul into the second.
"""

from typing import Any

import torch
from torch import Tensor

from qlab.algebra.experts import each_expert
from qlab.lowering.weights import cpu, cuda
from qlab.lowering.weights.packed import unflattened
from qlab.lowering.weights.setting import refuse_another_dtype


@torch.library.custom_op("qlab::dequantize", mutates_args=(), device_types="cpu")
def dequantize(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    n: int,
    k: int,
    group: int,
    count: int,
    layout: str,
) -> Tensor:
    """W [n, k] in the scales' dtype."""
    return cpu.dequantize(unflattened(words, scales, zeros, n, k, group, count, layout))


@dequantize.register_kernel("cuda")
def _dequantize_cuda(words, scales, zeros, n, k, group, count, layout):
    return cuda.dequantize(unflattened(words, scales, zeros, n, k, group, count, layout))


@dequantize.register_fake
def _dequantize_fake(words, scales, zeros, n, k, group, count, layout):
    if not layout.startswith(cpu.PREFIX):
        return scales.new_empty(n, k)
    return scales.new_empty(2 * words.shape[1] // count, words.shape[0])[:k, :n].mT


@torch.library.custom_op("qlab::int4_mm", mutates_args=(), device_types="cpu")
def int4_mm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    dense: Tensor | None,
    n: int,
    group: int,
    count: int,
    layout: str,
) -> Tensor:
    """y [m, n] = x @ W.T in x's dtype."""
    refuse_another_dtype(x, scales.dtype)
    packed = unflattened(words, scales, zeros, n, x.shape[1], group, count, layout)
    return cpu.int4_mm(x, packed, dense)


@int4_mm.register_kernel("cuda")
def _int4_mm_cuda(x, words, scales, zeros, dense, n, group, count, layout):
    refuse_another_dtype(x, scales.dtype)
    packed = unflattened(words, scales, zeros, n, x.shape[1], group, count, layout)
    return cuda.int4_mm(x, packed, dense)


@int4_mm.register_fake
def _int4_mm_fake(x, words, scales, zeros, dense, n, group, count, layout):
    refuse_another_dtype(x, scales.dtype)
    return x.new_empty(x.shape[0], n)


@torch.library.custom_op("qlab::int4_grouped_mm", mutates_args=(), device_types="cpu")
def int4_grouped_mm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    dense: Tensor | None,
    ends: Tensor,
    n: int,
    group: int,
    count: int,
    layout: str,
) -> Tensor:
    """y [m, n] in x's dtype, each row by its own expert's weight; all but x and n have a leading
    axis of experts."""
    refuse_another_dtype(x, scales.dtype)
    packed = unflattened(words, scales, zeros, n, x.shape[1], group, count, layout)
    return cpu.int4_grouped_mm(x, packed, dense, ends)


@int4_grouped_mm.register_kernel("cuda")
def _int4_grouped_mm_cuda(x, words, scales, zeros, dense, ends, n, group, count, layout):
    refuse_another_dtype(x, scales.dtype)
    packed = unflattened(words, scales, zeros, n, x.shape[1], group, count, layout)
    return cuda.int4_grouped_mm(x, packed, dense, ends)


@int4_grouped_mm.register_fake
def _int4_grouped_mm_fake(x, words, scales, zeros, dense, ends, n, group, count, layout):
    refuse_another_dtype(x, scales.dtype)
    return x.new_empty(x.shape[0], n)


# cudagraph_unsafe: the host waits for `ends`
@torch.library.custom_op(
    "qlab::int4_grouped_back", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def int4_grouped_back(
    g: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    dense: Tensor | None,
    ends: Tensor,
    k: int,
    group: int,
    count: int,
    layout: str,
) -> Tensor:
    """The gradient by x [m, k] of int4_grouped_mm, from the gradient g [m, n] by its result. One
    expert that has rows is dense at a time."""
    packed = unflattened(words, scales, zeros, g.shape[1], k, group, count, layout)

    def product(e: int, g_mn: Tensor) -> Tensor:
        if not len(g_mn):
            return g_mn.new_empty(0, k)
        W_nk = dequantize(*packed.expert(e).for_dequantize()) if dense is None else dense[e]
        return cpu.dense_product(g_mn, W_nk.mT)

    return each_expert(g, ends, product)


@int4_grouped_back.register_fake
def _int4_grouped_back_fake(g, words, scales, zeros, dense, ends, k, group, count, layout):
    return g.new_empty(g.shape[0], k)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, words, scales, zeros, dense, n, *form = inputs
    ctx.save_for_backward(words, scales, zeros, dense)
    ctx.shape, ctx.form = (n, x.shape[1]), form


def _int4_mm_gradients(ctx: Any, g_mn: Tensor) -> tuple[Tensor | None, ...]:
    words, scales, zeros, dense = ctx.saved_tensors
    W_nk = dequantize(words, scales, zeros, *ctx.shape, *ctx.form) if dense is None else dense
    return cpu.dense_product(g_mn, W_nk.mT), *[None] * 8


def _save_grouped(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, words, scales, zeros, dense, ends, _, *form = inputs
    ctx.save_for_backward(words, scales, zeros, dense, ends)
    ctx.k, ctx.form = x.shape[1], form


def _int4_grouped_mm_gradients(ctx: Any, g_mn: Tensor) -> tuple[Tensor | None, ...]:
    return int4_grouped_back(g_mn, *ctx.saved_tensors, ctx.k, *ctx.form), *[None] * 9


int4_mm.register_autograd(_int4_mm_gradients, setup_context=_save)
int4_grouped_mm.register_autograd(_int4_grouped_mm_gradients, setup_context=_save_grouped)
