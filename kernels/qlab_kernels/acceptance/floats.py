"""The cases of the kernels for 4- and 8-bit floats: assembly, products of every format, experts.

Bits are compared where the result is decided: integers as activations, codes that are multiples of
one half and scales of few bits keep every sum exact in fp32, in any order; one rounding gives y.
Random activations, codes and scales come behind, within a bound of rounding: products of codes and
scales of bytes are exact in 16 bits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlab_kernels import reference_float_mm as reference
from qlab_kernels.acceptance import Case, Form
from qlab_kernels.capability import Capability, target
from qlab_kernels.config import BUCKETS, Config, Problem, candidates, heuristic
from qlab_kernels.float_layout import DROP, E2M1, PackedFloats, pack, unpack
from qlab_kernels.float_mm import float_grouped_mm, float_mm
from qlab_kernels.float_tile import LIFT, e2m1, e4m3, in_order_of_octets
from qlab_kernels.tile import in_order

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative rounding error
# name -> (bits, group, what scales are); a group past k is one scale per row
FORMATS = {
    "nvfp4": (4, 16, "e4m3"),
    "mxfp4": (4, 32, "e8m0"),
    "mxfp8": (8, 32, "e8m0"),
    "fp8-blocks": (8, 128, "fp32"),
    "fp8-rows": (8, 10_000, "fp32"),
    "fp4-g64": (4, 64, "fp32"),
}
EVEN, RAGGED = (256, 640), (200, 600)  # (n, k)
ENDS = (0, 3, 50, 50, 51, 120)  # of the experts' rows: some have none
# nvfp4, and fp8 in blocks
TIMED = (
    Form(op="float4_mm", dtype="bfloat16", group=16),
    Form(op="float8_mm", dtype="bfloat16", group=128),
)
_E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product; `config` holds the arguments of Config. ends: of the experts' rows, for the
    grouped product. exact: numbers whose sums have no rounding errors."""

    m: int
    n: int
    k: int
    format: str
    layout: str
    dtype: str
    config: tuple
    ends: tuple[int, ...] = ()
    seed: int = 0
    exact: bool = False


def codes_of(bits: int, shape: tuple[int, ...], exact: bool, rng: torch.Generator) -> Tensor:
    """Random codes as e4m3; of 8 bits any number, or integers up to 8."""
    if bits == 4:
        values = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float32).to(_E4M3)
        return values.view(torch.uint8)[torch.randint(0, 16, shape, generator=rng)].view(_E4M3)
    if exact:
        return torch.randint(-8, 9, shape, generator=rng).float().to(_E4M3)
    octets = torch.randint(0, 256, shape, generator=rng)
    return torch.where(octets & 127 == 127, 0, octets).to(torch.uint8).view(_E4M3)


def scales_of(kind: str, shape: tuple[int, ...], exact: bool, rng: torch.Generator) -> Tensor:
    """Random scales; those of e4m3 have signs and zeros."""
    powers = 2.0 ** -torch.randint(3, 7, shape, generator=rng).float()
    if kind == "e8m0" or (exact and kind == "fp32"):
        return powers
    uniform = torch.rand(shape, generator=rng, dtype=torch.float32)
    if kind == "fp32":
        return uniform * 0.1 + 0.01
    mantissas = 1 + torch.randint(0, 8, shape, generator=rng) / 8
    return torch.where(
        uniform < 0.1, 0.0, torch.where(uniform < 0.2, -1.0, 1.0) * mantissas * powers
    )


