"""The cases of int4 weights and activations of 8 bits: assembly, every tile of the products,
experts.

Bits are compared where the result is decided: small integers as codes of x and powers of two as
scales keep every sum exact in fp32, in any order; one rounding gives y. Random codes and scales
come behind, within a bound of rounding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlab_kernels import reference_a8 as reference
from qlab_kernels.acceptance import Case, Form
from qlab_kernels.capability import Capability, KernelError
from qlab_kernels.config import BUCKETS, Config, Problem, candidates, heuristic
from qlab_kernels.device8 import CODES, prepared
from qlab_kernels.families.int4_a8 import NUMBERS
from qlab_kernels.int4_a8 import int4_a8_mm
from qlab_kernels.int4_a8_grouped import int4_a8_grouped_mm
from qlab_kernels.layout import Packed
from qlab_kernels.layout8 import UNIT, layout_of, pack8
from qlab_kernels.tile8 import codes, in_order

ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
# Tensor cores of 9.0 add products of e4m3 in about 14 bits (DeepSeek-V3, arXiv 2412.19437, 3.3.2).
FP8_SUMS = 2.0**-12
FORMS = ((128, False), (128, True), (64, False), (32, True), (10_000, True), (10_000, False))
EVEN, RAGGED = (256, 1280), (456, 1256)  # (n, k)
ENDS = (0, 3, 50, 50, 51, 200)  # of the experts' rows: some have none
TIMED = tuple(Form(op=op, dtype="bfloat16", group=128) for op in ("int4_int8_mm", "int4_fp8_mm"))


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product; `config` holds the arguments of Config. layout: also says whether the codes of x
    are int8 or e4m3. scales: the dtype of the weight's. ends: of the experts' rows, for the grouped
    product. fixed: one scale for all of x. exact: sums without rounding errors."""

    m: int
    n: int
    k: int
    group: int
    zeros: bool
    layout: str
    dtype: str
    config: tuple
    scales: str = "bfloat16"
    ends: tuple[int, ...] = ()
    seed: int = 0
    fixed: bool = False
    bias: bool = False
    exact: bool = False

    @property
    def numbers(self) -> str:
        """int8 or fp8."""
        return self.layout.partition("-")[2]


@dataclass(frozen=True)
class Operands:
    """Codes p [m, k] of x and their scales t, packed weights, a bias or None."""

    p: Tensor
    t: Tensor
    packed: Packed
    bias: Tensor | None


