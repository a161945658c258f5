"""Integer weights beside integer activations: int8 codes are multiplied with int8 codes in sums of
32 bits, which are exact, and scales, zero points and bias follow.

    x_mk = (p_mk - y_m) t_m,  W_nk = (q_nk - z_nc) s_nc  in the group c of channel k
    x @ W.T = t_m sum_c s_nc [sum_k p q - z_nc sum_k p - y_m (sum_k q - g z_nc)],  k in group c of g

The activations are rounded here, as qlab.algebra.online.QuantizeInput rounds them; their codes are
never made numbers again, so the product is nearer to the formula than one in 16 bits.

    qlab::int8_int8_mm(x, words, scales, zeros, sums, in_scales, in_zeros, spec)   -> y [m, n]
    qlab::int8_int8_grouped_mm(x, words, ..., ends, spec)                          -> y [s, n]
    qlab::int8_int8_experts_mm(x, words, ..., ends, spec)     the same, without waiting for `ends`
    qlab::int8_int8_back(g, words, scales, zeros, ends)                            -> by x [s, k]
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlab.algebra.experts import each_expert, rows_of
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, parse_spec
from qlab.lowering.weights import octets_cuda
from qlab.lowering.weights.cpu import dense_product
from qlab.lowering.weights.exact import text_of
from qlab.lowering.weights.int8 import is_byte
from qlab.lowering.weights.integers import is_exact, product, rounded
from qlab.lowering.weights.setting import Setting, refuse_another_dtype

Part = Tensor | None
CHANNELS = 2**15  # |p - y| and |q - z| are at most 255, and 255^2 * CHANNELS < 2^31
# Each group of a row is a product of its own: in groups of 128, one token takes 1.3 of the time of
# two planes of 4 bits.
SMALLEST_GROUP = 512


class Integers(NamedTuple):
    """W [n, k], or [e, n, k] for e experts, in c groups of g channels of a row.

    words: int8 [..., c, n, g]. scales, zeros: fp32 and int32 [..., c, n]; zeros is None for
    symmetric codes. sums: int32 [..., c, n], sum_k q - g z, or None where activations have no zero
    points. perm: int64 [k], the input channel of every column of codes, or None. in_scales,
    in_zeros: of activations whose scale is fixed. spec: how activations are rounded, as text.
    dtype: of activations before they are rounded, and of results.
    """

    words: Tensor
    scales: Tensor
    zeros: Part
    sums: Part
    perm: Part
    in_scales: Part
    in_zeros: Part
    spec: str
    dtype: torch.dtype
    layout: str


def rounding(setting: Setting) -> QuantizeInput | None:
    """How activations are rounded to integers: as the directory says, else as the user lets it,
    each token by its largest number. None where they are not."""
    if setting.inputs is not None:
        return setting.inputs if isinstance(setting.inputs.spec, Int) else None
    return QuantizeInput(parse_spec("int8-channel")) if setting.activations == "int8" else None


def meant(leaf: QTensor, setting: Setting) -> bool:
    """Whether weight and activations are integers, those of the weight of 5 to 8 bits."""
    return is_byte(leaf) and rounding(setting) is not None


def takes(leaf: QTensor, setting: Setting) -> str | None:
    """Why the rounded activations are multiplied as numbers instead, or None."""
    inputs = rounding(setting)
    assert inputs is not None
    (rows, cols), (n, k) = leaf.spec.tile.sizes(leaf.shape), leaf.shape[-2:]
    if inputs.spec.tile.cols is not None or inputs.spec.tile.rows not in (None, 1):
        return f"inputs in {inputs.spec} have several scales in a token; int8 x int8 reads one"
    if parse_spec(str(inputs.spec)) != inputs.spec:
        return f"inputs in {inputs.spec!r} have no name"
    if leaf.zeros is not None and leaf.zeros.is_floating_point():
        return "zero points between codes make no integer product"
    if n % rows or k % cols:
        return f"blocks of {rows}x{cols} do not divide a weight {tuple(leaf.shape)}"
    if cols < min(k, SMALLEST_GROUP):
        return f"groups of {cols} need a product each; whole rows need one"
    if k > CHANNELS:
        return f"sums over {k} channels do not fit in 32 bits"
    return _no_device(setting.device)


def _no_device(device: torch.device) -> str | None:
    """Why a device has no exact product of int8 codes, or None."""
    if device.type == "cpu":
        return (
            None if is_exact() else "this processor adds int8 products in 16 bits, which saturate"
        )
    if torch.cuda.get_device_capability(device) < (7, 5):
        return "this GPU multiplies no int8 codes; capability 7.5 is the first"
    return None


def pack(path: str, leaf: QTensor, setting: Setting) -> Integers:
    """The codes, group by group, and what the corrections need."""
    inputs = rounding(setting)
    assert inputs is not None
    (rows, cols), device = leaf.spec.tile.sizes(leaf.shape), setting.device

    def placed(part: Part, dtype: torch.dtype) -> Part:
        """[..., a, c] of tiles as [..., c, n]."""
        if part is None:
            return None
        return part.to(dtype).repeat_interleave(rows, -2).mT.contiguous().to(device)

    words = leaf.codes.unflatten(-1, (-1, cols)).transpose(-2, -3).contiguous()
    scales, zeros = placed(leaf.scales, torch.float32), placed(leaf.zeros, torch.int32)
    assert scales is not None
    sums = None
    if not inputs.spec.symmetric:
        sums = words.sum(-1, dtype=torch.int32).to(device)
        sums = sums if zeros is None else sums - cols * zeros
    return Integers(
        words=words.to(device),
        scales=scales,
        zeros=zeros,
        sums=sums,
        perm=None if leaf.perm is None else leaf.perm.to(device),
        in_scales=None if inputs.scales is None else inputs.scales.to(device),
        in_zeros=None if inputs.zeros is None else inputs.zeros.to(device),
        spec=text_of(inputs.spec),
        dtype=setting.dtype,
        layout="int8_int8",
    )


def columns(weight: Integers) -> Tensor:
    """W [..., n, k] with its columns in the order of the codes."""
    return dense_groups(weight.words, weight.scales, weight.zeros).to(weight.dtype)


def dense_groups(words: Tensor, scales: Tensor, zeros: Part) -> Tensor:
    """(q - z) * s [..., n, k] in fp32."""
    q = words.float()
    if zeros is not None:
        q.sub_(zeros[..., None])
    return q.mul_(scales[..., None]).transpose(-2, -3).flatten(-2)


def mm(x_mk: Tensor, weight: Integers, dense: Part, bias: Part) -> Tensor:
    """y [m, n] = x @ W.T + b, x rounded."""
    refuse_another_dtype(x_mk, weight.dtype)
    words, scales, zeros, sums, perm, in_scales, in_zeros, spec = weight[:8]
    added = bias if x_mk.device.type == "cuda" else None
    y = int8_int8_mm(x_mk, words, scales, zeros, sums, perm, in_scales, in_zeros, spec, added)
    return y if bias is None or added is not None else y + bias


def grouped_mm(x_sk: Tensor, weight: Integers, dense: Part, ends: Tensor) -> Tensor:
    """y [s, n]: rows ends[e-1]:ends[e] of x @ W_e.T, x rounded."""
    refuse_another_dtype(x_sk, weight.dtype)
    words, scales, zeros, sums, perm, in_scales, in_zeros, spec = weight[:8]
    multiply = int8_int8_experts_mm if octets_cuda.fused(x_sk.device) else int8_int8_grouped_mm
    return multiply(x_sk, words, scales, zeros, sums, perm, in_scales, in_zeros, ends, spec)


# ---------------------------------------------------------------- operators
@torch.library.custom_op("qlab::int8_int8_mm", mutates_args=())
def int8_int8_mm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Part,
    sums: Part,
    perm: Part,
    in_scales: Part,
    in_zeros: Part,
    spec: str,
    bias: Part = None,
) -> Tensor:
    """y [m, n] in x's dtype, which a GPU rounds once."""
    if not len(x):
        return x.new_empty(0, words.shape[1])
    if x.device.type == "cuda":
        codes = octets_cuda.rounded(x, perm, in_scales, in_zeros, spec)
        return octets_cuda.int8_mm(codes, (words, scales, zeros, sums), bias, x.dtype)
    codes = rounded(x, perm, in_scales, in_zeros, spec)
    y = product(codes, words, scales, zeros, sums).to(x.dtype)
    return y if bias is None else y + bias


