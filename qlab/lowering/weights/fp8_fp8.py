"""8-bit floats beside 8-bit floats, on GPUs that multiply them, of capability 8.9 on: under scales
of rows, or of blocks of 128 x 128 and of 128 channels of a token.

    x_mk = p_mk t_m,  W_nk = q_nk s_n:            x @ W.T = t_m s_n sum_k p q
    x_mk = p_mk t_mc, W_nk = q_nk s_ac, k in c:   x @ W.T = sum_c t_mc s_ac sum_(k in c) p q

Scales of rows follow the sum, which is fp32; those of blocks follow the sum of a block. Activations
are rounded here, as qlab.algebra.online.QuantizeInput rounds them. Without Triton torch multiplies,
which has scales of blocks from capability 9.0 on.

    qlab::fp8_fp8_mm(x, words, scales, in_scales, n, spec)                  -> y [m, n]
    qlab::fp8_fp8_grouped_mm(x, words, scales, in_scales, ends, n, spec)    -> y [s, n]
    qlab::fp8_fp8_experts_mm(x, words, ..., ends, n, spec)    the same, without waiting for `ends`
    qlab::fp8_fp8_back(g, words, scales, ends, k)                           -> by x [s, k]
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.algebra.experts import each_expert, rows_of
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Float, Spec, parse_spec
from qlab.lowering.weights import octets_cuda
from qlab.lowering.weights.cpu import dense_product
from qlab.lowering.weights.exact import text_of
from qlab.lowering.weights.floats import BLOCK, E4M3, MULTIPLE, product, tried
from qlab.lowering.weights.integers import rounded
from qlab.lowering.weights.setting import Setting, refuse_another_dtype

Part = Tensor | None


class Floats(NamedTuple):
    """W [n, k], or [e, n, k] for e experts.

    words: e4m3 [..., n', k'], padded with zeros. scales: fp32 [..., n'] of rows, or [..., n / 128,
    k / 128] of blocks. in_scales: of activations whose scale is fixed. n, k: without padding. spec:
    how activations are rounded, as text. dtype: of activations before they are rounded.
    """

    words: Tensor
    scales: Tensor
    in_scales: Part
    n: int
    k: int
    spec: str
    dtype: torch.dtype
    layout: str


def is_e4m3(spec: Spec) -> bool:
    """Whether numbers are e4m3 under scales that are no powers of two."""
    return isinstance(spec, Float) and spec.bits == 8 and spec.scale_dtype != torch.float8_e8m0fnu


def meant(leaf: QTensor, setting: Setting) -> bool:
    """Whether weight and activations are 8-bit floats."""
    return is_e4m3(leaf.spec) and setting.inputs is not None and is_e4m3(setting.inputs.spec)


def takes(leaf: QTensor, setting: Setting) -> str | None:
    """Why the weight is dequantized instead, or None."""
    inputs = setting.inputs
    assert inputs is not None
    if parse_spec(str(inputs.spec)) != inputs.spec:
        return f"inputs in {inputs.spec!r} have no name"
    if leaf.perm is not None:
        return "channels in an order of their own have no fp8 product"
    if _of_blocks(leaf.spec, inputs.spec) and any(size % BLOCK for size in leaf.shape[-2:]):
        return f"{BLOCK}x{BLOCK} blocks do not divide a weight {tuple(leaf.shape[-2:])}"
    form = _form(leaf, inputs.spec)
    if form is None:
        return (
            f"scales of {leaf.spec} beside inputs in {inputs.spec} have no fp8 product; rows "
            "beside tokens have, and blocks of 128x128 beside groups of 128"
        )
    return _no_device(setting.device, form)


def _form(leaf: QTensor, inputs: Spec) -> str | None:
    """ "rows" or "blocks", whichever the scales are of, or None for others."""
    (rows, cols), (n, k) = leaf.spec.tile.sizes(leaf.shape), leaf.shape[-2:]
    if cols == k and n % rows == 0 and inputs.tile.cols is None and inputs.tile.rows in (None, 1):
        return "rows"
    return "blocks" if _of_blocks(leaf.spec, inputs) else None


def _of_blocks(weights: Spec, inputs: Spec) -> bool:
    """Whether scales are of blocks of 128 x 128, and of 128 channels of a token."""
    return _tile(weights) == (BLOCK, BLOCK) and _tile(inputs) == (1, BLOCK)


def _tile(spec: Spec) -> tuple[int | None, int | None]:
    return spec.tile.rows, spec.tile.cols


def _no_device(device: torch.device, form: str) -> str | None:
    """Why a device has no such product, or None."""
    if device.type == "cpu":
        return "torch's fp8 product on a CPU takes as long as dequantizing"
    if octets_cuda.fused(device, octets_cuda.FP8):
        return None
    of_torch = form == "blocks" and not octets_cuda.has_triton()
    first = (9, 0) if of_torch else octets_cuda.FP8
    capability = torch.cuda.get_device_capability(device)
    if capability < first:
        return (
            f"this GPU of capability {'.'.join(map(str, capability))} has no such fp8 product; "
            f"{'.'.join(map(str, first))} is the first"
        )
    return tried(device, form)


def pack(path: str, leaf: QTensor, setting: Setting) -> Floats:
    """The codes, padded to what the product takes, and scales in fp32."""
    inputs, device = setting.inputs, setting.device
    assert inputs is not None
    (n, k), rows = leaf.shape[-2:], leaf.spec.tile.sizes(leaf.shape)[0]
    scales = leaf.scales.float()
    form = _form(leaf, inputs.spec)
    if form == "rows":
        scales = F.pad(scales[..., 0].repeat_interleave(rows, -1), (0, -n % MULTIPLE))
    octets = leaf.codes.contiguous().view(torch.uint8)
    return Floats(
        words=F.pad(octets, (0, -k % MULTIPLE, 0, -n % MULTIPLE)).view(E4M3).to(device),
        scales=scales.contiguous().to(device),
        in_scales=None if inputs.scales is None else inputs.scales.to(device),
        n=n,
        k=k,
        spec=text_of(inputs.spec),
        dtype=setting.dtype,
        layout=f"fp8-{form}",
    )


def dense_floats(words: Tensor, scales: Tensor) -> Tensor:
    """q * s [..., n', k'] in fp32."""
    q = words.float()
    if scales.ndim < words.ndim:
        return q.mul_(scales[..., None])
    return q.mul_(scales.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2))


def dequantized(weight: Floats) -> Tensor:
    """W [..., n, k]."""
    W = dense_floats(weight.words, weight.scales)[..., : weight.n, : weight.k]
    return W.to(weight.dtype)


def mm(x_mk: Tensor, weight: Floats, dense: Part, bias: Part) -> Tensor:
    """y [m, n] = x @ W.T + b, x rounded."""
    refuse_another_dtype(x_mk, weight.dtype)
    words, scales, in_scales, n, _, spec, *_ = weight
    added = bias if x_mk.device.type == "cuda" else None
    y = fp8_fp8_mm(x_mk, words, scales, in_scales, n, spec, added)
    return y if bias is None or added is not None else y + bias


def grouped_mm(x_sk: Tensor, weight: Floats, dense: Part, ends: Tensor) -> Tensor:
    """y [s, n]: rows ends[e-1]:ends[e] of x @ W_e.T, x rounded."""
    refuse_another_dtype(x_sk, weight.dtype)
    words, scales, in_scales, n, _, spec, *_ = weight
    multiply = (
        fp8_fp8_experts_mm
        if octets_cuda.fused(x_sk.device, octets_cuda.FP8)
        else fp8_fp8_grouped_mm
    )
    return multiply(x_sk, words, scales, in_scales, ends, n, spec)


# ---------------------------------------------------------------- operators
@torch.library.custom_op("qlab::fp8_fp8_mm", mutates_args=())
def fp8_fp8_mm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    in_scales: Part,
    n: int,
    spec: str,
    bias: Part = None,
) -> Tensor:
    """y [m, n] in x's dtype, which a GPU rounds once."""
    if not len(x):
        return x.new_empty(0, n)
    if x.device.type == "cuda":
        codes = octets_cuda.rounded(x, None, in_scales, None, spec)
        return octets_cuda.fp8_mm(codes, (words, scales, n), bias, x.dtype)
    codes = rounded(x, None, in_scales, None, spec)
    y = product(codes, words, scales)[:, :n].to(x.dtype).contiguous()
    return y if bias is None else y + bias


