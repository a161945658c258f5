"""The cases of the int4 kernels: assembly, dequantization, every tile of the products, experts.

Bits are compared where the result is decided: integers as activations and powers of two as scales
keep every sum exact in fp32, in any order, and larger than 16-bit floats hold; one rounding gives
y. Random activations and scales come behind, within a bound of rounding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlab_kernels import reference
from qlab_kernels.acceptance import Case, Form
from qlab_kernels.capability import Capability, target
from qlab_kernels.config import BUCKETS, Config, Problem, candidates, heuristic
from qlab_kernels.dequantize import dequantize
from qlab_kernels.grouped import int4_grouped_mm
from qlab_kernels.int4_mm import int4_mm
from qlab_kernels.layout import Packed, pack
from qlab_kernels.tile import codes, in_order

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative rounding error
# (group, zeros); a group past k is one scale per row
FORMS = ((128, False), (128, True), (64, False), (64, True), (32, False), (10_000, True))
MAIN = FORMS[0]
EVEN, RAGGED = (256, 1280), (456, 1256)  # (n, k)
ENDS = (0, 3, 50, 50, 51, 200)  # of the experts' rows: some have none
TIMED = tuple(Form(op="int4_mm", dtype=dtype, group=128) for dtype in ("bfloat16", "float16"))


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product; `config` holds the arguments of Config. ends: of the experts' rows, for the
    grouped product. exact: integers, whose sums have no rounding errors."""

    m: int
    n: int
    k: int
    group: int
    zeros: bool
    layout: str
    dtype: str
    config: tuple
    ends: tuple[int, ...] = ()
    seed: int = 0
    exact: bool = False