@int8_int8_mm.register_fake
def _(x, words, scales, zeros, sums, perm, in_scales, in_zeros, spec, bias=None):
    return x.new_empty(x.shape[0], words.shape[1])


# cudagraph_unsafe: the host waits for `ends`
@torch.library.custom_op(
    "qlab::int8_int8_grouped_mm", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def int8_int8_grouped_mm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Part,
    sums: Part,
    perm: Part,
    in_scales: Part,
    in_zeros: Part,
    ends: Tensor,
    spec: str,
) -> Tensor:
    """y [s, n] in x's dtype. All rows are rounded together, as one scale may be of all of them."""
    y = x.new_empty(len(x), words.shape[2])
    if not len(x):
        return y
    codes = rounded(x, perm, in_scales, in_zeros, spec)
    for e, rows in enumerate(rows_of(ends)):
        if rows.stop == rows.start:
            continue
        z, total = (None if part is None else part[e] for part in (zeros, sums))
        y[rows] = product(codes.of(rows), words[e], scales[e], z, total).to(x.dtype)
    return y


@int8_int8_grouped_mm.register_fake
def _grouped_fake(x, words, scales, zeros, sums, perm, in_scales, in_zeros, ends, spec):
    return x.new_empty(x.shape[0], words.shape[2])


@torch.library.custom_op("qlab::int8_int8_experts_mm", mutates_args=())
def int8_int8_experts_mm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Part,
    sums: Part,
    perm: Part,
    in_scales: Part,
    in_zeros: Part,
    ends: Tensor,
    spec: str,
) -> Tensor:
    """y [s, n] in x's dtype, on a GPU that reads `ends` itself."""
    if not len(x):
        return x.new_empty(0, words.shape[2])
    codes = octets_cuda.rounded(x, perm, in_scales, in_zeros, spec)
    return octets_cuda.int8_grouped_mm(codes, (words, scales, zeros, sums), ends, x.dtype)


