"""Weight layouts: int4 codes in the order in which a kernel's threads want them (offline repack,
plain torch, any device).

Codes are padded to multiples of 64 in both dimensions and cut into atoms of 64 (n) x 64 (k). One
atom is 2048 bytes, and `words` is uint8 [..., n/64, k/64, 2048]. A nibble holds code + 8, so
padding with 8 is padding with zero weights.

    rows    [64 n][32 bytes]: two neighbouring k in one byte, the even one low.
    wgmma   [4 warps][8 g][4 t][16 bytes]: the 32 nibbles of one thread are contiguous and in the
            order (j4, h2, r2, p2), for n = warp*16 + r*8 + g and k = j*16 + h*8 + t*2 + p: the
            register fragment of wgmma's left operand.
    mma2    the same, in the order (r2, j2, e8), for k = j*32 + t*8 + e: mma.sync's, with k renamed
            inside an atom.

In the last two, each 8 nibbles form a little-endian 32-bit word with nibble e at bit 4*(e//2) +
16*(e%2), so that `(word >> 4*i) & 0x000F000F` is a ready pair (2i, 2i+1) of 16-bit lanes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlab_kernels.capability import KernelError

ATOM = 64
LAYOUTS = ("wgmma", "mma2", "rows")
REVISION = "rows1-wgmma1-mma2-1"  # names the byte orders above: change it with them
GROUPS = (32, 64, 128, 256)
_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # of nibble e in its word


@dataclass(frozen=True)
class Packed:
    """W[..., n, k] = (code - z) * s as a kernel reads it; code = nibble - 8, so w = (q - 8 - z) *
    s.

    words: uint8 [..., n/64, k/64, 2048], n and k padded. scales, zeros: [..., k/group, n] padded,
    in the activations' dtype; zeros is None when symmetric. n, k: the true sizes. group: codes per
    scale along k (the padded k: one scale per row).
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    n: int
    k: int
    group: int
    layout: str

    @property
    def padded_n(self) -> int:
        return self.words.shape[-3] * ATOM

    @property
    def padded_k(self) -> int:
        return self.words.shape[-2] * ATOM


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def padded_group(k: int, group: int) -> tuple[int, int]:
    """(padded k, group as packed): whole rows (group >= k) take the padded k as their group.

    Raises:
        KernelError: for a group that no kernel reads.
    """
    if group >= k:
        return round_up(k, ATOM), round_up(k, ATOM)
    if group not in GROUPS:
        raise KernelError(
            f"int4 kernels read groups of {', '.join(map(str, GROUPS))} or whole rows, not groups "
            f"of {group}: quantize with one of them, or dequantize these weights once"
        )
    return round_up(k, max(ATOM, group)), group


