"""Weights of 4- and 8-bit floats in the order of a kernel's threads (offline repack, plain torch,
any device).

    W[n, k] = f_n s_(n, group of k) q_nk        q in e2m1 (0, .5, 1, 1.5, 2, 3, 4, 6) or e4m3

The codes stand in the atoms and orders of `layout.py`, 64 (n) x 64 (k) each: 2,048 bytes of e2m1,
or two halves of 2,048 bytes of e4m3, so that a thread reads 16 bytes at a time of both.

    wgmma of e4m3    [2 a][4 warps][8 g][4 t][16 bytes (b2, h2, r2, p2)], k = (2a + b)*16 + h*8 +
                     t*2 + p
    mma2 of e4m3     [2 r][4 warps][8 g][4 t][16 bytes (j4, e4)], k = j*16 + t*4 + e

A 32-bit word has two lanes of 16 bits, of which the lower one holds the even values. A lane of e2m1
holds four of them so that the sign and the three other bits of the first three lie as far apart as
in a bfloat16, and one shift and one mask make each of them:

    bit        15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
    value       0  3  3  1  3  3  2  0  0  0  1  1  1  2  2  2
    holds       s  s  e  s  e  m  s  e  e  m  e  e  m  e  e  m

A lane of e4m3 holds value 0 in its lower and value 1 in its upper byte.

Scales of groups of 16 and 32 are bytes of 5 bits of exponent and 3 of mantissa, v = 2^(E-15) (1 +
M/8), four in an int32. Scales of MX are powers of two and those of NVFP4 have 3 bits of mantissa:
all are exact as long as those of one row span less than 2^28. Signs and zeros of scales stand in
the codes. Scales of wider groups are fp32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlab_kernels.capability import KernelError
from qlab_kernels.layout import ATOM, in_words, nibbles_of, round_up

REVISION = "e2m1-1-e4m3-1-e5m3-1"  # names the byte orders above: change it with them
LAYOUTS = ("wgmma", "mma2")
FINE = (16, 32)  # groups whose scales are bytes and multiply the weight
COARSE = 64  # groups in multiples of it have fp32 scales, which multiply the sums
# q of b bits stands in registers as q 2^-DROP[b], and the factors of rows make up for it.
DROP = {4: 14, 8: 8}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST, SMALLEST, BIAS = 29, 1, 15  # exponents E of a row's scales, and what is taken off them
_LANE = ((15, 6), (12, 3), (9, 0))  # sign and lowest bit of the first three values of a lane
_E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class PackedFloats:
    """W[..., n, k] = f * s * q as a kernel reads it.

    words: uint8 [..., n/64, k/64, 512 * bits], n and k padded with zeros. scales: int32 [...,
    ceil(k / 4 group), n] of four bytes in groups of 16 or 32; fp32 [..., k/group, n] of wider
    groups; None for one scale per row. factors: fp32 [..., n]. n, k: the true sizes. bits: of a
    code. group: codes per scale along k, or 0.
    """

    words: Tensor
    scales: Tensor | None
    factors: Tensor
    n: int
    k: int
    bits: int
    group: int
    layout: str

    @property
    def padded_n(self) -> int:
        return self.words.shape[-3] * ATOM

    @property
    def padded_k(self) -> int:
        return self.words.shape[-2] * ATOM


def padded_columns(k: int, group: int) -> int:
    """k as packed, in groups of `group` (0: one scale per row).

    Raises:
        KernelError: for a group that no kernel reads.
    """
    if group in FINE or group == 0:
        return round_up(k, ATOM)
    if group % COARSE or group < 0:
        raise KernelError(
            f"kernels read floats in groups of {', '.join(map(str, FINE))}, of multiples of "
            f"{COARSE} or in whole rows, not in groups of {group}: quantize with one of them, or "
            "dequantize these weights once"
        )
    return round_up(k, group)


def pack(
    codes: Tensor, scales: Tensor, factors: Tensor, group: int, bits: int, layout: str
) -> PackedFloats:
    """Codes [..., n, k] as e4m3 with scales [..., n, ceil(k/group)] and factors [..., n] ->
    PackedFloats. bits 4: all codes are numbers of e2m1. group >= k: one scale per row.

    Raises:
        KernelError: for an unknown layout or group, shapes that do not match, codes that are no
            such numbers, and scales of groups of 16 or 32 that no bytes hold.
    """
    _check(codes, scales, factors, group, bits, layout)
    n, k = codes.shape[-2:]
    group = 0 if group >= k else group
    k_pad, n_pad = padded_columns(k, group), round_up(n, ATOM)
    octets = codes.contiguous().view(torch.uint8)
    s, f = scales.float(), factors.float()
    if group == 0:
        packed_scales, f = None, f * s[..., 0]
    elif group in FINE:
        octets = _with_signs(octets, s, group)
        packed_scales, exponents = _bytes_of(s, n_pad, k_pad // group)
        f = torch.ldexp(f, exponents)
    else:
        packed_scales = _placed(s.mT, k_pad // group, n_pad)
    f = torch.ldexp(_placed(f[..., None, :], 1, n_pad)[..., 0, :], _whole(DROP[bits], f))
    q = octets.new_zeros(*codes.shape[:-2], n_pad, k_pad)
    q[..., :n, :k] = _nibbles(octets) if bits == 4 else octets
    words = _in_lanes(in_words(q, layout)) if bits == 4 else _octets_in_words(q, layout)
    return PackedFloats(words, packed_scales, f.contiguous(), n, k, bits, group, layout)


def unpack(
    packed: PackedFloats, wide: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers that a kernel multiplies: codes q [..., n, k], scales [..., n, groups] and
    factors [..., n] in `wide`, the padding cut off."""
    n, k = packed.n, packed.k
    if packed.bits == 4:
        nibbles = nibbles_of(_from_lanes(packed.words), packed.layout)[..., :n, :k].int()
        magnitudes = torch.tensor(E2M1, dtype=wide, device=nibbles.device)[nibbles & 7]
        codes = torch.where(nibbles > 7, -magnitudes, magnitudes)
    else:
        octets = _octets_from_words(packed.words, packed.layout)[..., :n, :k]
        codes = octets.contiguous().view(_E4M3).to(wide)
    factors = packed.factors[..., :n].to(wide) * 2.0 ** -DROP[packed.bits]
    if packed.scales is None:
        return codes, torch.ones_like(factors)[..., None], factors
    groups = -(-k // packed.group)
    if packed.group not in FINE:
        return codes, packed.scales[..., :groups, :n].mT.to(wide), factors
    b = torch.stack([packed.scales >> 8 * i & 255 for i in range(4)], -2).flatten(-3, -2)
    b = b[..., :groups, :n].mT
    return codes, torch.ldexp(1 + (b & 7).to(wide) / 8, (b >> 3) - BIAS), factors


def refusal_of_scales(scales: Tensor) -> str | None:
    """Why bytes do not hold the scales [..., n, g] of groups of 16 or 32, or None."""
    mantissas, exponents = torch.frexp(scales.float().abs())
    is_short = mantissas * 16 == (mantissas * 16).floor()
    if not is_short.all():
        return "scales of groups of 16 and 32 have more than 3 bits of mantissa"
    lowest = torch.where(scales == 0, _highest(scales, exponents), exponents)
    if (_highest(scales, exponents) - lowest > LARGEST - SMALLEST).any():
        return f"scales of one row span more than 2^{LARGEST - SMALLEST}"
    return None


def _check(
    codes: Tensor, scales: Tensor, factors: Tensor, group: int, bits: int, layout: str
) -> None:
    if layout not in LAYOUTS:
        raise KernelError(f"floats have the layouts {' and '.join(LAYOUTS)}, not {layout!r}")
    if bits not in DROP:
        raise KernelError(f"kernels read floats of 4 and 8 bits, not of {bits}")
    if codes.dtype != _E4M3 or codes.dim() < 2:
        raise KernelError(f"codes are {_E4M3} [..., n, k], not {codes.dtype} {tuple(codes.shape)}")
    rows = codes.shape[:-1]
    for name, part, expected in (
        ("scales", scales, (*rows, -(-codes.shape[-1] // group))),
        ("factors", factors, tuple(rows)),
    ):
        if tuple(part.shape) != expected:
            raise KernelError(
                f"codes {tuple(codes.shape)} in groups of {group} need {name} {expected}, not "
                f"{tuple(part.shape)}"
            )


def _placed(values: Tensor, rows: int, columns: int) -> Tensor:
    """Values [..., r, c] in the corner of ones [..., rows, columns]."""
    into = values.new_ones(*values.shape[:-2], rows, columns)
    into[..., : values.shape[-2], : values.shape[-1]] = values
    return into


def _whole(exponent: int, like: Tensor) -> Tensor:
    return torch.tensor(exponent, dtype=torch.int32, device=like.device)


def _nibbles(octets: Tensor) -> Tensor:
    """e4m3 as bytes -> e2m1: sign, 2 bits of exponent, 1 of mantissa. Refuses other numbers."""
    table = torch.full((256,), 255, dtype=torch.uint8, device=octets.device)
    magnitudes = torch.tensor(E2M1, dtype=torch.float32).to(_E4M3).view(torch.uint8).long()
    order = torch.arange(8, dtype=torch.uint8, device=octets.device)
    table[magnitudes], table[magnitudes + 128] = order, order + 8
    nibbles = table[octets.int()]
    if (nibbles == 255).any():
        other = octets[nibbles == 255][0].view(_E4M3)
        raise KernelError(
            f"e2m1 has no {float(other):g}: its numbers are {', '.join(map('{:g}'.format, E2M1))}"
        )
    return nibbles


def _with_signs(octets: Tensor, scales: Tensor, group: int) -> Tensor:
    """Codes under scales without signs: negative where the scale is, and 0 where it is 0."""
    k = octets.shape[-1]

    def each(of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(group, -1)[..., :k]

    flipped = octets ^ each((scales < 0).to(torch.uint8) << 7)
    return torch.where(each(scales == 0), torch.zeros_like(flipped), flipped)


def _highest(scales: Tensor, exponents: Tensor) -> Tensor:
    """The largest exponent [..., n, 1] of a row's scales other than 0; 0 where all are."""
    lowest = torch.iinfo(torch.int32).min
    highest = torch.where(scales == 0, lowest, exponents).amax(-1, keepdim=True)
    return torch.where(highest == lowest, 0, highest)


def _bytes_of(scales: Tensor, n_pad: int, groups: int) -> tuple[Tensor, Tensor]:
    """Scales [..., n, g] -> int32 [..., ceil(groups / 4), n_pad] of four bytes, and the exponents
    [..., n] by which the numbers of the bytes are too small."""
    reason = refusal_of_scales(scales)
    if reason:
        raise KernelError(f"{reason}: quantize with scales as NVFP4 or MX have them")
    mantissas, exponents = torch.frexp(scales.abs())
    highest = _highest(scales, exponents)
    # that of a scale of 0 is any
    E = (exponents - highest + LARGEST).clamp(SMALLEST, LARGEST)
    b = E << 3 | (mantissas * 16).int() & 7
    padded = b.new_zeros(*b.shape[:-2], round_up(groups, 4), n_pad)
    padded[..., : b.shape[-1], : b.shape[-2]] = b.mT
    four = padded.unflatten(-2, (-1, 4))
    word = four[..., 0, :] | four[..., 1, :] << 8 | four[..., 2, :] << 16 | four[..., 3, :] << 24
    return word.contiguous(), (highest - 1 - (LARGEST - BIAS))[..., 0]


def _lanes(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.int16).int() & 0xFFFF


def _as_bytes(lanes: Tensor) -> Tensor:
    return lanes.to(torch.int16).view(torch.uint8)


def _in_lanes(words: Tensor) -> Tensor:
    """Nibbles at bits 4i of a lane -> the order above."""
    lanes = _lanes(words)
    q = [lanes >> 4 * i & 15 for i in range(4)]
    into = (q[3] >> 3) << 14 | (q[3] >> 2 & 1) << 13 | (q[3] & 3) << 10
    for nibble, (sign, lowest) in zip(q, _LANE):
        into = into | (nibble >> 3) << sign | (nibble & 7) << lowest
    return _as_bytes(into)


def _from_lanes(words: Tensor) -> Tensor:
    """The inverse of `_in_lanes`."""
    lanes = _lanes(words)
    into = (lanes >> 14 & 1) << 15 | (lanes >> 13 & 1) << 14 | (lanes >> 10 & 3) << 12
    for i, (sign, lowest) in enumerate(_LANE):
        into = into | (lanes >> sign & 1) << 4 * i + 3 | (lanes >> lowest & 7) << 4 * i
    return _as_bytes(into)


def _octets_in_words(q: Tensor, layout: str) -> Tensor:
    """uint8 [..., n, k] -> uint8 [..., n/64, k/64, 4096]."""
    lead, (n, k) = q.shape[:-2], (q.shape[-2] // ATOM, q.shape[-1] // ATOM)
    if layout == "wgmma":  # n w r g k a b h t p -> n k a w g t b h r p
        parts = q.reshape(-1, n, 4, 2, 8, k, 2, 2, 2, 4, 2)
        ordered = parts.permute(0, 1, 5, 6, 2, 4, 9, 7, 8, 3, 10)
    else:  # n w r g k j t e -> n k r w g t j e
        ordered = q.reshape(-1, n, 4, 2, 8, k, 4, 4, 4).permute(0, 1, 5, 3, 2, 4, 7, 6, 8)
    # the lower bytes of both lanes are values 0 and 1, the upper ones 2 and 3
    return ordered.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(*lead, n, k, 4096)


def _octets_from_words(words: Tensor, layout: str) -> Tensor:
    """The inverse of `_octets_in_words`."""
    lead, (n, k) = words.shape[:-3], words.shape[-3:-1]
    e = words.reshape(-1, 4)[:, [0, 2, 1, 3]]
    if layout == "wgmma":
        parts = e.reshape(-1, n, k, 2, 4, 8, 4, 2, 2, 2, 2)
        ordered = parts.permute(0, 1, 4, 9, 5, 2, 3, 7, 8, 6, 10)
    else:
        ordered = e.reshape(-1, n, k, 2, 4, 8, 4, 4, 4).permute(0, 1, 4, 3, 5, 2, 7, 6, 8)
    return ordered.reshape(*lead, n * 64, k * 64)
