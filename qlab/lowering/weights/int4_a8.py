"""Integer weights of up to 4 bits beside activations rounded to 8 bits, on a GPU: what the rows
`int4_int8_cuda` and `int4_fp8` share. `qlab_kernels.int4_a8` multiplies, in the configuration that
its cache holds for the shape.

    x_mk = p_mk t_m,  W_nk = (q_nk - z_nc) s_nc  in the group c of channel k
    x @ W.T = t_m sum_c s_nc [sum_k p q - z_nc sum_k p],  k in group c

The activations are rounded here, as qlab.algebra.online.QuantizeInput rounds them; their codes are
never made numbers again, so the product is nearer to the formula than one in 16 bits.

    qlab::int4_a8_mm(x, words, scales, zeros, perm, in_scales, bias, n, ...)         -> y [m, n]
    qlab::int4_a8_grouped_mm(x, words, scales, zeros, perm, in_scales, ends, n, ...) -> y [s, n]
    qlab::int4_a8_back(g, words, scales, zeros, perm, ends, k, ...)                  -> by x [s, k]
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlab.algebra.experts import each_expert
from qlab.algebra.grid import fit, minmax
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, parse_spec
from qlab.lowering.weights.cpu import dense_product
from qlab.lowering.weights.exact import spec_of, text_of
from qlab.lowering.weights.nibbles import GROUPS
from qlab.lowering.weights.setting import Setting, refuse_another_dtype

Part = Tensor | None


class Nibbles(NamedTuple):
    """W [n, k], or [e, n, k] of experts, as `qlab_kernels.layout8` packs it.

    words: uint8 [..., n / 64, k / 64, 2048]. scales, zeros: [..., k / group, n], padded, in the
    narrowest dtype that holds both exactly; zeros is None for symmetric codes. perm: int64 [k], the
    input channel of every column of codes, or None. in_scales: of activations whose scale is fixed.
    n, k: without padding. spec: how activations are rounded, as text. dtype: of activations before
    they are rounded, and of results. layout: also says what activations are rounded to.
    """

    words: Tensor
    scales: Tensor
    zeros: Part
    perm: Part
    in_scales: Part
    n: int
    k: int
    group: int
    spec: str
    dtype: torch.dtype
    layout: str


# ---------------------------------------------------------------- what the rows share
def is_nibble(leaf: QTensor) -> bool:
    """Whether a weight has integer codes of at most 4 bits."""
    return isinstance(leaf.spec, Int) and leaf.spec.bits <= 4


def first_capability(numbers: str) -> tuple[int, int]:
    """The first compute capability whose kernel multiplies int4 by such numbers."""
    from qlab_kernels.layout8 import FIRST

    return FIRST[numbers]


def refusal(leaf: QTensor, inputs: QuantizeInput, device: torch.device, numbers: str) -> str | None:
    """Why the kernel cannot multiply a weight by activations rounded to int8 or e4m3, or None."""
    from qlab_kernels.capability import KernelError
    from qlab_kernels.families.int4_a8 import CHANNELS
    from qlab_kernels.layout8 import layout_of

    (n, k), (rows, cols) = leaf.shape[-2:], leaf.spec.tile.sizes(leaf.shape)
    if inputs.spec.tile.cols is not None or inputs.spec.tile.rows not in (None, 1):
        return f"inputs in {inputs.spec} have several scales in a token; int4 x {numbers} reads one"
    if parse_spec(str(inputs.spec)) != inputs.spec:
        return f"inputs in {inputs.spec!r} have no name"
    if not inputs.spec.symmetric:
        return f"inputs in {inputs.spec} have zero points; int4 x {numbers} reads none"
    if n % rows or k % cols:
        return f"blocks of {rows}x{cols} do not divide a weight {tuple(leaf.shape)}"
    if cols < k and cols % GROUPS[-1]:
        return f"groups of {cols} are no multiple of {GROUPS[-1]} channels"
    if cols == k and k >= CHANNELS:
        return f"sums over {k} channels do not fit in 32 bits"
    try:
        layout_of(torch.cuda.get_device_capability(device), numbers)
    except KernelError as error:
        return str(error)
    return None


def pack(leaf: QTensor, inputs: QuantizeInput, setting: Setting, numbers: str) -> Nibbles:
    """A weight as the device's kernel reads it; nothing is rounded."""
    from qlab_kernels.layout8 import layout_of, pack8

    device = setting.device
    rows, cols = leaf.spec.tile.sizes(leaf.shape)
    k = leaf.shape[-1]
    # Groups wider than the kernels' are cut into some that repeat a scale.
    group = k if cols == k else next(g for g in GROUPS if cols % g == 0)
    scales, zeros = (
        None
        if part is None
        else part.float().repeat_interleave(rows, -2).repeat_interleave(cols // group, -1)
        for part in (leaf.scales, leaf.zeros)
    )
    assert scales is not None
    layout = layout_of(torch.cuda.get_device_capability(device), numbers)
    dtype = _narrowest(scales, zeros)
    packed = pack8(leaf.codes, scales, zeros, group, layout, dtype)

    def placed(part: Part) -> Part:
        return None if part is None else part.to(device)

    return Nibbles(
        words=packed.words.to(device),
        scales=packed.scales.to(device),
        zeros=placed(packed.zeros),
        perm=placed(leaf.perm),
        in_scales=placed(inputs.scales),
        n=packed.n,
        k=k,
        group=packed.group,
        spec=text_of(inputs.spec),
        dtype=setting.dtype,
        layout=layout,
    )


def _narrowest(scales: Tensor, zeros: Part) -> torch.dtype:
    """The narrowest dtype that holds scales and zeros exactly."""
    parts = [scales] if zeros is None else [scales, zeros]
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(part.to(dtype).float(), part) for part in parts):
            return dtype
    return torch.float32