def operands(product: Product, device: torch.device) -> tuple[Tensor, PackedFloats]:
    """x [m, k] in the product's dtype and packed weights, with a leading dimension for experts."""
    rng = torch.Generator().manual_seed(product.seed)
    bits, group, kind = FORMATS[product.format]
    rows = (*((len(product.ends),) if product.ends else ()), product.n)
    codes = codes_of(bits, (*rows, product.k), product.exact, rng)
    scales = scales_of(kind, (*rows, -(-product.k // group)), product.exact, rng)
    factors = torch.rand(rows, generator=rng, dtype=torch.float32) + 0.5
    x = torch.randn(product.m, product.k, generator=rng, dtype=torch.float32)
    if product.exact:
        factors = torch.full_like(factors, 0.5)
        x = torch.randint(-8, 9, x.shape, generator=rng).float()
    packed = pack(codes, scales, factors, group, bits, product.layout)
    moved: dict[str, Any] = {
        name: part.to(device) for name, part in vars(packed).items() if isinstance(part, Tensor)
    }
    return x.to(device, getattr(torch, product.dtype)), replace(packed, **moved)


def excess(product: Product, device: torch.device) -> float:
    """max |y - y64| over what is allowed: rounding y, and fp32 sums; 0 or infinity for exact
    operands."""
    x, packed = operands(product, device)
    config = Config(*product.config)
    W = reference.dequantize(packed, torch.float64)
    if product.ends:
        ends = torch.tensor(product.ends, dtype=torch.int32, device=device)
        y = float_grouped_mm(x, packed, ends, config)
        expected = reference.float_grouped_mm(x, packed, ends)
        magnitude = x.double().abs() @ W.abs().amax(0).T
    else:
        y = float_mm(x, packed, config)
        expected = reference.float_mm(x, packed)
        magnitude = x.double().abs() @ W.abs().T
    assert y.dtype == x.dtype and y.shape == expected.shape
    if product.exact:
        return _equal(y, expected.to(y.dtype))
    allowed = 1.01 * UNIT[product.dtype] * expected.abs() + 3e-6 * magnitude + 1e-7
    return float(((y.double() - expected).abs() / allowed).max()) if y.numel() else 0.0


def _equal(a: Tensor, b: Tensor) -> float:
    return 0.0 if torch.equal(a, b) else math.inf


# ---------------------------------------------------------------- assembly
@triton.jit
def decode_kernel(
    words_ptr,
    out_ptr,
    BITS: tl.constexpr,
    LAYOUT: tl.constexpr,
    SEQUENCE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Packed words to dense codes q 2^-DROP by a named sequence, one atom for each program."""
    atom = tl.program_id(0)
    ATOM: tl.constexpr = 512 * BITS
    words = tl.load(words_ptr + atom * ATOM + tl.arange(0, ATOM)).reshape(1, ATOM)
    if BITS == 4:
        w = in_order(e2m1(words, SEQUENCE, COMPUTE), 1, 1, LAYOUT)
    else:
        w = in_order_of_octets(e4m3(words, SEQUENCE, COMPUTE), 1, 1, LAYOUT)
    if COMPUTE != tl.float16:  # noqa: SIM300
        w = (w * LIFT).to(COMPUTE)
    tl.store(out_ptr + atom * 4096 + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :], w)


def every_code(bits: int) -> Tensor:
    """e4m3 [256, 64, 64]: every code in every position of a word, in the order of any layout."""
    i = (torch.arange(4096) // 3 + torch.arange(256)[:, None]) % 2**bits
    if bits == 4:
        values = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float32).to(_E4M3)
        octets = values.view(torch.uint8)[i]
    else:
        octets = torch.where(i & 127 == 127, 0, i).to(torch.uint8)
    return octets.view(256, 64, 64).view(_E4M3)


def decoded(
    bits: int, layout: str, sequence: str, dtype: torch.dtype, device: torch.device
) -> float:
    """0 where a sequence decodes every code in every position to itself."""
    codes = every_code(bits)
    ones = torch.ones(256, 64, 1, dtype=torch.float32)
    packed = pack(codes, ones, ones[..., 0], 64, bits, layout)
    out = torch.empty(256, 64, 64, dtype=dtype, device=device)
    compute = tl.float16 if dtype == torch.float16 else tl.bfloat16
    decode_kernel[(256,)](
        packed.words.to(device), out, BITS=bits, LAYOUT=layout, SEQUENCE=sequence, COMPUTE=compute
    )
    expected = unpack(packed)[0] * 2.0 ** -DROP[bits]
    return _equal(out.cpu().double(), expected)


# ---------------------------------------------------------------- the cases of a capability
def cases(cc: Capability) -> list[Case]:
    """Assembly bit for bit; the configurations that run by default for every format; experts; every
    other tile."""
    row = target(cc)
    if row.path != "fused":
        return []
    dtypes = [str(dtype).removeprefix("torch.") for dtype in row.dtypes]
    first = [(d, f, c) for d in dtypes for f in FORMATS for c in _defaults(cc, d, f)]
    others = [(d, f, c) for d in dtypes for f in FORMATS for c in _tiles(cc, d, f)]
    listed = [_assembly(bits, row.layout, d, row.sequence) for bits in (4, 8) for d in dtypes]
    listed += [_products(row.layout, *one, EVEN) for one in first]
    listed += [_products(row.layout, *one, RAGGED) for one in _for_ragged(cc, dtypes)]
    listed += [_experts(cc, row.layout, d, f) for d in dtypes for f in FORMATS]
    rest = [one for one in dict.fromkeys(others) if one not in first]
    return listed + [replace(_products(row.layout, *one, EVEN), tuned=True) for one in rest]


def _assembly(bits: int, layout: str, dtype: str, sequence: str) -> Case:
    return Case(
        name=f"assembly {'e2m1' if bits == 4 else 'e4m3'} {dtype} {layout}",
        excess=partial(decoded, bits, layout, sequence, getattr(torch, dtype)),
        assembly=True,
    )


def _problem(
    cc: Capability, dtype: str, format: str, m: int, size: tuple[int, int] = EVEN
) -> Problem:
    bits, group, _ = FORMATS[format]
    return Problem(f"float{bits}_mm", cc, "", dtype, group, False, *size, m)


def _defaults(cc: Capability, dtype: str, format: str) -> list[Config]:
    """What the heuristic takes for few, some and many tokens."""
    return list(dict.fromkeys(heuristic(_problem(cc, dtype, format, m)) for m in (1, 16, 256)))


def _for_ragged(cc: Capability, dtypes: list[str]) -> list[tuple[str, str, Config]]:
    return [
        (dtype, format, heuristic(_problem(cc, dtype, format, 16, RAGGED)))
        for dtype in dtypes
        for format in FORMATS
    ]


def _tiles(cc: Capability, dtype: str, format: str) -> list[Config]:
    """Every tile of the menu, with the split it comes with first: a split is no other kernel."""
    tiles: dict[Config, Config] = {}
    for m in BUCKETS:
        for c in candidates(_problem(cc, dtype, format, m)):
            tiles.setdefault(replace(c, kind="gemm", split=1), c)
    return list(tiles.values())


def _products(layout: str, dtype: str, format: str, c: Config, size: tuple[int, int]) -> Case:
    n, k = size
    config = (c.kind, c.bm, c.bn, c.bk, c.split, c.warps, c.stages, c.scale_on)
    one: Callable[..., Product] = partial(
        Product, n=n, k=k, format=format, layout=layout, dtype=dtype, config=config
    )
    tokens = (1, c.bm - 3, 2 * c.bm + 1)
    runs = [*(one(m=m, exact=True) for m in tokens), one(m=tokens[-1])]
    return Case(
        name=f"{c.kind} {c.bm}x{c.bn}x{c.bk} split {c.split} warps {c.warps} stages {c.stages} "
        f"{dtype} {format} {n}x{k}",
        excess=partial(_largest, runs),
        kernels=2 if c.split > 1 else 1,
    )


def _largest(runs: list[Product], device: torch.device) -> float:
    return max(excess(product, device) for product in runs)


def _experts(cc: Capability, layout: str, dtype: str, format: str) -> Case:
    bits, group, _ = FORMATS[format]
    op = f"float{bits}_grouped_mm"
    c = heuristic(Problem(op, cc, "", dtype, group, False, *EVEN, ENDS[-1], len(ENDS)))
    one = Product(
        m=ENDS[-1],
        n=EVEN[0],
        k=EVEN[1],
        format=format,
        layout=layout,
        dtype=dtype,
        config=(c.kind, c.bm, c.bn, c.bk, c.split, c.warps, c.stages, c.scale_on),
        ends=ENDS,
    )
    return Case(
        name=f"experts {dtype} {format}",
        excess=partial(_largest, [replace(one, exact=True), one]),
    )


# ---------------------------------------------------------------- products to time
def timed(p: Problem, device: torch.device, seed: int) -> Callable[[Config], Tensor]:
    """config -> y of a random linear [n, k] in the format that has the operator's bits and the
    problem's group."""
    bits = int(p.op.removeprefix("float").removesuffix("_mm"))
    format = next(name for name, (b, group, _) in FORMATS.items() if (b, group) == (bits, p.group))
    one = Product(
        m=p.m,
        n=p.n,
        k=p.k,
        format=format,
        layout=target(p.cc).layout,  # type: ignore[arg-type]
        dtype=p.dtype,
        config=(),
        seed=seed,
    )
    return partial(float_mm, *operands(one, device))
