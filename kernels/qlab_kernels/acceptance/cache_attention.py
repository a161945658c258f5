"""The cases of attention over a quantized cache: every format, size of heads and mask, within a
bound of rounding.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlab_kernels import reference
from qlab_kernels.acceptance import Case
from qlab_kernels.attend import attend
from qlab_kernels.cached import Cached, Format, decoding, numbers, pack_nibbles
from qlab_kernels.capability import Capability
from qlab_kernels.config import Config
from qlab_kernels.families.cache_attention import refusal

ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
SUMS = 2.0**-20  # of fp32, relative to the sum of magnitudes


@dataclass(frozen=True)
class Attention:
    """lengths: of every sequence. rows: query heads for a head of keys, and query tokens. scope:
    what a scale covers, "token" of a head or of "all" heads, "head" or "tensor". groups: scales of
    keys and of values in a head. page: positions of a page, or 0. tile: (split, bn, bm)."""

    lengths: tuple[int, ...]
    heads: int
    rows: tuple[int, int]
    channels: tuple[int, int]
    formats: tuple[Format, Format]
    dtype: str
    scope: str = "token"
    groups: tuple[int, int] = (1, 1)
    zeros: bool = False
    cap: float | None = None
    window: int | None = None
    started: bool = False
    page: int = 0
    tile: tuple[int, int, int] = (2, 32, 16)
    seed: int = 0


def cached(case: Attention, which: int, rng: torch.Generator, n: int) -> Cached:
    """Keys (0) or values (1) at random: every code, scales of a size of their own."""
    b, h, d, form = len(case.lengths), case.heads, case.channels[which], case.formats[which]
    if form == "int4":
        codes = pack_nibbles(torch.randint(-8, 8, (b, h, n, d), generator=rng))
    elif form == "int8":
        codes = torch.randint(-128, 128, (b, h, n, d), generator=rng, dtype=torch.int8)
    else:
        drawn = torch.randn(b, h, n, d, generator=rng, dtype=torch.float32)
        codes = (drawn * 60).to(torch.float8_e4m3fn)
    size = {"token": (b, h, n), "all": (b, 1, n), "head": (1, h, 1), "tensor": (1, 1, 1)}
    shape = (*size[case.scope], case.groups[which])
    unit = 0.1 if form == "int4" else 0.01
    scales = (torch.rand(shape, generator=rng, dtype=torch.float32) + 0.1) * unit
    full = (b, h, n, case.groups[which])
    zeros = None
    if case.zeros and form != "fp8":
        most = 8 if form == "int4" else 100
        drawn = torch.randint(-most, most, shape, generator=rng, dtype=torch.int8)
        zeros = drawn.expand(full)
    return Cached(codes=codes, scales=scales.expand(full), zeros=zeros, channels=d, format=form)


def in_pages(whole: Cached, table: Tensor, size: int) -> Cached:
    """The same codes [b, h, n, ..] in pages [b * pages, h, size, ..], where the table says."""

    def paged(t: Tensor) -> Tensor:
        b, h, n, w = t.shape
        pages = t.reshape(b, h, n // size, size, w).transpose(1, 2).flatten(0, 1)
        out = torch.empty_like(pages)
        out[table.flatten().long()] = pages
        return out

    codes = whole.codes.view(torch.uint8) if whole.format == "fp8" else whole.codes
    return replace(
        whole,
        codes=paged(codes).view(whole.codes.dtype),
        scales=paged(whole.scales),
        zeros=None if whole.zeros is None else paged(whole.zeros),
    )


def moved(part: Cached, device: torch.device) -> Cached:
    """On a device; what was expanded is laid out there."""
    return replace(
        part,
        codes=part.codes.to(device),
        scales=part.scales.to(device),
        zeros=None if part.zeros is None else part.zeros.to(device),
    )


def excess(case: Attention, device: torch.device) -> float:
    """max |y - y64| over what rounding explains: of y, of weights and of groups to 16 bits, and
    fp32 sums, in which scores and weights carry the offsets of codes."""
    rng = torch.Generator().manual_seed(case.seed)
    n = max(*case.lengths, 1)
    n = -(-n // case.page) * case.page if case.page else n + 3
    b, (g, t) = len(case.lengths), case.rows
    drawn = torch.randn(b, case.heads * g, t, case.channels[0], generator=rng, dtype=torch.float32)
    q = drawn.to(device, getattr(torch, case.dtype))
    keys, values = (moved(cached(case, which, rng, n), device) for which in (0, 1))
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    more: dict[str, Any] = {"cap": case.cap, "window": case.window}
    more["starts"] = (lengths // 3).to(torch.int32) if case.started else None
    expected = reference.attend(q, keys, values, lengths, **more)
    paged_keys, paged_values = keys, values
    if case.page:
        pages = torch.randperm(b * (n // case.page), generator=rng).view(b, -1)
        more["pages"] = pages.to(device, torch.int32)
        paged_keys, paged_values = (
            in_pages(part, more["pages"], case.page) for part in (keys, values)
        )
        again = reference.attend(q, paged_keys, paged_values, lengths, **more)
        torch.testing.assert_close(again, expected)
    split, bn, bm = case.tile
    stages = 1 if any(count > 1 for count in case.groups) else 2
    config = Config("split_k", bm, bn, 0, split, 4, stages)
    y = attend(q, paged_keys, paged_values, lengths, config, **more)
    assert y.dtype == q.dtype and y.shape == expected.shape
    if not y.numel():
        return 0.0
    return float(((y.double() - expected).abs() / allowed(case, q, [keys, values], expected)).max())


def allowed(case: Attention, q: Tensor, whole: list[Cached], expected: Tensor) -> Tensor:
    """What rounding explains of each result."""
    unit, compute = ROUNDING[case.dtype], getattr(torch, case.dtype)
    offsets = [decoding(part.format, compute)[0] for part in whole]
    largest = [numbers(part, torch.float64).abs().amax() for part in whole]
    steps = [part.scales.abs().amax() for part in whole]
    q_total = q.double().abs().sum(-1).amax() * case.channels[0] ** -0.5
    scores = q_total * SUMS * (largest[0] + offsets[0] * steps[0])
    scores = scores + (unit * q_total * largest[0] if case.groups[0] > 1 else 0)
    weights = 2 * unit + 2 * scores
    sums = SUMS * offsets[1] * steps[1] + 1e-6
    return 1.01 * unit * expected.abs() + weights * largest[1] + sums


def cases(cc: Capability) -> list[Case]:
    """Every format and size of heads, without masks and with all of them; then groups."""
    dtypes = [dtype for dtype in ("bfloat16", "float16") if refusal(cc, dtype, 128) is None]
    return [_case(*kind) for dtype in dtypes for kind in _kinds(dtype)]


def _kinds(dtype: str) -> list[tuple[str, Attention]]:
    """Names and attentions."""
    kinds = []
    for form in ("int4", "int8", "fp8"):
        for d in (128, 64, 80, 96, 256):
            tile = (4, 32 if d > 128 else 64, 16)
            plain = Attention((1, 70, 385), 2, (4, 1), (d, d), (form, form), dtype, tile=tile)
            masked = replace(
                plain, cap=20.0, window=100, started=True, zeros=True, page=16, rows=(2, 3)
            )
            kinds += [(f"{dtype} {form} {d}", plain), (f"{dtype} {form} {d} masked", masked)]
        grouped = replace(plain, channels=(128, 128), groups=(4, 4), zeros=True)
        kinds.append((f"{dtype} {form} 128 in groups of 32", grouped))
    mixed = replace(plain, channels=(192, 128), formats=("int8", "int4"), scope="all")
    return [*kinds, (f"{dtype} int8 keys of 192, int4 values of 128", mixed)]


def _case(name: str, attention: Attention) -> Case:
    return Case(name=name, excess=partial(excess, attention), kernels=2)
