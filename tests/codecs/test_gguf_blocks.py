"""GGUF's blocks: bytes by hand, damage, and leaves that no block holds."""

import pytest
import torch
from model_folders import refused

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Tile, parse_spec
from qlab.codecs.gguf_blocks import decode, encode, misfit, refusal, spec_of

ONE = [0x00, 0x3C]  # 1.0 as float16
COLUMNS = torch.arange(32, dtype=torch.int8)


def leaf(codes, bits):
    return QTensor(codes[None], torch.ones(1, 1, dtype=torch.float16), None, spec_of(bits))


def test_blocks_are_as_by_hand():
    four = encode("m", leaf(COLUMNS % 16 - 8, 4))["m.weight"]
    # columns i and i + 16 share a byte, and both hold i - 8
    assert four.tolist() == [ONE + [i | i << 4 for i in range(16)]]
    eight = encode("m", leaf(COLUMNS - 128, 8))["m.weight"]
    assert eight.tolist() == [ONE + list(range(128, 160))]
    halves = torch.cat([torch.full((16,), -8), torch.full((16,), 7)]).to(torch.int8)
    assert encode("m", leaf(halves, 4))["m.weight"].tolist() == [ONE + [0xF0] * 16]


@pytest.mark.parametrize("bits", [4, 8])
def test_damaged_tensors_are_refused(bits):
    tensors = encode("m", leaf(COLUMNS % 8, bits))
    spec, whole = spec_of(bits), tensors["m.weight"]
    assert decode("m", tensors, spec).codes.equal(COLUMNS[None] % 8)
    refused(lambda: decode("m", {"m.weight": whole[:, 1:]}, spec), "do not fill")
    refused(lambda: decode("m", {"m.weight": whole.to(torch.int8)}, spec), "torch.int8")
    refused(lambda: decode("m", {}, spec), "m.weight is missing")
    refused(lambda: decode("m", tensors | {"m.scales": whole}, spec), "m.scales has no place")


def test_what_no_block_holds_is_refused():
    assert refusal(parse_spec("int4-g32")) is refusal(parse_spec("int8-g32")) is None
    assert "its blocks hold int8-g32" in str(refusal(parse_spec("int8-channel")))
    assert "float16 ones" in str(refusal(Int(4, Tile(1, 32), scale_dtype=torch.bfloat16)))
    assert "fold them" in str(refusal(parse_spec("int4-g32"), [None]))
    assert "holds integers of 4 or 8 bits" in str(refusal(parse_spec("nvfp4")))
    assert "40 input channels" in str(misfit(spec_of(4), torch.Size([8, 40])))
    swapped = leaf(COLUMNS % 8, 4)
    swapped = QTensor(
        swapped.codes, swapped.scales, None, swapped.spec, perm=torch.arange(31, -1, -1)
    )
    refused(lambda: encode("m", swapped), "order of their own")
    refused(lambda: encode("m", leaf(COLUMNS, 4)), "codes span [0, 31]")
