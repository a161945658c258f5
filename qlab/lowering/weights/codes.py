"""Weights of any grid, held as bit streams of codes and dequantized for every call: what no kernel
multiplies.

    qlab::dense(words, scales, zeros, outer, perm, k, spec, dtype)     -> W [..., n, k]:
                                                                       qlab.algebra.qtensor.dense,
                                                                       bit for bit
    qlab::experts_mm(x, words, scales, ..., dense, ends, k, spec)      -> y [s, n]: rows
                                                                       ends[e-1]:ends[e] of x @
                                                                       W_e.T
    qlab::experts_back(g, words, scales, ..., dense, ends, k, spec)    -> its gradient by x [s, k]:
                                                                       rows of g @ W_e

The arguments are the fields of a `Coded`; `spec` is the text that `exact.text_of` gives.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.algebra.experts import each_expert
from qlab.algebra.qtensor import QTensor
from qlab.algebra.qtensor import dense as dense_of
from qlab.lowering.weights.exact import spec_of, text_of
from qlab.lowering.weights.int4 import refuse_lost
from qlab.lowering.weights.setting import Setting, refuse_another_dtype
from qlab.lowering.weights.streams import codes_of, words_of

Part = Tensor | None


class Coded(NamedTuple):
    """W [n, k], or [e, n, k] for e experts, as codes in the order of the leaf.

    words: the bit streams of the codes (`streams`).
    scales, zeros, outer, perm: those of the leaf, in the dtype of the activations where that is
    narrower than their own, because they are read in it.
    k: input channels.
    spec: the spec as the operators take it (`exact.text_of`).
    dtype: of the activations, and of W.
    layout: the spec's name, which stands for the order of the words in a model's state.
    """

    words: Tensor
    scales: Tensor
    zeros: Part
    outer: Part
    perm: Part
    k: int
    spec: str
    dtype: torch.dtype
    layout: str

    def expert(self, e: int) -> "Coded":
        """The weight of one expert."""
        zeros, outer = (None if part is None else part[e] for part in (self.zeros, self.outer))
        return self._replace(words=self.words[e], scales=self.scales[e], zeros=zeros, outer=outer)


def meant(leaf: QTensor, setting: Setting) -> bool:
    """Every weight can be held as codes."""
    return True


def takes(leaf: QTensor, setting: Setting) -> None:
    """Every weight is taken."""


def pack(path: str, leaf: QTensor, setting: Setting) -> Coded:
    """A weight as bit streams on the device. Refuses codes that are not on the spec's grid, and
    scales that the dtype does not hold."""
    dtype, device = setting.dtype, setting.device
    refuse_lost(path, [leaf.scales], dtype)

    def placed(part: Part) -> Part:
        if part is None:
            return None
        is_wide = part.is_floating_point() and part.itemsize > dtype.itemsize
        return (part.to(dtype) if is_wide else part).to(device)

    scales = placed(leaf.scales)
    assert scales is not None
    return Coded(
        words=words_of(path, leaf.codes, leaf.spec).to(device),
        scales=scales,
        zeros=placed(leaf.zeros),
        outer=placed(leaf.outer),
        perm=placed(leaf.perm),
        k=leaf.shape[-1],
        spec=text_of(leaf.spec),
        dtype=dtype,
        layout=str(leaf.spec),
    )


def mm(x_mk: Tensor, coded: Coded, copy: Part, bias: Part) -> Tensor:
    """y [m, n] = x @ W.T + b. copy: W, or None to dequantize it for the call."""
    refuse_another_dtype(x_mk, coded.dtype)
    return F.linear(x_mk, dequantized(coded) if copy is None else copy, bias)


def grouped_mm(x_sk: Tensor, coded: Coded, copy: Part, ends: Tensor) -> Tensor:
    """y [s, n]: rows ends[e-1]:ends[e] of x @ W_e.T."""
    refuse_another_dtype(x_sk, coded.dtype)
    words, scales, zeros, outer, perm = coded[:5]
    return experts_mm(x_sk, words, scales, zeros, outer, perm, copy, ends, coded.k, coded.spec)


def dequantized(coded: Coded) -> Tensor:
    """W [..., n, k]."""
    words, scales, zeros, outer, perm = coded[:5]
    return dense(words, scales, zeros, outer, perm, coded.k, coded.spec, coded.dtype)


def keeps_copy(device: torch.device, experts: bool) -> bool:
    """Whether a dense copy of the weight would ever be multiplied: always."""
    return True


def slowness(specs: Sequence[str], dtype: torch.dtype, device: torch.device) -> str:
    """What is slow about weights of these specs."""
    return (
        f"no kernel takes the codes of {len(specs)} weights ({', '.join(sorted(set(specs)))}): "
        "every product dequantizes them and is dense. "
        "Kernels read integers in groups of 32, 64, 128, 256 or whole rows"
    )


# ---------------------------------------------------------------- operators
@torch.library.custom_op("qlab::dense", mutates_args=())
def dense(
    words: Tensor,
    scales: Tensor,
    zeros: Part,
    outer: Part,
    perm: Part,
    k: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    """W [..., n, k] in `dtype`, contiguous."""
    grid = spec_of(spec)
    leaf = QTensor(codes_of(words, grid, k), scales, zeros, grid, outer, perm)
    return dense_of(leaf, dtype).contiguous()


@dense.register_fake
def _(words, scales, zeros, outer, perm, k, spec, dtype):
    return words.new_empty((*words.shape[:-1], k), dtype=dtype)


# cudagraph_unsafe: the host waits for `ends`
@torch.library.custom_op("qlab::experts_mm", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def experts_mm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Part,
    outer: Part,
    perm: Part,
    copy: Part,
    ends: Tensor,
    k: int,
    spec: str,
) -> Tensor:
    """y [s, n] in x's dtype; one expert that has rows is dense at a time. copy: W [e, n, k], or
    None."""
    coded = _coded(words, scales, zeros, outer, perm, k, spec, x.dtype)

    def product(e: int, x_mk: Tensor) -> Tensor:
        if not len(x_mk):
            return x_mk.new_empty(0, words.shape[1])
        return F.linear(x_mk, dequantized(coded.expert(e)) if copy is None else copy[e])

    return each_expert(x, ends, product)


@experts_mm.register_fake
def _(x, words, scales, zeros, outer, perm, copy, ends, k, spec):
    return x.new_empty(x.shape[0], words.shape[1])


@torch.library.custom_op("qlab::experts_back", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def experts_back(
    g: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Part,
    outer: Part,
    perm: Part,
    copy: Part,
    ends: Tensor,
    k: int,
    spec: str,
) -> Tensor:
    """The gradient by x [s, k] of experts_mm, from the gradient g [s, n] by its result."""
    coded = _coded(words, scales, zeros, outer, perm, k, spec, g.dtype)

    def product(e: int, g_mn: Tensor) -> Tensor:
        if not len(g_mn):
            return g_mn.new_empty(0, k)
        return g_mn @ (dequantized(coded.expert(e)) if copy is None else copy[e])

    return each_expert(g, ends, product)


@experts_back.register_fake
def _(g, words, scales, zeros, outer, perm, copy, ends, k, spec):
    return g.new_empty(g.shape[0], k)


def _coded(
    words: Tensor,
    scales: Tensor,
    zeros: Part,
    outer: Part,
    perm: Part,
    k: int,
    spec: str,
    dtype: torch.dtype,
) -> Coded:
    """The value that an operator's arguments are the fields of."""
    return Coded(
        words=words,
        scales=scales,
        zeros=zeros,
        outer=outer,
        perm=perm,
        k=k,
        spec=spec,
        dtype=dtype,
        layout=spec,
    )


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, *parts, k, spec = inputs
    ctx.save_for_backward(*parts)
    ctx.form = k, spec


def _gradients(ctx: Any, g_sn: Tensor) -> tuple[Tensor | None, ...]:
    return experts_back(g_sn, *ctx.saved_tensors, *ctx.form), *[None] * 9


experts_mm.register_autograd(_gradients, setup_context=_save)
