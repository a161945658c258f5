"""8-bit floats as bytes on a CPU, beside bfloat16 activations.

    y = x @ W.T with W = q * s:   y_mn = s_n sum_k x_mk q_nk   under one scale in a row

Every e4m3 is a number of bfloat16, which `qlab.algebra.e4m3` reads off its bits. Under several
scales in a row W itself is scaled.

    qlab::fp8_mm(x, words, scales, dense)                   -> y [m, n]
    qlab::fp8_grouped_mm(x, words, scales, dense, ends)     -> y [s, n]: rows ends[e-1]:ends[e] of
                                                            x @ W_e.T
    qlab::fp8_back(g, words, scales, ends)                  -> its gradient by x [s, k]
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlab.algebra.e4m3 import numbers
from qlab.algebra.experts import each_expert
from qlab.algebra.products import product_dtype
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Float
from qlab.lowering.weights.cpu import dense_product
from qlab.lowering.weights.int4 import in_order, refuse_lost
from qlab.lowering.weights.setting import Setting, refuse_another_dtype

Part = Tensor | None


class Bytes8(NamedTuple):
    """W [n, k], or [e, n, k] for e experts: words e4m3 [..., n, k]; scales bfloat16 [..., n,
    c], of c groups of channels; perm int64 [k], the input channel of every column of codes, or
    None."""

    words: Tensor
    scales: Tensor
    perm: Part
    layout: str


def meant(leaf: QTensor, setting: Setting) -> bool:
    """Whether a weight has 8-bit floats and is held for a CPU."""
    spec = leaf.spec
    is_fp8 = isinstance(spec, Float) and spec.bits == 8 and leaf.outer is None
    return is_fp8 and setting.device.type == "cpu"


def takes(leaf: QTensor, setting: Setting) -> str | None:
    """Why the weight is dequantized number by number, or None."""
    if setting.dtype != torch.bfloat16:
        return f"8-bit floats on a CPU take no {setting.dtype} activations; use torch.bfloat16"
    cols = leaf.spec.tile.sizes(leaf.shape)[1]
    if leaf.shape[-1] % cols:
        return f"groups of {cols} do not divide {leaf.shape[-1]} channels"
    return None


def pack(path: str, leaf: QTensor, setting: Setting) -> Bytes8:
    """The codes as they are, and scales for every row. Refuses scales that bfloat16 loses."""
    rows, n = leaf.spec.tile.sizes(leaf.shape)[0], leaf.shape[-2]
    refuse_lost(path, [leaf.scales], setting.dtype)
    scales = leaf.scales.float().repeat_interleave(rows, -2)[..., :n, :].to(setting.dtype)
    return Bytes8(
        words=leaf.codes.to(setting.device).contiguous(),
        scales=scales.contiguous().to(setting.device),
        perm=None if leaf.perm is None else leaf.perm.to(setting.device),
        layout="fp8-bytes",
    )


def dense_bytes(words: Tensor, scales: Tensor) -> Tensor:
    """q * s [..., n, k] in bfloat16, rounded once."""
    q = numbers(words, torch.bfloat16).unflatten(-1, (scales.shape[-1], -1))
    return q.mul_(scales[..., None]).flatten(-2)


def columns(weight: Bytes8) -> Tensor:
    """W [..., n, k] with its columns in the order of the codes."""
    return dense_bytes(weight.words, weight.scales)


def keeps_copy(device: torch.device, experts: bool) -> bool:
    """Whether a dense copy of the weight would ever be multiplied: always."""
    return True


def slowness(specs: Sequence[str], dtype: torch.dtype, device: torch.device) -> str:
    """What is slow about 8-bit floats on a CPU."""
    return (
        f"no kernel takes the codes of {len(specs)} weights ({', '.join(sorted(set(specs)))}): "
        "every product casts them and is dense"
    )


def mm(x_mk: Tensor, weight: Bytes8, dense: Part, bias: Part) -> Tensor:
    """y [m, n] = x @ W.T + b."""
    refuse_another_dtype(x_mk, torch.bfloat16)
    y = fp8_mm(in_order(x_mk, weight.perm), weight.words, weight.scales, dense)
    return y if bias is None else y + bias


def grouped_mm(x_sk: Tensor, weight: Bytes8, dense: Part, ends: Tensor) -> Tensor:
    """y [s, n]: rows ends[e-1]:ends[e] of x @ W_e.T."""
    refuse_another_dtype(x_sk, torch.bfloat16)
    return fp8_grouped_mm(in_order(x_sk, weight.perm), weight.words, weight.scales, dense, ends)


# ---------------------------------------------------------------- operators
@torch.library.custom_op("qlab::fp8_mm", mutates_args=())
def fp8_mm(x: Tensor, words: Tensor, scales: Tensor, dense: Part) -> Tensor:
    """y [m, n] in bfloat16. dense: a copy of W, or None."""
    if not len(x):
        return x.new_empty(0, len(words))
    if dense is not None:
        return dense_product(x, dense)
    if scales.shape[-1] > 1:
        return dense_product(x, dense_bytes(words, scales))
    wide = product_dtype(x)
    return ((x.to(wide) @ numbers(words, wide).mT) * scales[:, 0]).to(x.dtype)


@fp8_mm.register_fake
def _(x, words, scales, dense):
    return x.new_empty(x.shape[0], words.shape[0])


# cudagraph_unsafe: the host waits for `ends`
@torch.library.custom_op(
    "qlab::fp8_grouped_mm", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def fp8_grouped_mm(x: Tensor, words: Tensor, scales: Tensor, dense: Part, ends: Tensor) -> Tensor:
    """y [s, n] in bfloat16, each row by its own expert's weight; words, scales and dense have a
    leading axis of experts."""

    def product(e: int, x_mk: Tensor) -> Tensor:
        return fp8_mm(x_mk, words[e], scales[e], None if dense is None else dense[e])

    return each_expert(x, ends, product)


@fp8_grouped_mm.register_fake
def _(x, words, scales, dense, ends):
    return x.new_empty(x.shape[0], words.shape[1])


@torch.library.custom_op("qlab::fp8_back", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def fp8_back(g: Tensor, words: Tensor, scales: Tensor, ends: Part) -> Tensor:
    """The gradient by x [s, k], from the gradient g [s, n] by the result.

    ends: those of experts, or None of one weight."""
    if ends is None:
        ends, words, scales = torch.tensor([len(g)], dtype=torch.int64), words[None], scales[None]

    def by_x(e: int, g_mn: Tensor) -> Tensor:
        if not len(g_mn):
            return g_mn.new_empty(0, words.shape[-1])
        return dense_product(g_mn, dense_bytes(words[e], scales[e]).mT)

    return each_expert(g, ends, by_x)


@fp8_back.register_fake
def _(g, words, scales, ends):
    return g.new_empty(g.shape[0], words.shape[-1])


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, words, scales, _, *ends = inputs
    ctx.save_for_backward(words, scales, ends[0] if ends else None)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return fp8_back(g, *ctx.saved_tensors), *[None] * 3


def _grouped_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return fp8_back(g, *ctx.saved_tensors), *[None] * 4


fp8_mm.register_autograd(_gradients, setup_context=_save)
fp8_grouped_mm.register_autograd(_grouped_gradients, setup_context=_save)
