"""The cases of activations that are rounded to codes of 8 bits: bits are compared, since torch
computes the same in the same order."""

import math
from functools import partial

import torch

from qlab_kernels import reference_a8 as reference
from qlab_kernels.acceptance import Case
from qlab_kernels.capability import Capability, KernelError
from qlab_kernels.device8 import CODES, Limits, prepared
from qlab_kernels.layout8 import NUMBERS, UNIT, layout_of, pack8
from qlab_kernels.round8 import round8

# of int8, int4 and e4m3
LIMITS = {
    "int8": (Limits(-128.0, 127.0, 127.5), Limits(-8.0, 7.0, 7.5)),
    "fp8": (Limits(-448.0, 448.0, 448.0),),
}
SIZES = ((1, 96), (5, 1500), (33, 4096))  # (m, k)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def excess(
    layout: str, limits: Limits, group: int, fixed: bool, seed: int, device: torch.device
) -> float:
    """0 where codes, scales and sums are those of plain torch: of int8 bit for bit, sums of e4m3
    within rounding. One token is all zeros, and channels are in an order of their own."""
    rng = torch.Generator().manual_seed(seed)
    dtype = CODES[layout.partition("-")[2]]
    worst = 0.0
    for m, k in SIZES:
        x = torch.randn(m, k, generator=rng, dtype=torch.float32) * 3
        x[m // 2] = 0 if m > 1 else x[m // 2]
        perm = torch.randperm(k, generator=rng).to(device)
        ones = torch.ones(64, -(-k // group), dtype=torch.float32)
        q = torch.zeros(64, k, dtype=torch.int8)
        q, ones = q.to(device), ones.to(device)
        packed = pack8(q, ones, ones, group, layout, torch.float32)
        t = torch.full((1, 1), 0.03, dtype=torch.float32, device=device) if fixed else None
        for of in DTYPES:
            y = x.to(device, of)
            p, scales = reference.rounded(y, t, limits, dtype)
            expected = prepared(p.view(torch.uint8)[:, perm].view(dtype), scales, packed)
            found = round8(y, t, perm, limits, packed)
            same = torch.equal(found.p.view(torch.uint8), expected.p.view(torch.uint8))
            worst = max(worst, 0.0 if same and torch.equal(found.t, expected.t) else math.inf)
            size = UNIT[layout.partition("-")[2]] * found.p.float().abs().sum(1).max()
            off = float((found.sums - expected.sums).abs().max() / (k * 2.0**-24 * size))
            worst = max(worst, off if dtype != torch.int8 else (0.0 if off == 0 else math.inf))
    return worst


def cases(cc: Capability) -> list[Case]:
    """Of int8 and e4m3 where the capability multiplies them: tokens and one scale, for groups and
    whole rows."""
    listed: list[Case] = []
    for numbers in NUMBERS:
        try:
            layout = layout_of(cc, numbers)
        except KernelError:
            continue
        for limits in LIMITS[numbers]:
            for group, fixed in ((32, False), (256, True), (10_000, False)):
                of = "one scale" if fixed else "tokens"
                rows = "rows" if group > SIZES[-1][1] else f"g{group}"
                listed.append(
                    Case(
                        name=f"{numbers} to {limits.highest:g} of {of} {rows}",
                        excess=partial(excess, layout, limits, group, fixed, len(listed)),
                        kernels=len(DTYPES),
                    )
                )
    return listed