def mm(x_mk: Tensor, weight: Nibbles, dense: Part, bias: Part) -> Tensor:
    """y [m, n] = x @ W.T + b, x rounded."""
    refuse_another_dtype(x_mk, weight.dtype)
    words, scales, zeros, perm, in_scales, n, _, group, spec, _, layout = weight
    return int4_a8_mm(x_mk, words, scales, zeros, perm, in_scales, bias, n, group, spec, layout)


def grouped_mm(x_sk: Tensor, weight: Nibbles, dense: Part, ends: Tensor) -> Tensor:
    """y [s, n]: rows ends[e-1]:ends[e] of x @ W_e.T, x rounded."""
    refuse_another_dtype(x_sk, weight.dtype)
    words, scales, zeros, perm, in_scales, n, _, group, spec, _, layout = weight
    return int4_a8_grouped_mm(
        x_sk, words, scales, zeros, perm, in_scales, ends, n, group, spec, layout
    )


def columns(weight: Nibbles) -> Tensor:
    """W [..., n, k] with its columns in the order of the codes."""
    from qlab_kernels.reference_a8 import dequantize

    return dequantize(launched(weight), weight.dtype)


def launched(weight: Nibbles) -> Any:
    """The weight as qlab_kernels launches it."""
    return _launched(*weight[:3], *weight[5:8], weight.layout)


def _launched(
    words: Tensor, scales: Tensor, zeros: Part, n: int, k: int, group: int, layout: str
) -> Any:
    """The same of its parts."""
    from qlab_kernels.layout import Packed

    return Packed(words, scales, zeros, n, k, group, layout)


def codes(x: Tensor, perm: Part, in_scales: Part, spec: str, packed: Any) -> Any:
    """x in codes, as QuantizeInput rounds it, its channels in the order of the weight's."""
    from qlab_kernels.device8 import Limits
    from qlab_kernels.round8 import round8

    grid = spec_of(spec)
    lowest, highest = (grid.qmin, grid.qmax) if isinstance(grid, Int) else (-grid.max, grid.max)
    if in_scales is None and grid.tile.rows is None:  # one scale of all tokens
        in_scales = fit(minmax, x.float(), grid)[0]
    t = None if in_scales is None else in_scales.float()
    return round8(x, t, perm, Limits(lowest, highest, grid.reach), packed)


def _config(op: str, x: Tensor, packed: Any, experts: int) -> Any:
    """What the cache holds for the product."""
    from qlab_kernels import Problem, cache

    problem = Problem(
        op=op,
        cc=torch.cuda.get_device_capability(x.device),
        device=torch.cuda.get_device_name(x.device),
        dtype=str(x.dtype).removeprefix("torch."),
        group=packed.group,
        zeros=packed.zeros is not None,
        n=packed.n,
        k=packed.k,
        m=len(x),
        experts=experts,
    )
    return cache.lookup(problem).config


