"""The operators of packed weights: qlab::dequantize, int4_mm and int4_grouped_mm, for a CPU and for CUDA. Those of all other
weights are in `coded.py`, and that of rounded inputs in `inputs.py`.

    qlab::dequantize(words, scales, zeros, n, k, group, count, layout)        -> W [n, k] = (q - z) * s
    qlab::int4_mm(x, words, scales, zeros, dense, n, group, count, layout)    -> y [m, n] = x @ W.T
    qlab::int4_grouped_mm(x, words, scales, zeros, dense, ends, n, ...)       -> y [m, n]: rows ends[e-1]:ends[e] of x @ W_e.T

words, scales, zeros: as cpu.pack or cuda.pack made them, in the order that `layout` names; group: codes per scale; count: 4-bit
planes (two for codes of more than four bits). x [m, k] is in the scales' dtype, any m. dense: a copy of W, or None.
Both are opaque to torch.compile; `rewrite` turns the first and a matmul into the second.
"""

import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.lower import cpu, cuda


@torch.library.custom_op("qlab::dequantize", mutates_args=(), device_types="cpu")
def dequantize(words: Tensor, scales: Tensor, zeros: Tensor | None, n: int, k: int, group: int, count: int, layout: str) -> Tensor:
    """W [n, k] in the scales' dtype."""
    return cpu.dequantize(words, scales, zeros, n, k, group, count, layout)


@torch.library.custom_op("qlab::int4_mm", mutates_args=(), device_types="cpu")
def int4_mm(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, dense: Tensor | None, n: int, group: int, count: int,
            layout: str) -> Tensor:  # fmt: skip
    """y [m, n] = x @ W.T in x's dtype."""
    _same_dtype(x, scales)
    return cpu.int4_mm(x, words, scales, zeros, dense, n, group, count, layout)


@torch.library.custom_op("qlab::int4_grouped_mm", mutates_args=(), device_types="cpu")
def int4_grouped_mm(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, dense: Tensor | None, ends: Tensor, n: int,
                    group: int, count: int, layout: str) -> Tensor:  # fmt: skip
    """y [m, n] in x's dtype, each row by its own expert's weight; all but x and n have a leading axis of experts."""
    _same_dtype(x, scales)
    return cpu.int4_grouped_mm(x, words, scales, zeros, dense, ends, n, group, count, layout)


@dequantize.register_kernel("cuda")
def _dequantize_cuda(words, scales, zeros, n, k, group, count, layout):
    return cuda.dequantize(words, scales, zeros, n, k, group, count, layout)


@int4_mm.register_kernel("cuda")
def _int4_mm_cuda(x, words, scales, zeros, dense, n, group, count, layout):
    _same_dtype(x, scales)
    return cuda.int4_mm(x, words, scales, zeros, dense, n, group, count, layout)


@int4_grouped_mm.register_kernel("cuda")
def _int4_grouped_mm_cuda(x, words, scales, zeros, dense, ends, n, group, count, layout):
    _same_dtype(x, scales)
    return cuda.int4_grouped_mm(x, words, scales, zeros, dense, ends, n, group, count, layout)


@dequantize.register_fake
def _dequantize_fake(words, scales, zeros, n, k, group, count, layout):
    if not layout.startswith(cpu.PREFIX):
        return scales.new_empty(n, k)
    return scales.new_empty(2 * words.shape[1] // count, words.shape[0])[:k, :n].mT


@int4_mm.register_fake
def _int4_mm_fake(x, words, scales, zeros, dense, n, group, count, layout):
    _same_dtype(x, scales)
    return x.new_empty(x.shape[0], n)


@int4_grouped_mm.register_fake
def _int4_grouped_mm_fake(x, words, scales, zeros, dense, ends, n, group, count, layout):
    _same_dtype(x, scales)
    return x.new_empty(x.shape[0], n)


def _same_dtype(x: Tensor, scales: Tensor) -> None:
    if x.dtype != scales.dtype:
        raise QlabError(f"a model lowered for {scales.dtype} got {x.dtype} activations; lower it for that dtype instead")
