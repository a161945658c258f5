"""int4 matmuls on a CPU: aten's kernel for few tokens, a dense product with a dequantized weight
for many.

`aten._weight_int4pack_mm_for_cpu(x, words, group, scales)` computes x @ ((u - 8) * s + z').T with u
= q + 8 in 0..15 and scales[k / group, n] = (s, z'), so z' = -z * s, rounded to x's dtype. It is
fast in bfloat16 only.

Its words, uint8 [n, k / 2], lie in an order that depends on the instruction set, so the layout's
name says which: int4pack-<b>-halves is [n / b, k, b / 2] bytes with rows j and j + b/2 of a block
of b in one byte, the first one low; int4pack-<b>-pairs has rows 2j and 2j + 1 in it.
"""

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from qlab.algebra.experts import each_expert
from qlab.algebra.products import product_dtype
from qlab.errors import QlabError
from qlab.lowering.tuning.timing import device_label
from qlab.lowering.weights.nibbles import Planes, spread
from qlab.process import processor

aten = torch.ops.aten
PREFIX = "int4pack"
# rows are padded to it: then blocks are whole in every order, and Inductor's template takes them
ROWS = 64
# Tokens up to which the int4 kernel is faster, until `qlab tune` has measured this machine: beside
# a dense copy of the weight, and where it has to be dequantized for the call.
INT4_TOKENS_BESIDE_DENSE = 4
INT4_TOKENS = 64
Kind = Literal["int4pack", "dense"]