int8_int8_experts_mm.register_fake(_grouped_fake)


@torch.library.custom_op(
    "qlab::int8_int8_back", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def int8_int8_back(
    g: Tensor, words: Tensor, scales: Tensor, zeros: Part, perm: Part, ends: Part
) -> Tensor:
    """The gradient by x [s, k], from the gradient g [s, n] by the result: that of unrounded x.

    ends: those of experts, or None of one weight."""
    if ends is None:
        ends, words, scales = torch.tensor([len(g)], dtype=torch.int64), words[None], scales[None]
        zeros = None if zeros is None else zeros[None]

    def by_x(e: int, g_mn: Tensor) -> Tensor:
        if not len(g_mn):
            return g_mn.new_empty(0, words.shape[-3] * words.shape[-1])
        W_nk = dense_groups(words[e], scales[e], None if zeros is None else zeros[e])
        return dense_product(g_mn, (W_nk if perm is None else W_nk[:, perm.argsort()]).mT)

    return each_expert(g, ends, by_x)


@int8_int8_back.register_fake
def _(g, words, scales, zeros, perm, ends):
    return g.new_empty(g.shape[0], words.shape[-3] * words.shape[-1])


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, words, scales, zeros, _, perm, _, _, ends, *rest = inputs
    ctx.save_for_backward(words, scales, zeros, perm, ends if isinstance(ends, Tensor) else None)
    ctx.others = 8 + len(rest)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    others: list[Tensor | None] = [None] * ctx.others
    if ctx.needs_input_grad[-1]:  # a bias, which is the last
        others[-1] = g.sum(0)
    return int8_int8_back(g, *ctx.saved_tensors), *others


for operator in (int8_int8_mm, int8_int8_grouped_mm, int8_int8_experts_mm):
    operator.register_autograd(_gradients, setup_context=_save)
