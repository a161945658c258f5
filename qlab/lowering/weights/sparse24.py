"""Integer weights with two zeros in every four neighbours (2:4) beside integer activations, on GPUs
that skip them: cuSPARSELt's product, which torch's semi-structured tensors have.

    x_mk = (p_mk - y_m) t_m,  W_nk = q_nk s_n:   x @ W.T = t_m s_n [sum_k p q - y_m sum_k q]

Codes that are kept and the places of each lie in one tensor, three quarters of the codes' size.
Sums are int32, as those of `int8_int8`, and exact.

    qlab::sparse24_mm(x, words, scales, sums, perm, in_scales, in_zeros, k, spec)  -> y [m, n]
    qlab::sparse24_grouped_mm(x, words, ..., ends, k, spec)                        -> y [s, n]
    qlab::sparse24_back(g, words, scales, perm, ends, k)                           -> by x [s, k]
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.algebra.experts import each_expert, rows_of
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import parse_spec
from qlab.lowering.weights.cpu import dense_product
from qlab.lowering.weights.exact import text_of
from qlab.lowering.weights.int8 import has_whole_rows, is_byte, per_row_of
from qlab.lowering.weights.int8_int8 import refuse_another_dtype, rounding
from qlab.lowering.weights.integers import Codes, rounded
from qlab.lowering.weights.setting import Setting

Part = Tensor | None
MULTIPLE = 32  # of the rows and channels of a compressed weight
ROWS = 16  # of activations, a multiple of which is multiplied


class Sparse(NamedTuple):
    """W [n, k], or [e, n, k] for e experts.

    words: the codes as `compressed` gives them, those of experts with a leading axis. scales: fp32
    [..., n]. sums: int32 [..., n], those of the codes of a row, or None where activations have no
    zero points. The rest: as in `int8_int8.Integers`.
    """

    words: Tensor
    scales: Tensor
    sums: Part
    perm: Part
    in_scales: Part
    in_zeros: Part
    k: int
    spec: str
    dtype: torch.dtype
    layout: str


def meant(leaf: QTensor, setting: Setting) -> bool:
    """Whether weight and activations are integers, and the weight has the zeros."""
    if not is_byte(leaf) or rounding(setting) is None:
        return False
    if leaf.zeros is not None or leaf.shape[-1] % 4:
        return False
    return bool(((leaf.codes != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all())


def takes(leaf: QTensor, setting: Setting) -> str | None:
    """Why all codes are multiplied instead, or None."""
    inputs = rounding(setting)
    assert inputs is not None
    if parse_spec(str(inputs.spec)) != inputs.spec or inputs.spec.tile.cols is not None:
        return f"inputs in {inputs.spec} have several scales in a token"
    if not has_whole_rows(leaf):
        return f"{leaf.spec} has several scales in a row"
    if setting.device.type == "cpu":
        return "no CPU skips the zeros of a weight"
    capability = torch.cuda.get_device_capability(setting.device)
    if capability < (8, 0):
        return "this GPU skips no zeros; capability 8.0 is the first"
    return tried(setting.device)


@cache
def tried(device: torch.device) -> str | None:
    """What is wrong with a small product on a device, or None: not every build of torch has
    cuSPARSELt."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randint(-8, 8, (64, 64), generator=generator).to(torch.int8) for _ in range(2))
    q[:, ::2] = 0
    try:
        sums = multiplied(compressed(q.to(device)), p.to(device))[:, :64]
    except RuntimeError as error:
        return f"torch's 2:4 product fails on this GPU ({str(error).splitlines()[0]:.100})"
    is_exact = torch.equal(sums.cpu(), p.int() @ q.int().mT)
    return None if is_exact else "torch's 2:4 product is not exact on this GPU"


def compressed(q_nk: Tensor) -> Tensor:
    """The codes of one weight as the device's product reads them; as they are where it has none."""
    q_nk = F.pad(q_nk, (0, -q_nk.shape[1] % MULTIPLE, 0, -len(q_nk) % MULTIPLE))
    return torch._cslt_compress(q_nk) if q_nk.device.type == "cuda" else q_nk


def multiplied(words: Tensor, p_mk: Tensor) -> Tensor:
    """p @ q.T [m, n'] in int32, of codes p and a compressed q."""
    m = len(p_mk)
    p_mk = F.pad(p_mk, (0, -p_mk.shape[1] % MULTIPLE, 0, -m % ROWS)).contiguous()
    if words.device.type == "cuda":
        return torch._cslt_sparse_mm(words, p_mk.mT, out_dtype=torch.int32).mT[:m]
    return torch._int_mm(p_mk, words.mT)[:m]


def pack(path: str, leaf: QTensor, setting: Setting) -> Sparse:
    """The codes that are not skipped."""
    inputs, device = rounding(setting), setting.device
    assert inputs is not None
    codes = leaf.codes.to(device)
    is_fused = codes.ndim == 3
    sums = None if inputs.spec.symmetric else codes.sum(-1, dtype=torch.int32)
    return Sparse(
        words=torch.stack([compressed(q) for q in codes]) if is_fused else compressed(codes),
        scales=per_row_of(leaf, leaf.scales).float().to(device),
        sums=sums,
        perm=None if leaf.perm is None else leaf.perm.to(device),
        in_scales=None if inputs.scales is None else inputs.scales.to(device),
        in_zeros=None if inputs.zeros is None else inputs.zeros.to(device),
        k=leaf.shape[-1],
        spec=text_of(inputs.spec),
        dtype=setting.dtype,
        layout="int8-2:4",
    )