@cache
def layout() -> str:
    """The order of this machine's packed words, read off a packed probe."""
    q = torch.randint(
        -8, 8, (2 * ROWS, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8
    )
    words = aten._convert_weight_to_int4pack_for_cpu(q.int() + 8, 1)
    for block in (64, 32, 16):
        for order in ("halves", "pairs"):
            name = f"{PREFIX}-{block}-{order}"
            if torch.equal(_codes(words, name), q.mT):
                return name
    raise QlabError(
        f"torch {torch.__version__} packs int4 weights on this CPU in an order that qlab does not "
        "know; run the dense model, or lower for a GPU"
    )


def pack(planes: Planes, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """words uint8 [n padded, k / 2]; scales [k / group, n padded, 2] = (s, -z * s); zeros [k /
    group, n padded] or None."""
    n = planes.q.shape[0]
    n_padded = -(-n // ROWS) * ROWS
    u = torch.full((n_padded, planes.q.shape[1]), 8, dtype=torch.int32)
    u[:n] = planes.q.int() + 8
    scales, zeros = torch.zeros(planes.scales.shape[1], n_padded, 2, dtype=torch.float32), None
    scales[:, :n, 0] = planes.scales.mT
    if planes.zeros is not None:
        zeros = torch.zeros(scales.shape[:2], dtype=dtype)
        zeros[:, :n] = planes.zeros.mT
        scales[:, :n, 1] = -(planes.zeros * planes.scales).mT
    return aten._convert_weight_to_int4pack_for_cpu(u, 1), scales.to(dtype), zeros


def _codes(words: Tensor, name: str) -> Tensor:
    """int8 [k, n] in -8..7, contiguous: the words' own order, so nothing is shuffled."""
    block = int(name.split("-")[1])
    bytes_k = words.view(words.shape[0] // block, -1, block // 2).transpose(0, 1)
    q = words.new_empty(2 * words.shape[1], words.shape[0] // block, block)
    low, high = (
        (q[..., : block // 2], q[..., block // 2 :])
        if name.endswith("halves")
        else (q[..., ::2], q[..., 1::2])
    )
    torch.bitwise_and(bytes_k, 15, out=low)
    torch.bitwise_right_shift(bytes_k, 4, out=high)
    return q.view(-1, words.shape[0]).view(torch.int8).sub_(8)


def dequantize(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    n: int,
    k: int,
    group: int,
    count: int,
    name: str,
) -> Tensor:
    """W = (q - z) * s [n, k] in the scales' dtype, rounded once: the transpose of a contiguous [k,
    n]."""
    check(name)
    q, s, z = _codes(words, name), scales[..., 0].contiguous(), zeros
    if count == 2:
        assert z is not None  # planes_of gives the low plane one
        hi, lo = q.chunk(2)
        q = lo.to(torch.int16).add_(hi, alpha=16)
        s, z = s.chunk(2)[1], z.chunk(2)[1]
    W_gkn = q.to(scales.dtype).view(-1, group, words.shape[0])
    if z is not None:
        W_gkn.sub_(z[:, None])  # exact: every integer up to 256 is a number of every dtype here
    W_gkn.mul_(s[:, None])
    return W_gkn.view(-1, words.shape[0])[:k, :n].mT


def kind(
    m: int, dtype: torch.dtype, dense_copy: bool, n: int, k: int, group: int, zeros: bool
) -> Kind:
    """How a product of m tokens with planes [n, k] is computed: pure for a snapshot of the config
    cache.

    An entry of the cache decides, measured on this machine or for a shape like it; else the
    constants above do.
    """
    if dtype != torch.bfloat16:
        return "dense"
    from qlab_kernels import cache as configs

    found = configs.lookup(problem(m, dtype, dense_copy, n, k, group, zeros))
    if found.source == "heuristic":
        return (
            "int4pack"
            if m <= (INT4_TOKENS_BESIDE_DENSE if dense_copy else INT4_TOKENS)
            else "dense"
        )
    return "int4pack" if found.config.kind == "int4pack" else "dense"


def problem(
    m: int, dtype: torch.dtype, dense_copy: bool, n: int, k: int, group: int, zeros: bool
) -> Any:
    """The product's key in the config cache. n, k: of the packed planes, padding included."""
    from qlab_kernels import Problem

    op = "int4_linear_cpu_beside_dense" if dense_copy else "int4_linear_cpu"
    isa, device = processor.here().isa, _processor(torch.get_num_threads())
    return Problem(
        op, f"cpu-{isa}", device, str(dtype).removeprefix("torch."), group, zeros, n, k, m
    )


@cache
def _processor(threads: int) -> str:
    return device_label(torch.device("cpu"))


def int4_mm(
    x_mk: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    dense: Tensor | None,
    n: int,
    group: int,
    count: int,
    name: str,
) -> Tensor:
    """y [m, n] = x @ W.T. dense: a copy of W [n, k] to multiply where that is faster, else W is
    dequantized for the call."""
    check(name)
    m, k = x_mk.shape
    if m == 0:
        return x_mk.new_empty(0, n)
    if (
        kind(
            m,
            x_mk.dtype,
            dense is not None,
            words.shape[0],
            2 * words.shape[1],
            group,
            zeros is not None,
        )
        == "int4pack"
    ):
        y = aten._weight_int4pack_mm_for_cpu(spread(x_mk, count), words, group, scales)
        return y if y.shape[1] == n else y[:, :n].contiguous()
    W_nk = dequantize(words, scales, zeros, n, k, group, count, name) if dense is None else dense
    return dense_product(x_mk, W_nk)


def dense_product(x_mk: Tensor, W_nk: Tensor) -> Tensor:
    """x @ W.T in the arithmetic that the processor is fast at."""
    wide = product_dtype(x_mk)
    return (x_mk.to(wide) @ W_nk.to(wide).mT).to(x_mk.dtype)


def int4_grouped_mm(
    x_sk: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    dense: Tensor | None,
    ends: Tensor,
    n: int,
    group: int,
    count: int,
    name: str,
) -> Tensor:
    """y [s, n]: expert by expert, in the way that suits its number of rows."""

    def product(e: int, x_mk: Tensor) -> Tensor:
        z, W = (None if part is None else part[e] for part in (zeros, dense))
        return int4_mm(x_mk, words[e], scales[e], z, W, n, group, count, name)

    return each_expert(x_sk, ends, product)


def check(name: str) -> None:
    """Refuse words that were packed for another device or instruction set: they would be read in
    the wrong order."""
    if name != layout():
        raise QlabError(
            f"a weight packed as {name} cannot be read here, where the layout is {layout()}; "
            "lower the model directory on this machine"
        )
