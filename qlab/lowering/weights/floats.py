"""Sums of products of 8-bit floats by torch's scaled product, and whether a device has it."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.lowering.weights.integers import Codes

E4M3 = torch.float8_e4m3fn
MULTIPLE = 16  # of channels and of rows, for the scaled product
BLOCK = 128
SCALES_OF_BLOCKS = 4  # the scales of blocks of a row, filled up to a multiple of this
TOLERANCE = 1e-2  # of a product on a device, beside the same in fp32; bf16 rounds to 2^-9


def product(codes: Codes, words: Tensor, scales: Tensor) -> Tensor:
    """y [m, n'] in fp32 of codes p [m, k] with scales t [m, 1], [1, 1] or [m, k / 128]."""
    p = F.pad(codes.p.view(torch.uint8), (0, words.shape[1] - codes.p.shape[1])).view(E4M3)
    if scales.ndim == 1:
        return _sums(p, words).mul_(codes.scales).mul_(scales)
    if p.device.type == "cuda":
        return _blocks(p, codes.scales, words, scales)
    parts = zip(p.split(BLOCK, 1), words.split(BLOCK, 1), strict=True)
    wide = scales.repeat_interleave(BLOCK, 0)
    terms = [
        _sums(p_c.contiguous(), q_c.contiguous()) * codes.scales[:, c : c + 1] * wide[:, c]
        for c, (p_c, q_c) in enumerate(parts)
    ]
    return torch.stack(terms).sum(0)


def _sums(p: Tensor, q: Tensor) -> Tensor:
    """p @ q.T in fp32."""
    one = torch.ones((), dtype=torch.float32, device=p.device)
    return torch._scaled_mm(p, q.mT, one, one, out_dtype=torch.float32)


def _blocks(p: Tensor, t_mc: Tensor, q: Tensor, s_ac: Tensor) -> Tensor:
    """The product under scales of blocks, which it reads with the rows of p and of blocks of q
    adjacent, the latter in whole multiples."""
    kinds = F.ScalingType
    padded = F.pad(s_ac, (0, -s_ac.shape[1] % SCALES_OF_BLOCKS))
    return F.scaled_mm(
        p,
        q.mT,
        t_mc.mT.contiguous().mT,
        kinds.BlockWise1x128,
        padded.mT,
        kinds.BlockWise128x128,
        output_dtype=torch.bfloat16,
    ).float()


def _dense(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes [m, k] times scales, each for so many rows and columns as there are."""
    for axis in (0, 1):
        scales = scales.repeat_interleave(codes.shape[axis] // scales.shape[axis], axis)
    return codes.float() * scales


@cache
def tried(device: torch.device, form: str) -> str | None:
    """What is wrong with a small product on a device, or None. form: "rows" or "blocks".

    Drivers and builds of torch differ in what they take."""
    generator = torch.Generator().manual_seed(0)
    p, q = (
        torch.randn(2 * BLOCK, 2 * BLOCK, generator=generator, dtype=torch.float32).to(E4M3)
        for _ in range(2)
    )
    t, s = (
        torch.rand(2 * BLOCK, 2, generator=generator, dtype=torch.float32) + 0.5 for _ in range(2)
    )
    t, s = (t[:, :1], s[:, 0]) if form == "rows" else (t, s[:2])
    expected = _dense(p, t) @ _dense(q, s[:, None] if s.ndim == 1 else s).T
    try:
        y = product(Codes(p.to(device), t.to(device), None), q.to(device), s.to(device)).cpu()
    except RuntimeError as error:
        return f"torch's fp8 product fails on this GPU ({str(error).splitlines()[0]:.100})"
    off = float((y - expected).norm() / expected.norm())
    return None if off < TOLERANCE else f"torch's fp8 product is {off:.0%} off on this GPU"