def operands(product: Product, device: torch.device) -> Operands:
    """Random operands; weights have a leading dimension for experts."""
    rng = torch.Generator().manual_seed(product.seed)
    lead = (len(product.ends),) if product.ends else ()
    shape, rows = (product.m, product.k), (*lead, product.n, -(-product.k // product.group))
    q = torch.randint(-8, 8, (*lead, product.n, product.k), generator=rng, dtype=torch.int8)
    scales = torch.rand(*rows, generator=rng, dtype=torch.float32) * 0.1 + 0.01
    zeros = torch.randint(-8, 8, rows, generator=rng) if product.zeros else None
    tokens = (1, 1) if product.fixed else (product.m, 1)
    t = torch.rand(*tokens, generator=rng, dtype=torch.float32) + 0.01
    if product.exact:
        scales = 2.0 ** -torch.randint(3, 7, rows, generator=rng).float()
        t = 2.0 ** -torch.randint(1, 4, tokens, generator=rng).float()
        p = torch.randint(-2, 3, shape, generator=rng).float()
    elif product.numbers == "int8":
        p = torch.randint(-128, 128, shape, generator=rng).float()
    else:
        p = torch.randn(*shape, generator=rng, dtype=torch.float32) * 100
    p = p.to(CODES[product.numbers])
    bias = None
    if product.bias:
        bias = torch.randint(-9, 9, (product.n,), generator=rng).to(getattr(torch, product.dtype))
    packed = pack8(
        q.to(device),
        scales.to(device),
        None if zeros is None else zeros.to(device),
        product.group,
        product.layout,
        getattr(torch, product.scales),
    )
    return Operands(p.to(device), t.to(device), packed, None if bias is None else bias.to(device))


def excess(product: Product, device: torch.device) -> float:
    """max |y - y64| over what is allowed: rounding y, and sums over groups in fp32; 0 or infinity
    for exact operands."""
    own = operands(product, device)
    p, t, packed, bias = own.p, own.t, own.packed, own.bias
    config, dtype = Config(*product.config), getattr(torch, product.dtype)
    if product.ends:
        ends = torch.tensor(product.ends, dtype=torch.int32, device=device)
        y = int4_a8_grouped_mm(prepared(p, t, packed), packed, ends, dtype, config)
        expected = reference.int4_a8_grouped_mm(p, t, packed, ends)
    else:
        y = int4_a8_mm(prepared(p, t, packed), packed, bias, dtype, config)
        expected = reference.int4_a8_mm(p, t, packed, bias)
    assert y.dtype == dtype and y.shape == expected.shape
    if product.exact:
        return _equal(y, expected.to(dtype))
    allowed = 1.01 * ROUNDING[product.dtype] * expected.abs()
    allowed += _sums(product, device) * _magnitude(own) + 1e-30
    return float(((y.double() - expected).abs() / allowed).max()) if y.numel() else 0.0


def _magnitude(own: Operands) -> Tensor:
    """t |p| @ (|q| + |z|) |s| + |b| [m, n], of all experts the largest."""
    packed = own.packed
    sizes = reference.dequantize(replace(packed, zeros=None), torch.float64).abs()
    if packed.zeros is not None:
        negative = replace(packed, zeros=packed.zeros.abs(), words=_of_zeros(packed))
        sizes = sizes + reference.dequantize(negative, torch.float64).abs()
    sizes = sizes.amax(0) if sizes.dim() == 3 else sizes
    y = own.t.double() * (own.p.double().abs() @ sizes.mT)
    return y if own.bias is None else y + own.bias.double().abs()


def _of_zeros(packed: Packed) -> Tensor:
    """The words of a weight whose codes are all 0."""
    return torch.full_like(packed.words, 0x88 if packed.layout.endswith("int8") else 0)


def _sums(product: Product, device: torch.device) -> float:
    """The relative error of sums: of groups, of two terms in each, and of a scale and a bias; of
    e4m3 also inside of a group."""
    terms = -(-product.k // min(product.group, 64)) + 8
    if product.numbers == "int8":
        return terms * 2.0**-24
    return (product.k + terms) * 2.0**-24 + (FP8_SUMS if device.type == "cuda" else 0.0)


def _equal(a: Tensor, b: Tensor) -> float:
    return 0.0 if torch.equal(a, b) else math.inf


# ---------------------------------------------------------------- assembly
@triton.jit
def decode_kernel(
    words_ptr, out_ptr, NUMBERS: tl.constexpr, LAYOUT: tl.constexpr, SEQUENCE: tl.constexpr
):
    """Packed words to UNIT times dense codes, one atom for each program."""
    atom = tl.program_id(0)
    words = tl.load(words_ptr + atom * 2048 + tl.arange(0, 2048)).reshape(1, 2048)
    w = in_order(codes(words, NUMBERS, SEQUENCE), 1, 1, LAYOUT)
    at = out_ptr + atom * 4096 + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(at, w.to(tl.float32))


def decoded(layout: str, sequence: str, device: torch.device) -> float:
    """0 where a sequence decodes every value in every position of a word to itself."""
    order, _, numbers = layout.partition("-")
    values = (torch.arange(4096) // 3 + torch.arange(16)[:, None]) % 16 - 8
    q = values.view(16, 64, 64).to(torch.int8)
    ones = torch.ones(16, 64, 1, dtype=torch.float32)
    words = pack8(q, ones, None, 64, layout, torch.float32).words.to(device)
    out = torch.empty(16, 64, 64, dtype=torch.float32, device=device)
    decode_kernel[(16,)](words, out, NUMBERS=numbers, LAYOUT=order, SEQUENCE=sequence)
    return _equal(out.cpu() / UNIT[numbers], q.float())


# ---------------------------------------------------------------- the cases of a capability
def cases(cc: Capability) -> list[Case]:
    """Of int8 and e4m3 where the capability has them: assembly bit for bit, what runs by default
    for every form of weights, experts, every other tile."""
    listed, products, seldom = [], [], []
    for op, numbers in NUMBERS.items():
        try:
            layout = layout_of(cc, numbers)
        except KernelError:
            continue
        if op.endswith("_grouped_mm"):
            listed += [_experts(cc, op, layout, form) for form in FORMS[:2]]
            continue
        for sequence in ("asm", "plain"):
            name = f"{'assembly' if sequence == 'asm' else 'decoding'} {layout}"
            how = partial(decoded, layout, sequence)
            listed.append(Case(name=name, excess=how, assembly=sequence == "asm"))
        first = [(form, c) for form in FORMS for c in _defaults(cc, op, form)]
        listed += [_products(op, layout, *one, RAGGED) for one in first]
        products += [_products(op, layout, *one, EVEN) for one in first]
        others = [(FORMS[0], c) for c in _tiles(cc, op)]
        rest = [_products(op, layout, *one, EVEN) for one in others if one not in first]
        seldom += [replace(case, tuned=True) for case in rest]
    return sorted(listed, key=lambda case: not case.assembly) + products + seldom


def problem(
    op: str, cc: Capability, form: tuple[int, bool], size: tuple[int, int], m: int, experts: int = 1
) -> Problem:
    """A product with results in bfloat16."""
    return Problem(op, cc, "", "bfloat16", *form, *size, m, experts)


def _defaults(cc: Capability, op: str, form: tuple[int, bool]) -> list[Config]:
    """What the heuristic takes for few, some and many tokens."""
    found = [heuristic(problem(op, cc, form, RAGGED, m)) for m in (1, 32, 256)]
    return list(dict.fromkeys(found))


def _tiles(cc: Capability, op: str) -> list[Config]:
    """Every tile of the menu, with the split it comes with first: a split is no other kernel."""
    tiles: dict[Config, Config] = {}
    for m in BUCKETS:
        for c in candidates(problem(op, cc, FORMS[0], EVEN, m)):
            tiles.setdefault(replace(c, kind="gemm", split=1), c)
    return list(tiles.values())


def _products(
    op: str, layout: str, form: tuple[int, bool], c: Config, size: tuple[int, int]
) -> Case:
    group, zeros = form
    one = Product(
        m=c.bm + 3,
        n=size[0],
        k=size[1],
        group=group,
        zeros=zeros,
        layout=layout,
        dtype="bfloat16",
        config=_arguments(c),
        bias=True,
        exact=True,
    )
    runs = [replace(one, m=1, fixed=True), one, replace(one, exact=False, dtype="float32")]
    tile = f"{c.kind} {c.bm}x{c.bn}x{c.bk} split {c.split} warps {c.warps} stages {c.stages}"
    return Case(
        name=f"{op} {tile} {_form(form)} {size[0]}x{size[1]}",
        excess=partial(_largest, runs),
        # bfloat16 and float32 are two kernels, and so is a fixed scale
        kernels=4 if c.split > 1 else 3,
    )


def _experts(cc: Capability, op: str, layout: str, form: tuple[int, bool]) -> Case:
    group, zeros = form
    c = heuristic(problem(op, cc, form, RAGGED, ENDS[-1], len(ENDS)))
    one = Product(
        m=ENDS[-1],
        n=RAGGED[0],
        k=RAGGED[1],
        group=group,
        zeros=zeros,
        layout=layout,
        dtype="bfloat16",
        config=_arguments(c),
        ends=ENDS,
    )
    runs = [replace(one, exact=True), one]
    return Case(name=f"{op} {_form(form)}", excess=partial(_largest, runs))


def _largest(runs: list[Product], device: torch.device) -> float:
    return max(excess(product, device) for product in runs)


def _form(form: tuple[int, bool]) -> str:
    group, zeros = form
    return f"{'row' if group > max(EVEN) else f'g{group}'}{' zeros' if zeros else ''}"


def _arguments(c: Config) -> tuple:
    return (c.kind, c.bm, c.bn, c.bk, c.split, c.warps, c.stages, c.scale_on)


# ---------------------------------------------------------------- products to time
def timed(p: Problem, device: torch.device, seed: int) -> Callable[[Config], Tensor]:
    """config -> y of a random linear [n, k], for activations that are codes already."""
    one = Product(
        m=p.m,
        n=p.n,
        k=p.k,
        group=p.group,
        zeros=p.zeros,
        layout=layout_of(p.cc, NUMBERS[p.op]),  # type: ignore[arg-type]
        dtype=p.dtype,
        config=(),
        seed=seed,
    )
    own = operands(one, device)
    x, dtype = prepared(own.p, own.t, own.packed), getattr(torch, p.dtype)
    return partial(int4_a8_mm, x, own.packed, None, dtype)