# ---------------------------------------------------------------- operators
@torch.library.custom_op("qlab::int4_a8_mm", mutates_args=())
def int4_a8_mm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Part,
    perm: Part,
    in_scales: Part,
    bias: Part,
    n: int,
    group: int,
    spec: str,
    layout: str,
) -> Tensor:
    """y [m, n] in x's dtype. No synchronization, no global state."""
    from qlab_kernels.int4_a8 import int4_a8_mm as launch
    from qlab_kernels.layout8 import numbers_of

    if not len(x):
        return x.new_empty(0, n)
    packed = _launched(words, scales, zeros, n, x.shape[1], group, layout)
    config = _config(f"int4_{numbers_of(layout)}_mm", x, packed, 1)
    return launch(codes(x, perm, in_scales, spec, packed), packed, bias, x.dtype, config)


@int4_a8_mm.register_fake
def _(x, words, scales, zeros, perm, in_scales, bias, n, group, spec, layout):
    return x.new_empty(x.shape[0], n)


@torch.library.custom_op("qlab::int4_a8_grouped_mm", mutates_args=())
def int4_a8_grouped_mm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Part,
    perm: Part,
    in_scales: Part,
    ends: Tensor,
    n: int,
    group: int,
    spec: str,
    layout: str,
) -> Tensor:
    """y [s, n] in x's dtype by one kernel, which reads `ends` on the device. All rows are rounded
    together, as one scale may be of all of them."""
    from qlab_kernels.int4_a8_grouped import int4_a8_grouped_mm as launch
    from qlab_kernels.layout8 import numbers_of

    if not len(x):
        return x.new_empty(0, n)
    packed = _launched(words, scales, zeros, n, x.shape[1], group, layout)
    config = _config(f"int4_{numbers_of(layout)}_grouped_mm", x, packed, len(words))
    p = codes(x, perm, in_scales, spec, packed)
    return launch(p, packed, ends.to(torch.int32), x.dtype, config)


@int4_a8_grouped_mm.register_fake
def _(x, words, scales, zeros, perm, in_scales, ends, n, group, spec, layout):
    return x.new_empty(x.shape[0], n)


# cudagraph_unsafe: the host waits for `ends`
@torch.library.custom_op("qlab::int4_a8_back", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def int4_a8_back(
    g: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Part,
    perm: Part,
    ends: Part,
    k: int,
    group: int,
    layout: str,
) -> Tensor:
    """The gradient by x [s, k], from the gradient g [s, n] by the result: that of unrounded x.

    ends: those of experts, or None of one weight."""
    from qlab_kernels.reference_a8 import dequantize

    if ends is None:
        ends = torch.tensor([len(g)], dtype=torch.int64)
        words, scales = words[None], scales[None]
        zeros = None if zeros is None else zeros[None]

    def by_x(e: int, g_mn: Tensor) -> Tensor:
        if not len(g_mn):
            return g_mn.new_empty(0, k)
        z = None if zeros is None else zeros[e]
        one = _launched(words[e], scales[e], z, g.shape[1], k, group, layout)
        W_nk = dequantize(one, torch.float32)
        return dense_product(g_mn, (W_nk if perm is None else W_nk[:, perm.argsort()]).mT)

    return each_expert(g, ends, by_x)


@int4_a8_back.register_fake
def _(g, words, scales, zeros, perm, ends, k, group, layout):
    return g.new_empty(g.shape[0], k)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, words, scales, zeros, perm, _, _, _, group, _, layout = inputs
    ctx.save_for_backward(words, scales, zeros, perm)
    ctx.form = x.shape[1], group, layout


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return int4_a8_back(g, *ctx.saved_tensors, None, *ctx.form), *[None] * 10


def _save_grouped(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, words, scales, zeros, perm, _, ends, _, group, _, layout = inputs
    ctx.save_for_backward(words, scales, zeros, perm, ends)
    ctx.form = x.shape[1], group, layout


def _grouped_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return int4_a8_back(g, *ctx.saved_tensors, *ctx.form), *[None] * 10


int4_a8_mm.register_autograd(_gradients, setup_context=_save)
int4_a8_grouped_mm.register_autograd(_grouped_gradients, setup_context=_save_grouped)
