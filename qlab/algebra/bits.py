"""Dense bit streams: code i of a row occupies bits [i*b, (i+1)*b) of one little-endian integer, cut
into int32 words.

Several formats store codes this way and differ only in the axis that they pack. Tensors are viewed
in wider and narrower words, so the host is little-endian, as every machine that torch ships for is.

A *lane* is the fewest codes that are whole bytes together: 2 of 4 bits, 8 of 3 bits. Within it,
codes lie one a byte in one machine word, and packing closes the gaps between neighbours: codes
become pairs, pairs quads, quads octets. All of it is arithmetic on whole words.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.algebra.compiled import kernels

CHUNK = 1 << 20  # codes at a time, few enough to stay in a core's cache with all intermediates
# codes in a lane -> the word that holds them, one a byte
LANES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def words_of(k: int, bits: int) -> int:
    """ceil(k * bits / 32): int32 words that a row of k codes takes."""
    return -(-k * bits // 32)


def unsigned(codes: Tensor, bits: int) -> Tensor:
    """codes + 2^(bits-1): int8 -> uint8. The addition wraps, so it holds for 8 bits too."""
    return codes.contiguous().view(torch.uint8) + 2 ** (bits - 1)


def signed(codes: Tensor, bits: int) -> Tensor:
    """codes - 2^(bits-1): uint8 -> int8, the inverse of unsigned."""
    return (codes - 2 ** (bits - 1)).view(torch.int8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """row = sum_i codes[i] << (i * bits): uint8 [..., k], each below 2^bits -> int32 [...,
    words_of(k, bits)].

    Rows end in zero bits. A code of 2^bits or more would run into its neighbour: callers check
    ranges.
    """
    *rows, k = codes.shape
    lane, size = _lane(bits)
    unaligned = k % 8 or codes.storage_offset() % 8
    padded = F.pad(codes, (0, -k % 8)) if unaligned else codes.contiguous()  # pad copies, aligned
    lanes = padded.view(-1).view(LANES[lane])
    stream = torch.empty((lanes.shape[0], size), dtype=torch.uint8, device=codes.device)
    for x, out in zip(lanes.split(CHUNK // lane), stream.split(CHUNK // lane)):
        for low, gap, width in _steps(bits, lane):
            x = (x & low).bitwise_or_((x & low << width).bitwise_right_shift_(gap))
        if size == 1:
            out[:, 0] = x  # a cast to bytes is faster than a strided copy
        else:
            out.copy_(x.view(torch.uint8).view(-1, lane)[:, :size])
    return _resize(stream.view(*rows, -(-k // 8) * bits), 4 * words_of(k, bits)).view(torch.int32)


def unpack(words: Tensor, bits: int, k: int) -> Tensor:
    """codes[i] = (row >> (i * bits)) & (2^bits - 1): int32 [..., words_of(k, bits)] -> uint8 [...,
    k]."""
    *rows, _ = words.shape
    lane, size = _lane(bits)
    # via one axis: an axis of size 1 may have any stride, and a view as bytes refuses that
    flat = words.contiguous().view(-1).view(torch.uint8)
    in_rows = flat.view(*words.shape[:-1], 4 * words.shape[-1])
    stream = _resize(in_rows, -(-k // 8) * bits).view(-1, size)
    lanes = torch.empty(stream.shape[0], dtype=LANES[lane], device=words.device)
    for packed, x in zip(stream.split(CHUNK // lane), lanes.split(CHUNK // lane)):
        if size == 1:
            x.copy_(packed[:, 0])
        else:
            x.zero_().view(torch.uint8).view(-1, lane)[:, :size] = packed
        for low, gap, width in reversed(_steps(bits, lane)):
            upper = (x << gap).bitwise_and_(low << width)
            x.bitwise_and_(low).bitwise_or_(upper)
    return lanes.view(torch.uint8).view(*rows, -(-k // 8) * 8)[..., :k].contiguous()


def pack_signed(codes: Tensor, bits: int) -> Tensor:
    """pack for int8 codes [..., k] of a symmetric range: the stream holds codes + 2^(bits-1)."""
    compiled = kernels()
    if compiled is not None and compiled.packs(codes, bits):
        return compiled.pack(codes, bits)
    return pack(unsigned(codes, bits), bits)


def unpack_signed(words: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of pack_signed: int8 [..., k]."""
    compiled = kernels()
    if compiled is not None and k * bits == 32 * words.shape[-1] and compiled.unpacks(words, bits):
        return compiled.unpack(words, bits)
    return unpack(words, bits, k).sub_(2 ** (bits - 1)).view(torch.int8)


def _lane(bits: int) -> tuple[int, int]:
    """The codes in a lane, and the bytes that they are packed into."""
    return 8 // math.gcd(bits, 8), bits // math.gcd(bits, 8)


def _steps(bits: int, lane: int) -> list[tuple[int, int, int]]:
    """The steps of packing: the mask of the lower fields, the gap above them that is closed, and
    the distance in bits from a lower field to its upper one."""
    steps = []
    for width in (8, 16, 32):
        if width >= 8 * lane:
            break
        used = bits * width // 8
        low = sum((2**used - 1) << at for at in range(0, 8 * lane, 2 * width))
        steps.append((low, width - used, width))
    return steps


def _resize(stream: Tensor, size: int) -> Tensor:
    """The stream with its last axis cut or filled with zeros to `size`. Only padding is cut."""
    if stream.shape[-1] == size:
        return stream
    # a new tensor, since views in wider words need contiguous strides
    resized = stream.new_zeros((*stream.shape[:-1], size))
    kept = min(size, stream.shape[-1])
    resized[..., :kept] = stream[..., :kept]
    return resized