def dense_sparse(words: Tensor, scales: Tensor, k: int) -> Tensor:
    """q * s [n, k] in fp32 of one weight: its product with the unit matrix."""
    unit = torch.eye(k, dtype=torch.int8, device=words.device)
    q_nk = multiplied(words, unit).mT[: len(scales)]
    return q_nk.float() * scales[:, None]


def columns(weight: Sparse) -> Tensor:
    """W [..., n, k] with its columns in the order of the codes."""
    words, scales = weight.words, weight.scales
    if scales.ndim == 1:
        return dense_sparse(words, scales, weight.k).to(weight.dtype)
    pairs = zip(words, scales, strict=True)
    return torch.stack([dense_sparse(w, s, weight.k) for w, s in pairs]).to(weight.dtype)


def mm(x_mk: Tensor, weight: Sparse, dense: Part, bias: Part) -> Tensor:
    """y [m, n] = x @ W.T + b, x rounded."""
    refuse_another_dtype(x_mk, weight.dtype)
    y = sparse24_mm(x_mk, *weight[:8])
    return y if bias is None else y + bias


def grouped_mm(x_sk: Tensor, weight: Sparse, dense: Part, ends: Tensor) -> Tensor:
    """y [s, n]: rows ends[e-1]:ends[e] of x @ W_e.T, x rounded."""
    refuse_another_dtype(x_sk, weight.dtype)
    return sparse24_grouped_mm(x_sk, *weight[:6], ends, weight.k, weight.spec)


def product(codes: Codes, words: Tensor, scales: Tensor, sums: Part) -> Tensor:
    """y [m, n] in fp32 of codes and one weight."""
    exact = multiplied(words, codes.p)[:, : len(scales)]
    if sums is not None:
        assert codes.zeros is not None
        exact = exact - codes.zeros.int() * sums
    return exact.float().mul_(scales).mul_(codes.scales)


# ---------------------------------------------------------------- operators
@torch.library.custom_op("qlab::sparse24_mm", mutates_args=())
def sparse24_mm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    sums: Part,
    perm: Part,
    in_scales: Part,
    in_zeros: Part,
    k: int,
    spec: str,
) -> Tensor:
    """y [m, n] in x's dtype."""
    if not len(x):
        return x.new_empty(0, len(scales))
    y = product(rounded(x, perm, in_scales, in_zeros, spec), words, scales, sums)
    return y.to(x.dtype).contiguous()


@sparse24_mm.register_fake
def _(x, words, scales, sums, perm, in_scales, in_zeros, k, spec):
    return x.new_empty(x.shape[0], scales.shape[0])


# cudagraph_unsafe: the host waits for `ends`
@torch.library.custom_op(
    "qlab::sparse24_grouped_mm", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def sparse24_grouped_mm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    sums: Part,
    perm: Part,
    in_scales: Part,
    in_zeros: Part,
    ends: Tensor,
    k: int,
    spec: str,
) -> Tensor:
    """y [s, n] in x's dtype. All rows are rounded together, as one scale may be of all of them."""
    y = x.new_empty(len(x), scales.shape[1])
    if not len(x):
        return y
    codes = rounded(x, perm, in_scales, in_zeros, spec)
    for e, rows in enumerate(rows_of(ends)):
        if rows.stop > rows.start:
            total = None if sums is None else sums[e]
            y[rows] = product(codes.of(rows), words[e], scales[e], total).to(x.dtype)
    return y


@sparse24_grouped_mm.register_fake
def _(x, words, scales, sums, perm, in_scales, in_zeros, ends, k, spec):
    return x.new_empty(x.shape[0], scales.shape[1])


@torch.library.custom_op("qlab::sparse24_back", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def sparse24_back(
    g: Tensor, words: Tensor, scales: Tensor, perm: Part, ends: Part, k: int
) -> Tensor:
    """The gradient by x [s, k], from the gradient g [s, n] by the result: that of unrounded x.

    ends: those of experts, or None of one weight."""
    lone = ends is None
    ends = torch.tensor([len(g)], dtype=torch.int64) if ends is None else ends
    words, scales = (part[None] if lone else part for part in (words, scales))

    def by_x(e: int, g_mn: Tensor) -> Tensor:
        if not len(g_mn):
            return g_mn.new_empty(0, k)
        W_nk = dense_sparse(words[e], scales[e], k)
        return dense_product(g_mn, (W_nk if perm is None else W_nk[:, perm.argsort()]).mT)

    return each_expert(g, ends, by_x)


@sparse24_back.register_fake
def _(g, words, scales, perm, ends, k):
    return g.new_empty(g.shape[0], k)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, words, scales, _, perm, _, _, *ends, ctx.k, _ = inputs
    ctx.save_for_backward(words, scales, perm, ends[0] if ends else None)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return sparse24_back(g, *ctx.saved_tensors, ctx.k), *[None] * 8


def _grouped_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return sparse24_back(g, *ctx.saved_tensors, ctx.k), *[None] * 9


sparse24_mm.register_autograd(_gradients, setup_context=_save)
sparse24_grouped_mm.register_autograd(_grouped_gradients, setup_context=_save)