def pack(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int, layout: str, dtype: torch.dtype
) -> Packed:
    """int8 codes [..., n, k] in -8..7 with scales and zeros [..., n, ceil(k/group)] -> Packed, its
    scales and zeros in `dtype`.

    2- and 3-bit codes lie in the same range and are stored as 4 bits.

    Raises:
        KernelError: for an unknown layout or group, shapes that do not match, and codes that need
        more than 4 bits.
    """
    if layout not in LAYOUTS:
        raise KernelError(f"no weight layout {layout!r}: there are {', '.join(LAYOUTS)}")
    check(codes, scales, zeros, group)
    n, k = codes.shape[-2:]
    k_pad, group_pad = padded_group(k, group)
    n_pad = round_up(n, ATOM)
    q = torch.full((*codes.shape[:-2], n_pad, k_pad), 8, dtype=torch.uint8, device=codes.device)
    q[..., :n, :k] = (codes + 8).to(torch.uint8)
    ones = scales.new_ones((*scales.shape[:-2], k_pad // group_pad, n_pad), dtype=dtype)
    padded_scales = placed(scales, ones)
    padded_zeros = None if zeros is None else placed(zeros, torch.zeros_like(ones))
    return Packed(in_words(q, layout), padded_scales, padded_zeros, n, k, group_pad, layout)


def unpack(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack`: int8 codes [..., n, k], scales and zeros [..., n, ceil(k/group)], the
    padding cut off."""
    n, k = packed.n, packed.k
    groups = -(-k // packed.group)
    codes = (nibbles_of(packed.words, packed.layout)[..., :n, :k].to(torch.int8) - 8).contiguous()
    scales, zeros = (
        (None if t is None else t[..., :groups, :n].mT.contiguous())
        for t in (packed.scales, packed.zeros)
    )
    assert scales is not None
    return codes, scales, zeros


def check(codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> None:
    """Refuse codes that need more than 4 bits, and scales of another shape."""
    if codes.dtype != torch.int8 or codes.dim() < 2:
        raise KernelError(f"codes are int8 [..., n, k], not {codes.dtype} {tuple(codes.shape)}")
    expected = (*codes.shape[:-1], -(-codes.shape[-1] // group))
    for name, part in (("scales", scales), ("zeros", zeros)):
        if part is not None and tuple(part.shape) != expected:
            raise KernelError(
                f"codes {tuple(codes.shape)} in groups of {group} need {name} {expected}, not "
                f"{tuple(part.shape)}"
            )
    if codes.numel() and (codes.min() < -8 or codes.max() > 7):
        raise KernelError(
            f"int4 layouts hold codes -8..7, not {int(codes.min())}..{int(codes.max())}: keep "
            "wider codes as int8 and dequantize them before the matmul"
        )


def placed(values: Tensor, into: Tensor) -> Tensor:
    """[..., n, groups] transposed into the corner of a padded [..., groups, n]."""
    into[..., : values.shape[-1], : values.shape[-2]] = values.mT.to(into.dtype)
    return into


def in_words(q: Tensor, layout: str) -> Tensor:
    """uint8 [..., n, k] in 0..15 -> uint8 [..., n/64, k/64, 2048]."""
    lead, (n, k) = q.shape[:-2], (q.shape[-2] // ATOM, q.shape[-1] // ATOM)
    if layout == "rows":
        pairs = q.reshape(-1, n, 64, k, 32, 2).transpose(2, 3)
        return (pairs[..., 0] | pairs[..., 1] << 4).reshape(*lead, n, k, 2048)
    if layout == "wgmma":  # n w r g k j h t p -> n k w g t j h r p
        fragments = q.reshape(-1, n, 4, 2, 8, k, 4, 2, 4, 2).permute(0, 1, 5, 2, 4, 8, 6, 7, 3, 9)
    else:  # n w r g k j t e -> n k w g t r j e
        fragments = q.reshape(-1, n, 4, 2, 8, k, 2, 4, 8).permute(0, 1, 5, 2, 4, 7, 3, 6, 8)
    e = fragments.reshape(*lead, n, k, 512, 8)
    # byte b of a word holds the two nibbles whose shifts are 8b and 8b + 4
    low, high = (e[..., [_SHIFTS.index(8 * b + offset) for b in range(4)]] for offset in (0, 4))
    return (low | high << 4).reshape(*lead, n, k, 2048)


def nibbles_of(words: Tensor, layout: str) -> Tensor:
    """The inverse of `in_words`."""
    lead, (n, k) = words.shape[:-3], words.shape[-3:-1]
    if layout == "rows":
        pairs = torch.stack((words & 15, words >> 4), -1).reshape(-1, n, k, 64, 64)
        return pairs.transpose(2, 3).reshape(*lead, n * 64, k * 64)
    bytes_ = words.reshape(-1, 4)
    # Nibble i stands at bit 4 * i, i = 0..7.
    by_shift = torch.stack((bytes_ & 15, bytes_ >> 4), -1).reshape(-1, 8)
    e = by_shift[:, [shift // 4 for shift in _SHIFTS]]
    if layout == "wgmma":
        q = e.reshape(-1, n, k, 4, 8, 4, 4, 2, 2, 2).permute(0, 1, 3, 8, 4, 2, 6, 7, 5, 9)
    else:
        q = e.reshape(-1, n, k, 4, 8, 4, 2, 2, 8).permute(0, 1, 3, 6, 4, 2, 7, 5, 8)
    return q.reshape(*lead, n * 64, k * 64)