@fp8_fp8_mm.register_fake
def _(x, words, scales, in_scales, n, spec, bias=None):
    return x.new_empty(x.shape[0], n)


# cudagraph_unsafe: the host waits for `ends`
@torch.library.custom_op(
    "qlab::fp8_fp8_grouped_mm", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def fp8_fp8_grouped_mm(
    x: Tensor, words: Tensor, scales: Tensor, in_scales: Part, ends: Tensor, n: int, spec: str
) -> Tensor:
    """y [s, n] in x's dtype. All rows are rounded together, as one scale may be of all of them."""
    y = x.new_empty(len(x), n)
    if not len(x):
        return y
    codes = rounded(x, None, in_scales, None, spec)
    for e, rows in enumerate(rows_of(ends)):
        if rows.stop > rows.start:
            y[rows] = product(codes.of(rows), words[e], scales[e])[:, :n].to(x.dtype)
    return y


@fp8_fp8_grouped_mm.register_fake
def _grouped_fake(x, words, scales, in_scales, ends, n, spec):
    return x.new_empty(x.shape[0], n)


@torch.library.custom_op("qlab::fp8_fp8_experts_mm", mutates_args=())
def fp8_fp8_experts_mm(
    x: Tensor, words: Tensor, scales: Tensor, in_scales: Part, ends: Tensor, n: int, spec: str
) -> Tensor:
    """y [s, n] in x's dtype, on a GPU that reads `ends` itself."""
    if not len(x):
        return x.new_empty(0, n)
    codes = octets_cuda.rounded(x, None, in_scales, None, spec)
    return octets_cuda.fp8_grouped_mm(codes, (words, scales, n), ends, x.dtype)


fp8_fp8_experts_mm.register_fake(_grouped_fake)


@torch.library.custom_op("qlab::fp8_fp8_back", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def fp8_fp8_back(g: Tensor, words: Tensor, scales: Tensor, ends: Part, k: int) -> Tensor:
    """The gradient by x [s, k], from the gradient g [s, n] by the result: that of unrounded x.

    ends: those of experts, or None of one weight."""
    lone, n = ends is None, g.shape[1]
    ends = torch.tensor([len(g)], dtype=torch.int64) if ends is None else ends
    words, scales = (part[None] if lone else part for part in (words, scales))

    def by_x(e: int, g_mn: Tensor) -> Tensor:
        if not len(g_mn):
            return g_mn.new_empty(0, k)
        return dense_product(g_mn, dense_floats(words[e], scales[e])[:n, :k].mT)

    return each_expert(g, ends, by_x)


@fp8_fp8_back.register_fake
def _(g, words, scales, ends, k):
    return g.new_empty(g.shape[0], k)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, words, scales, _, ends, *_ = inputs
    ctx.save_for_backward(words, scales, ends if isinstance(ends, Tensor) else None)
    ctx.k, ctx.others = x.shape[1], len(inputs) - 1


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    others: list[Tensor | None] = [None] * ctx.others
    if ctx.needs_input_grad[-1]:  # a bias, which is the last
        others[-1] = g.sum(0)
    return fp8_fp8_back(g, *ctx.saved_tensors, ctx.k), *others


for operator in (fp8_fp8_mm, fp8_fp8_grouped_mm, fp8_fp8_experts_mm):
    operator.register_autograd(_gradients, setup_context=_save)
