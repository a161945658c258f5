"""Products of 8-bit floats with 8-bit floats in plain torch, on any device: what the kernels are
checked against."""

from torch import Tensor

BLOCK = 128


def numbers(codes: Tensor, scales: Tensor) -> Tensor:
    """codes [..., r, k] times their scales, [r], [r, 1] or [1, 1] of rows or [r, k / 128] of groups
    or [r / 128, k / 128] of blocks, in float64."""
    wide, s = codes.double(), scales.double()
    if s.dim() < wide.dim():
        return wide * s[..., None]
    if s.shape[-1] > 1:
        s = s.repeat_interleave(BLOCK, -1)[..., : wide.shape[-1]]
    if s.shape[-2] not in (1, wide.shape[-2]):
        s = s.repeat_interleave(BLOCK, -2)[..., : wide.shape[-2], :]
    return wide * s


def product(p: Tensor, row_scales: Tensor, words: Tensor, scales: Tensor, n: int) -> Tensor:
    """y [m, n] in float64 of codes p [m, k] and one weight [n', k']."""
    k = p.shape[1]
    W = numbers(words[:n, :k], scales[:n] if scales.dim() == 1 else scales)
    return numbers(p, row_scales) @ W.T


def magnitude(p: Tensor, row_scales: Tensor, words: Tensor, scales: Tensor, n: int) -> Tensor:
    """The same of absolute values: what errors of rounding are relative to."""
    absolute = (p.double().abs(), row_scales, words.double().abs(), scales, n)
    return product(*absolute)
