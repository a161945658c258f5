"""int4 weights for products with activations of 8 bits: codes in the order in which a kernel's
threads want them, and coded so that few instructions make 8 bits of them.

Atoms are those of `layout.py`, 64 (n) x 64 (k) in 2048 bytes, [4 warps][8 g][4 t][16 bytes], with
n = warp*16 + r*8 + g. Each 8 nibbles form a little-endian 32-bit word: byte b holds nibble b below
and nibble 4 + b above.

    wgmma8  the 32 nibbles of a thread in the order (j2, h2, r2, p4), k = j*32 + h*16 + t*4 + p: the
            8-bit register fragment of wgmma's left operand.
    mma8    (r2, j2, e8), k = j*32 + t*8 + e: mma.sync's, with k renamed inside an atom.

A nibble is, of the code c,

    int8    c + 8.
    fp8     c where c >= 0, else 8 + (-1 - c): a sign over m of c = m or -1 - m.
"""

import torch
from torch import Tensor

from qlab_kernels.capability import Capability, KernelError, target
from qlab_kernels.layout import ATOM, Packed, check, padded_group, placed, round_up

NUMBERS = ("int8", "fp8")
ORDERS = ("wgmma8", "mma8")
REVISION = "wgmma8-1-mma8-1"  # names the orders and nibbles above: change it with them
UNIT = {"int8": 16.0, "fp8": 2.0**-9}  # a weight as it is multiplied, over its code
# The first capability whose tensor cores multiply such numbers in Triton's code.
FIRST: dict[str, Capability] = {"int8": (8, 0), "fp8": (8, 9)}


def numbers_of(layout: str) -> str:
    """The numbers that a layout's weights become: "mma8-int8" -> "int8"."""
    return layout.partition("-")[2]


def layout_of(cc: Capability, numbers: str) -> str:
    """The layout that a capability's kernel reads. KernelError where it has none."""
    target(cc)
    first = FIRST[numbers]
    if cc < first:
        raise KernelError(
            f"compute capability {cc[0]}.{cc[1]} has no {numbers} x {numbers} product in Triton's "
            f"code: {first[0]}.{first[1]} is the first; multiply 16-bit activations there"
        )
    return f"{'wgmma8' if cc == (9, 0) else 'mma8'}-{numbers}"


def pack8(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int, layout: str, dtype: torch.dtype
) -> Packed:
    """int8 codes [..., n, k] in -8..7 with scales and zeros [..., n, ceil(k/group)] -> Packed, its
    scales and zeros in `dtype`, of 16 or 32 bits.

    Raises:
        KernelError: for an unknown layout or group, shapes that do not match, and codes that need
        more than 4 bits.
    """
    order, _, numbers = layout.partition("-")
    if order not in ORDERS or numbers not in NUMBERS:
        names = ", ".join(f"{o}-{n}" for o in ORDERS for n in NUMBERS)
        raise KernelError(f"no layout {layout!r} of 8-bit products: there are {names}")
    check(codes, scales, zeros, group)
    n, k = codes.shape[-2:]
    k_pad, group_pad = padded_group(k, group)
    n_pad = round_up(n, ATOM)
    q = torch.zeros((*codes.shape[:-2], n_pad, k_pad), dtype=torch.int8, device=codes.device)
    q[..., :n, :k] = codes
    nibbles = (q + 8 if numbers == "int8" else torch.where(q < 0, 7 - q, q)).to(torch.uint8)
    ones = scales.new_ones((*scales.shape[:-2], k_pad // group_pad, n_pad), dtype=dtype)
    padded_zeros = None if zeros is None else placed(zeros, torch.zeros_like(ones))
    words = _words(nibbles, order)
    return Packed(words, placed(scales, ones), padded_zeros, n, k, group_pad, layout)


def unpack8(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack8`: int8 codes [..., n, k], scales and zeros [..., n, ceil(k/group)], the
    padding cut off."""
    order, _, numbers = packed.layout.partition("-")
    n, k = packed.n, packed.k
    nibbles = _nibbles(packed.words, order)[..., :n, :k].to(torch.int8)
    codes = nibbles - 8 if numbers == "int8" else torch.where(nibbles > 7, 7 - nibbles, nibbles)
    groups = -(-k // packed.group)
    scales, zeros = (
        (None if part is None else part[..., :groups, :n].mT.contiguous())
        for part in (packed.scales, packed.zeros)
    )
    assert scales is not None
    return codes.contiguous(), scales, zeros


def _words(q: Tensor, order: str) -> Tensor:
    """uint8 [..., n, k] in 0..15 -> uint8 [..., n/64, k/64, 2048]."""
    lead, (n, k) = q.shape[:-2], (q.shape[-2] // ATOM, q.shape[-1] // ATOM)
    if order == "wgmma8":  # n w r g k j h t p -> n k w g t j h r p
        fragments = q.reshape(-1, n, 4, 2, 8, k, 2, 2, 4, 4).permute(0, 1, 5, 2, 4, 8, 6, 7, 3, 9)
    else:  # n w r g k j t e -> n k w g t r j e
        fragments = q.reshape(-1, n, 4, 2, 8, k, 2, 4, 8).permute(0, 1, 5, 2, 4, 7, 3, 6, 8)
    low, high = fragments.reshape(*lead, n, k, 512, 2, 4).unbind(-2)
    return (low | high << 4).reshape(*lead, n, k, 2048)


def _nibbles(words: Tensor, order: str) -> Tensor:
    """The inverse of `_words`."""
    lead, (n, k) = words.shape[:-3], words.shape[-3:-1]
    octets = words.reshape(-1, n, k, 512, 4)
    e = torch.stack((octets & 15, octets >> 4), -2)
    if order == "wgmma8":  # n k w g t j h r p -> n w r g k j h t p
        q = e.reshape(-1, n, k, 4, 8, 4, 2, 2, 2, 4).permute(0, 1, 3, 8, 4, 2, 6, 7, 5, 9)
    else:  # n k w g t r j e -> n w r g k j t e
        q = e.reshape(-1, n, k, 4, 8, 4, 2, 2, 8).permute(0, 1, 3, 6, 4, 2, 7, 5, 8)
    return q.reshape(*lead, n * ATOM, k * ATOM)
