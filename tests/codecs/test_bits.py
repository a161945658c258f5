"""The dense bit stream: golden words, and the packer of compressed-tensors beside ours."""

import pytest
import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from leaves import hexes

from qlab.algebra.bits import (
    CHUNK,
    pack,
    pack_signed,
    signed,
    unpack,
    unpack_signed,
    unsigned,
    words_of,
)


@pytest.mark.parametrize(
    "bits, words",
    [
        (2, "e4e4e4e4 e4e4e4e4"),
        (3, "88fac688 c688fac6 fac688fa"),
        (4, "76543210 fedcba98 76543210 fedcba98"),
        (5, "8a418820 c5a92839 ca307b9a 38bdab49 ffbbcdeb"),
        (6, "440c2040 a2481c61 3ce34c2c 544d2450 a6585d65 7de75c6d"),
        (7, "40608080 880e1828 68c16284 88901e38 58a94264 668c982e 3e78e9c3"),
        (8, "03020100 07060504 0b0a0908 0f0e0d0c 13121110 17161514 1b1a1918 1f1e1d1c"),
    ],
)
def test_dense_streams_have_the_golden_words(bits, words):
    codes = (torch.arange(32) % 2**bits).to(torch.uint8)
    assert hexes(pack(codes, bits)) == words
    assert torch.equal(unpack(pack(codes, bits), bits, 32), codes)


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 100))
def test_the_librarys_packers_agree(bits, o, k):
    unsigned = torch.randint(2**bits, (o, k), generator=torch.Generator().manual_seed(k)).to(
        torch.uint8
    )
    codes, words = (unsigned.short() - 2 ** (bits - 1)).to(torch.int8), pack(unsigned, bits)
    assert words.shape == (o, words_of(k, bits)) and torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)
    assert torch.equal(unpack(words, bits, k), unsigned)


@pytest.mark.parametrize("bits", range(1, 9))
def test_streams_longer_than_a_chunk_and_codes_anywhere_in_memory_pack_alike(bits):
    codes = torch.randint(
        2**bits, (3, CHUNK // 2), generator=torch.Generator().manual_seed(bits)
    ).to(torch.uint8)
    words = pack(codes, bits)
    for i in range(3):
        # The row starts between two words.
        row = torch.cat([torch.zeros(3, dtype=torch.uint8), codes[i]])[3:]
        assert torch.equal(pack(row, bits), words[i])
        assert torch.equal(pack(codes.mT.contiguous().mT, bits), words)
    assert torch.equal(unpack(words, bits, CHUNK // 2), codes)
    assert torch.equal(unpack(words.mT.contiguous().mT, bits, CHUNK // 2), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_signed_codes_are_unsigned_ones_moved_down(bits):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8)
    assert unsigned(codes, bits).tolist() == list(range(2**bits))
    assert torch.equal(signed(unsigned(codes, bits), bits), codes)
    assert torch.equal(pack_signed(codes, bits), pack(unsigned(codes, bits), bits))
    assert torch.equal(unpack_signed(pack_signed(codes, bits), bits, 2**bits), codes)