def operands(product: Product, device: torch.device) -> tuple[Tensor, Packed]:
    """x [m, k] in the product's dtype and packed weights, with a leading dimension for experts."""
    rng = torch.Generator().manual_seed(product.seed)
    lead = (len(product.ends),) if product.ends else ()
    dtype = getattr(torch, product.dtype)
    q = torch.randint(-8, 8, (*lead, product.n, product.k), generator=rng, dtype=torch.int8)
    rows = (*lead, product.n, -(-product.k // product.group))
    scales = torch.rand(*rows, generator=rng, dtype=torch.float32) * 0.1 + 0.01
    zeros = torch.randint(-8, 8, rows, generator=rng) if product.zeros else None
    x = torch.randn(product.m, product.k, generator=rng, dtype=torch.float32)
    if product.exact:
        scales = 2.0 ** -torch.randint(3, 7, rows, generator=rng).float()
        x = torch.randint(-8, 9, x.shape, generator=rng).float()
    x, q, scales = x.to(device, dtype), q.to(device), scales.to(device)
    moved = None if zeros is None else zeros.to(device)
    return x, pack(q, scales, moved, product.group, product.layout, dtype)


def excess(product: Product, device: torch.device) -> float:
    """max |y - y64| over what is allowed: rounding y, fp32 sums, and 16-bit weights if the config
    scales those; 0 or infinity for exact operands."""
    x, packed = operands(product, device)
    config = Config(*product.config)
    W = reference.dequantize(packed, torch.float64)
    if product.ends:
        ends = torch.tensor(product.ends, dtype=torch.int32, device=device)
        y = int4_grouped_mm(x, packed, ends, config)
        expected = reference.int4_grouped_mm(x, packed, ends)
        magnitude = x.double().abs() @ W.abs().amax(0).T
    else:
        y = int4_mm(x, packed, config)
        expected = reference.int4_mm(x, packed)
        magnitude = x.double().abs() @ W.abs().T
    assert y.dtype == x.dtype and y.shape == expected.shape
    if product.exact:
        return _equal(y, expected.to(y.dtype))
    unit = UNIT[product.dtype]
    rounded_weights = config.kind == "dequant" or config.scale_on == "weight" or product.group < 64
    allowed = 1.01 * unit * expected.abs() + (unit if rounded_weights else 3e-6) * magnitude + 1e-7
    return float(((y.double() - expected).abs() / allowed).max()) if y.numel() else 0.0


def _equal(a: Tensor, b: Tensor) -> float:
    return 0.0 if torch.equal(a, b) else math.inf


def dequantized(product: Product, device: torch.device) -> float:
    """0 where the kernel and the reference agree bit for bit in every output dtype."""
    _, packed = operands(product, device)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return max(_equal(dequantize(packed, d), reference.dequantize(packed, d)) for d in dtypes)


# ---------------------------------------------------------------- assembly
@triton.jit
def decode_kernel(
    words_ptr, out_ptr, LAYOUT: tl.constexpr, SEQUENCE: tl.constexpr, COMPUTE: tl.constexpr
):
    """Packed words to dense codes by a named sequence, one atom for each program."""
    atom = tl.program_id(0)
    words = tl.load(words_ptr + atom * 2048 + tl.arange(0, 2048)).reshape(1, 2048)
    w = in_order(codes(words, SEQUENCE, COMPUTE), 1, 1, LAYOUT)
    tl.store(out_ptr + atom * 4096 + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :], w)


def decode(words: Tensor, layout: str, sequence: str, dtype: torch.dtype) -> Tensor:
    """Atoms uint8 [a, 1, 1, 2048] -> codes -8..7 in `dtype` [a, 64, 64]."""
    out = torch.empty(words.shape[0], 64, 64, dtype=dtype, device=words.device)
    compute = tl.float16 if dtype == torch.float16 else tl.bfloat16
    decode_kernel[(words.shape[0],)](words, out, LAYOUT=layout, SEQUENCE=sequence, COMPUTE=compute)
    return out


def every_value() -> Tensor:
    """int8 [16, 64, 64]: all 16 values in all 8 positions of a word, in the order of any layout."""
    values = (torch.arange(4096) // 3 + torch.arange(16)[:, None]) % 16 - 8
    return values.view(16, 64, 64).to(torch.int8)


def decoded(layout: str, sequence: str, dtype: torch.dtype, device: torch.device) -> float:
    """0 where a sequence decodes every value in every position to itself."""
    values = every_value()
    ones = torch.ones(16, 64, 1, dtype=torch.float32)
    words = pack(values, ones, None, 64, layout, dtype).words.to(device)
    return _equal(decode(words, layout, sequence, dtype).cpu(), values.to(dtype))


# ---------------------------------------------------------------- the cases of a capability
def cases(cc: Capability) -> list[Case]:
    """Assembly bit for bit; dequantization; the configurations that run by default for every form
    of weights; experts; every other tile."""
    row = target(cc)
    if row.path == "dequantize":
        return []
    dtypes = [str(dtype).removeprefix("torch.") for dtype in row.dtypes]
    listed = [*_assembly(cc, dtypes), *_dequantizations(row.layout, dtypes)]
    first = [(d, form, c) for d in dtypes for form in FORMS for c in _defaults(cc, d, form)]
    others = [(d, MAIN, c) for d in dtypes for c in _tiles(cc, d)]
    listed += [_products(row.layout, *one, size) for size in (EVEN, RAGGED) for one in first]
    if row.path == "fused":
        listed += [_experts(cc, row.layout, d, form) for d in dtypes for form in FORMS[:2]]
    seldom = [_products(row.layout, *one, EVEN) for one in others if one not in first]
    return listed + [replace(case, tuned=True) for case in seldom]


def _assembly(cc: Capability, dtypes: list[str]) -> list[Case]:
    row = target(cc)
    if row.path != "fused":
        return []
    # fma.rn.bf16x2 runs wherever sub.bf16x2 does; fp16 has one sequence for all
    sequences = {"float16": [row.sequence], "bfloat16": list(dict.fromkeys((row.sequence, "fma")))}
    return [
        Case(
            name=f"assembly {sequence} {dtype} {layout}",
            excess=partial(decoded, layout, sequence, getattr(torch, dtype)),
            assembly=True,
        )
        for layout in dict.fromkeys((row.layout, "wgmma", "mma2"))
        for dtype in dtypes
        for sequence in sequences[dtype]
    ]


def _dequantizations(layout: str, dtypes: list[str]) -> list[Case]:
    # three dtypes of the result are three kernels
    return [
        Case(
            name=f"dequantize {dtype} {_form(group, zeros)}{' experts' if ends else ''}",
            excess=partial(
                dequantized,
                Product(
                    m=2,
                    n=200,
                    k=600,
                    group=group,
                    zeros=zeros,
                    layout=layout,
                    dtype=dtype,
                    config=("dequant",),
                    ends=ends,
                ),
            ),
            kernels=3,
        )
        for dtype in dtypes
        for group, zeros in FORMS
        for ends in ((), (1, 2, 2))
    ]


def _form(group: int, zeros: bool) -> str:
    return f"{'row' if group > max(EVEN) else f'g{group}'}{' zeros' if zeros else ''}"


def _problem(cc: Capability, dtype: str, form: tuple[int, bool], m: int) -> Problem:
    return Problem("int4_mm", cc, "", dtype, *form, *EVEN, m)


def _own(c: Config) -> bool:
    """Whether a kernel of this package multiplies."""
    return c.kind != "dequant"


def _defaults(cc: Capability, dtype: str, form: tuple[int, bool]) -> list[Config]:
    """What the heuristic takes for few, some and many tokens."""
    found = [heuristic(_problem(cc, dtype, form, m)) for m in (1, 4, 16, 64, 256)]
    return [c for c in dict.fromkeys(found) if _own(c)]


def _tiles(cc: Capability, dtype: str) -> list[Config]:
    """Every tile of the menu, with the split it comes with first: a split is no other kernel."""
    tiles: dict[Config, Config] = {}
    for m in BUCKETS:
        for c in filter(_own, candidates(_problem(cc, dtype, MAIN, m))):
            tiles.setdefault(replace(c, kind="gemm", split=1), c)
    return list(tiles.values())


def _products(
    layout: str, dtype: str, form: tuple[int, bool], c: Config, size: tuple[int, int]
) -> Case:
    group, zeros = form
    n, k = size
    config = (c.kind, c.bm, c.bn, c.bk, c.split, c.warps, c.stages, c.scale_on)
    tokens = sorted({1, c.bm - c.bm // 4}) if c.kind == "fma" else [1, c.bm - 3, 2 * c.bm + 1]
    runs = [
        Product(
            m=m,
            n=n,
            k=k,
            group=group,
            zeros=zeros,
            layout=layout,
            dtype=dtype,
            config=config,
            exact=exact,
        )
        for m, exact in [*((m, True) for m in tokens), (tokens[-1], False)]
    ]
    words = (c.kind, f"{c.bm}x{c.bn}x{c.bk}", f"split {c.split}", f"warps {c.warps}")
    scale = f"stages {c.stages} scale on {c.scale_on}"
    return Case(
        name=f"{' '.join(words)} {scale} {dtype} {_form(group, zeros)} {n}x{k}",
        excess=partial(_largest, runs),
        kernels=2 if c.split > 1 else 1,
    )


def _largest(runs: list[Product], device: torch.device) -> float:
    return max(excess(product, device) for product in runs)


def _experts(cc: Capability, layout: str, dtype: str, form: tuple[int, bool]) -> Case:
    group, zeros = form
    p = Problem("int4_grouped_mm", cc, "", dtype, group, zeros, *EVEN, ENDS[-1], len(ENDS))
    c = heuristic(p)
    one = Product(
        m=ENDS[-1],
        n=p.n,
        k=p.k,
        group=group,
        zeros=zeros,
        layout=layout,
        dtype=dtype,
        config=(c.kind, c.bm, c.bn, c.bk, c.split, c.warps, c.stages, c.scale_on),
        ends=ENDS,
    )
    return Case(
        name=f"experts {dtype} {_form(group, zeros)}",
        excess=partial(_largest, [replace(one, exact=True), one]),
    )


# ---------------------------------------------------------------- products to time
def timed(p: Problem, device: torch.device, seed: int) -> Callable[[Config], Tensor]:
    """config -> y of a random linear [n, k]."""
    rng = torch.Generator(device).manual_seed(seed)
    q = torch.randint(-8, 8, (p.n, p.k), generator=rng, dtype=torch.int8, device=device)
    rows = (p.n, -(-p.k // p.group))
    scales = torch.rand(rows, generator=rng, dtype=torch.float32, device=device) * 0.01
    zeros = torch.randint(-8, 8, rows, generator=rng, device=device) if p.zeros else None
    dtype = getattr(torch, p.dtype)
    packed = pack(q, scales, zeros, p.group, target(p.cc).layout, dtype)  # type: ignore[arg-type]
    x = torch.randn(p.m, p.k, generator=rng, dtype=torch.float32, device=device).to(dtype)
    return partial(int4_mm, x, packed)
