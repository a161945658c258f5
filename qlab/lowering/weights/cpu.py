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
from qlab.lowering.devices import device_label
from qlab.lowering.weights.nibbles import Planes, spread
from qlab.lowering.weights.packed import Packed
from qlab.process import processor

aten = torch.ops.aten
PREFIX = "int4pack"
WORD_AXES = 2  # of the words of one weight; those of experts have one more
WHOLE_ROWS = False  # the kernel reads no scale of a whole row: rows are cut into groups
# Rows are padded to this multiple: blocks are then whole in every order, and Inductor's template
# takes them.
ROWS = 64
# Tokens up to which the int4 kernel is faster, until `qlab tune` has measured this machine: beside
# a dense copy of the weight, and where the weight has to be dequantized for the call.
INT4_TOKENS_BESIDE_DENSE = 4
INT4_TOKENS = 64
Kind = Literal["int4pack", "dense"]


@cache
def layout() -> str:
    """The order of this machine's packed words, read off a packed probe."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (2 * ROWS, 64), generator=generator, dtype=torch.int8)
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


def pack(planes: Planes, dtype: torch.dtype) -> Packed:
    """Pack one weight: words uint8 [n padded, k / 2]; scales [k / group, n padded, 2] = (s, -z *
    s); zeros [k / group, n padded] or None."""
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
    return Packed(
        words=aten._convert_weight_to_int4pack_for_cpu(u, 1),
        scales=scales.to(dtype),
        zeros=zeros,
        perm=None,
        n=n,
        k=planes.k,
        group=planes.group,
        planes=planes.count,
        layout=layout(),
    )


def _codes(words: Tensor, name: str) -> Tensor:
    """int8 [k, n] in -8..7, contiguous: the words' own order, so nothing is shuffled."""
    block = int(name.split("-")[1])
    bytes_k = words.view(words.shape[0] // block, -1, block // 2).transpose(0, 1)
    q = words.new_empty(2 * words.shape[1], words.shape[0] // block, block)
    if name.endswith("halves"):
        low, high = q[..., : block // 2], q[..., block // 2 :]
    else:
        low, high = q[..., ::2], q[..., 1::2]
    torch.bitwise_and(bytes_k, 15, out=low)
    torch.bitwise_right_shift(bytes_k, 4, out=high)
    return q.view(-1, words.shape[0]).view(torch.int8).sub_(8)


def dequantize(packed: Packed) -> Tensor:
    """W = (q - z) * s [n, k] in the scales' dtype, rounded once: the transpose of a contiguous [k,
    n]."""
    check(packed.layout)
    words, scales = packed.words, packed.scales
    q, s, z = _codes(words, packed.layout), scales[..., 0].contiguous(), packed.zeros
    if packed.planes == 2:
        assert z is not None  # planes_of gives the low plane one
        hi, lo = q.chunk(2)
        q = lo.to(torch.int16).add_(hi, alpha=16)
        s, z = s.chunk(2)[1], z.chunk(2)[1]
    W_gkn = q.to(scales.dtype).view(-1, packed.group, words.shape[0])
    if z is not None:
        W_gkn.sub_(z[:, None])  # exact: every integer up to 256 is a number of every dtype here
    W_gkn.mul_(s[:, None])
    return W_gkn.view(-1, words.shape[0])[: packed.k, : packed.n].mT


def kind(
    m: int, dtype: torch.dtype, dense_copy: bool, n: int, k: int, group: int, zeros: bool
) -> Kind:
    """How a product of m tokens with planes [n, k] is computed: pure for a snapshot of the config
    cache.

    An entry of the cache decides, which was measured on this machine for this shape or one like it;
    without one, the constants above do."""
    if dtype != torch.bfloat16:
        return "dense"
    from qlab_kernels import cache as configs

    looked_up = configs.lookup(problem(m, dtype, dense_copy, n, k, group, zeros))
    if looked_up.source == "heuristic":
        most = INT4_TOKENS_BESIDE_DENSE if dense_copy else INT4_TOKENS
        return "int4pack" if m <= most else "dense"
    return "int4pack" if looked_up.config.kind == "int4pack" else "dense"


def problem(
    m: int, dtype: torch.dtype, dense_copy: bool, n: int, k: int, group: int, zeros: bool
) -> Any:
    """The product's key in the config cache. n, k: of the packed planes, padding included."""
    from qlab_kernels import Problem

    return Problem(
        op="int4_linear_cpu_beside_dense" if dense_copy else "int4_linear_cpu",
        cc=f"cpu-{processor.here().isa}",
        device=_label(torch.get_num_threads()),
        dtype=str(dtype).removeprefix("torch."),
        group=group,
        zeros=zeros,
        n=n,
        k=k,
        m=m,
    )


@cache
def _label(threads: int) -> str:
    """The processor's label, which names the number of threads."""
    return device_label(torch.device("cpu"))


def int4_mm(x_mk: Tensor, packed: Packed, dense: Tensor | None) -> Tensor:
    """y [m, n] = x @ W.T. dense: a copy of W [n, k] to multiply where that is faster, else W is
    dequantized for the call."""
    check(packed.layout)
    m, (rows, half) = x_mk.shape[0], packed.words.shape
    if m == 0:
        return x_mk.new_empty(0, packed.n)
    has_zeros = packed.zeros is not None
    if (
        kind(m, x_mk.dtype, dense is not None, rows, 2 * half, packed.group, has_zeros)
        != "int4pack"
    ):
        return dense_product(x_mk, dequantize(packed) if dense is None else dense)
    y = aten._weight_int4pack_mm_for_cpu(
        spread(x_mk, packed.planes), packed.words, packed.group, packed.scales
    )
    return y if y.shape[1] == packed.n else y[:, : packed.n].contiguous()


def dense_product(x_mk: Tensor, W_nk: Tensor) -> Tensor:
    """x @ W.T in the arithmetic that the processor is fast at."""
    wide = product_dtype(x_mk)
    return (x_mk.to(wide) @ W_nk.to(wide).mT).to(x_mk.dtype)


def int4_grouped_mm(x_sk: Tensor, packed: Packed, dense: Tensor | None, ends: Tensor) -> Tensor:
    """y [s, n]: expert by expert, in the way that suits its number of rows."""

    def product(e: int, x_mk: Tensor) -> Tensor:
        return int4_mm(x_mk, packed.expert(e), None if dense is None else dense[e])

    return each_expert(x_sk, ends, product)


def reads_dense(device: torch.device, experts: bool) -> bool:
    """Whether products ever take a dense copy of the weight: on a CPU always."""
    return True


def check(name: str) -> None:
    """Refuse words that were packed for another device or instruction set: they would be read in
    the wrong order."""
    if name != layout():
        raise QlabError(
            f"a weight packed as {name} cannot be read here, where the layout is {layout()}; "
            "lower the model directory on this machine"
        )
