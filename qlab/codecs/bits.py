"""Dense bit streams: code i of a row occupies bits [i*b, (i+1)*b) of one little-endian integer, cut into int32 words.

Several formats store codes this way and differ only in the axis that they pack. Tensors are viewed as bytes, so the
host is little-endian, as every machine that torch ships for is.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def words_of(k: int, bits: int) -> int:
    """ceil(k * bits / 32): int32 words that a row of k codes takes."""
    return -(-k * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """row = sum_i codes[i] << (i * bits): uint8 [..., k], each below 2^bits -> int32 [..., words_of(k, bits)].

    Rows end in zero bits. A code of 2^bits or more would run into its neighbour: callers check ranges.
    """
    k = codes.shape[-1]
    # Eight codes are `bits` whole bytes: in groups of eight nothing straddles.
    lanes = rearrange(F.pad(codes, (0, -k % 8)), "... (n lane) -> lane ... n", lane=8)
    octets = torch.zeros(lanes.shape[1:], dtype=torch.int64, device=codes.device)
    for i, lane in enumerate(lanes):
        octets |= lane.to(torch.int64) << (i * bits)
    stream = rearrange(octets[..., None].view(torch.uint8)[..., :bits], "... n b -> ... (n b)")
    return _resize(stream, 4 * words_of(k, bits)).view(torch.int32)


def unpack(words: Tensor, bits: int, k: int) -> Tensor:
    """codes[i] = (row >> (i * bits)) & (2^bits - 1): int32 [..., words_of(k, bits)] -> uint8 [..., k]."""
    n = -(-k // 8)
    stream = rearrange(_resize(words.contiguous().view(torch.uint8), n * bits), "... (n b) -> ... n b", n=n)
    octets = _resize(stream, 8).view(torch.int64)
    codes = torch.empty((*words.shape[:-1], n, 8), dtype=torch.uint8, device=words.device)
    for i in range(8):
        codes[..., i] = ((octets[..., 0] >> (i * bits)) & (2**bits - 1)).to(torch.uint8)
    return rearrange(codes, "... n lane -> ... (n lane)")[..., :k].contiguous()


def _resize(stream: Tensor, size: int) -> Tensor:
    """The stream with its last axis cut or filled with zeros to `size`; what is cut is padding."""
    resized = stream.new_zeros((*stream.shape[:-1], size))  # a new tensor: views in wider words need plain strides
    kept = min(size, stream.shape[-1])
    resized[..., :kept] = stream[..., :kept]
    return resized
