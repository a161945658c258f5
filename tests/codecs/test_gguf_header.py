"""A GGUF header that says other than the file holds is refused before a reader believes it."""

import struct

import gguf
import numpy as np
import pytest

from qlab.codecs.gguf import SIZES
from qlab.codecs.gguf_header import check

U32, U64 = "<I", "<Q"


def text(value):
    return struct.pack(U64, len(value)) + value


def tensor(name=b"a", shape=(32,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def key(name=b"k", kind=4, value=bytes(4)):
    return text(name) + struct.pack(U32, kind) + value


def file(keys=(), tensors=None, data=bytes(128), version=3, counts=None):
    """A file by the format's description: one float32 tensor of 32 numbers."""
    tensors = (tensor(),) if tensors is None else tensors
    count = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, *count) + b"".join([*keys, *tensors])
    return head + bytes(-len(head) % 32) + data


def many(inner, count, values=b""):
    return struct.pack("<IQ", inner, count) + values


SOUND = {
    "one tensor": file(),
    "no tensor": file(tensors=(), data=b""),
    "a list of numbers": file([key(kind=9, value=many(4, 3, bytes(12)))]),
    "lists in a list": file([key(kind=9, value=many(9, 2, many(4, 0) + many(8, 1, text(b"x"))))]),
    "two tensors": file(tensors=(tensor(), tensor(b"b", offset=128)), data=bytes(256)),
    "one of 36 bytes": file(tensors=(tensor(shape=(9,)), tensor(b"b", offset=64)), data=bytes(192)),
}
BROKEN = {
    "a list without end": (file([key(kind=9, value=many(4, 2**60))]), "bytes follow"),
    "texts without end": (file([key(kind=9, value=many(8, 2**60, text(b"x")))]), "bytes follow"),
    "a text without end": (file([key(kind=8, value=struct.pack(U64, 2**60))]), "bytes follow"),
    "lists too deep": (file([key(kind=9, value=many(9, 1) * 5 + many(4, 0))]), "unknown type 9"),
    "an unknown type": (file([key(kind=77)]), "unknown type 77"),
    "more keys than there are": (file(counts=(1, 2**60)), "occurs twice"),
    "more tensors than there are": (file(counts=(2**60, 0)), ""),
    "a key twice": (file([key(), key()]), "'k' occurs twice"),
    "a tensor twice": (file(tensors=(tensor(), tensor(offset=128))), "'a' occurs twice"),
    "tensors that overlap": (
        file(tensors=(tensor(), tensor(b"b")), data=bytes(256)),
        "'b' begins at 0 of the data and not at 128",
    ),
    "a tensor behind the file": (file(data=bytes(127)), "'a' ends behind the file"),
    "a product beyond 64 bits": (file(tensors=(tensor(shape=(2**32, 2**32)),)), "behind the file"),
    "no axes": (file(tensors=(tensor(shape=()),)), "0 axes"),
    "five axes": (file(tensors=(tensor(shape=(32, 1, 1, 1, 1)),)), "5 axes"),
    "an empty axis": (file(tensors=(tensor(shape=(32, 0)),), data=b""), "blocks of 1 "),
    "half a block": (file(tensors=(tensor(shape=(33,), kind=2),)), "blocks of 32"),
    "an unknown kind": (file(tensors=(tensor(kind=99),)), "unknown kind 99"),
    "an alignment of 3": (
        file([key(b"general.alignment", 4, struct.pack(U32, 3))]),
        "power of two",
    ),
    "an alignment in 64 bits": (
        file([key(b"general.alignment", 10, struct.pack(U64, 32))]),
        "power of two",
    ),
    "another byte order": (file(version=3 << 24), "version"),
    "a name that is no text": (file(tensors=(tensor(b"\xff"),)), "utf-8"),
    "another magic": (b"GGML" + file()[4:], "begin with GGUF"),
    "an end in its header": (file()[:30], "bytes follow"),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_file_passes_and_the_package_reads_it(name, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(SOUND[name])
    check(path, SIZES)
    for tensor_read in gguf.GGUFReader(path).tensors:
        assert np.array_equal(tensor_read.data, np.zeros(tensor_read.shape, dtype=np.float32))


@pytest.mark.parametrize("name", BROKEN)
def test_a_header_that_says_other_than_the_file_holds(name, tmp_path):
    content, words = BROKEN[name]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        check(tmp_path / "m.gguf", SIZES)
