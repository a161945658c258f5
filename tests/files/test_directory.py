"""What lies in a directory is read from headers alone, and nothing in a header is believed before
it is checked."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_folders import bits_equal, refused
from safetensors.torch import load_file, save

from qlab.errors import QlabError
from qlab.files.directory import INDEX, LARGEST_JSON, SINGLE, locate, read_header, read_json, unheld
from qlab.files.tensors import DTYPES, read, write

# other processes may take any time of this one
BUSY = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)


def file(header, data=b"", length=None):
    """The bytes of a safetensors file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def some_tensors():
    """One tensor of every dtype, of odd sizes, an empty one and a scalar."""
    numbers = torch.arange(12).view(torch.uint8)
    by_dtype = {
        f"t.{name}": numbers[: 9 * dtype.itemsize].clone().view(dtype)
        for name, dtype in DTYPES.items()
        if name != "BOOL"
    }
    return by_dtype | {
        "flag": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(1.5),
    }


def test_the_safetensors_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    originals = some_tensors()
    write(tmp_path / "ours", iter(originals.items()))
    theirs = load_file(tmp_path / "ours")
    assert theirs.keys() == originals.keys() and all(
        bits_equal(theirs[name], originals[name]) for name in originals
    )
    (tmp_path / "theirs").write_bytes(save(originals))
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        header = read_header(path)
        assert header.keys() == originals.keys() and all(
            bits_equal(read(name, header[name]), originals[name]) for name in originals
        )


def test_every_tensor_is_aligned_to_its_elements(tmp_path):
    odd = torch.zeros(3, dtype=torch.uint8)
    wide = torch.zeros(2, dtype=torch.float64)
    middle = torch.ones(1)
    write(tmp_path / "f", [("odd", odd), ("wide", wide), ("middle", middle)])
    assert all(
        s.start % DTYPES[s.dtype].itemsize == 0 for s in read_header(tmp_path / "f").values()
    )


def test_tensors_are_let_go_of_one_by_one(tmp_path):
    alive = []

    def one_at_a_time():
        for i in range(4):
            tensor = torch.full((1000,), i)
            alive.append(tensor.untyped_storage()._weak_ref())
            yield str(i), tensor
            del tensor
            assert torch.UntypedStorage._expired(alive[-1])

    write(tmp_path / "f", one_at_a_time())
    assert len(alive) == 4 and os.listdir(tmp_path) == ["f"]


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    refused(
        lambda: write(tmp_path / "f", [("x", torch.zeros(1)), ("x", torch.zeros(1))]),
        "x is torch.float32",
        "twice",
    )
    refused(
        lambda: write(tmp_path / "f", [("x", torch.zeros(1, dtype=torch.complex128))]), "complex128"
    )
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (file({}, length=2**60), f"a header of {2**60} bytes"),
        (file({}, length=2**64 - 1), "a header of"),
        (file(b"[" * 200_000), "is truncated or not"),
        (file(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "is truncated or not"),
        (file(b"\xff\xfe{}"), "is truncated or not"),
        (file(b"\xef\xbb\xbf{}"), "is truncated or not"),
        (file("{}".encode("utf-16")), "is truncated or not"),
        (file(b"[]"), "no JSON object"),
        (file({"__metadata__": {"format": 1}}), "__metadata__ is no object of texts"),
        (file({"__metadata__": [1]}), "__metadata__ is no object of texts"),
        (file({"\ud800": entry()}, bytes(8)), "surrogates not allowed"),
        (file({"__metadata__": {"format": "\ud800"}}), "surrogates not allowed"),
        (file(b"9" * 5000), "is truncated or not"),
        (file(b'{"a":1,"a":2}'), "occurs twice"),
        (file({"a": 3}), "'a' is not a dtype"),
        (file({"a": entry() | {"more": 1}}, bytes(8)), "'a' is not a dtype"),
        (file({"a": entry("F33")}, bytes(8)), "unknown dtype 'F33'"),
        (file({"a": entry(["F32"])}, bytes(8)), "unknown dtype"),
        (file({"a": entry(shape=[2**62, 2**62])}, bytes(8)), "has 8 bytes"),
        (file({"a": entry(shape=[2**63])}, bytes(8)), "no proper shape"),
        (file({"a": entry(shape=[-2], offsets=[0, -8])}), "no proper shape"),
        (file({"a": entry(shape=[1] * 65, offsets=[0, 4])}, bytes(4)), "no proper shape"),
        (file({"a": entry(shape=[2.0])}, bytes(8)), "no proper shape"),
        (file({"a": entry(shape=[True], offsets=[0, 4])}, bytes(4)), "no proper shape"),
        (file({"a": entry(offsets=[0, 8, 9])}, bytes(9)), "no proper shape"),
        (file({"a": entry(offsets=[8, 0])}, bytes(8)), "has -8 bytes"),
        (file({"a": entry(offsets=[0, 8])}, bytes(7)), "end at byte"),
        (file({"a": entry(offsets=[0, 8])}, bytes(9)), "end at byte"),
        (file({"a": entry(offsets=[4, 12])}, bytes(12)), "begins at byte"),
        (file({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "begins at byte"),
        (file({"a": entry(), "b": entry(offsets=[2**62, 2**62 + 8])}, bytes(8)), "begins at byte"),
    ],
)
def test_a_header_that_does_not_describe_its_file(content, words, tmp_path):
    (tmp_path / SINGLE).write_bytes(content)
    refused(
        lambda: locate(tmp_path),
        str(tmp_path / SINGLE),
        "truncated or not a safetensors file",
        words,
    )


@given(data=st.data())
@BUSY
def test_a_corrupted_file_is_refused_or_read_within_its_bounds(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / SINGLE
    whole = bytearray(save({"a.weight": torch.ones(3, 4), "b": torch.zeros(5, dtype=torch.uint8)}))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(
        whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole
    )
    try:
        header = locate(path.parent)
    except QlabError as error:
        assert "\n" not in str(error)
    else:
        assert all(
            read(name, stored).nbytes == stored.nbytes <= len(whole)
            for name, stored in header.items()
        )


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(value=st.recursive(PLAIN, lambda v: st.lists(v) | st.dictionaries(st.text(), v)))
@BUSY
def test_any_json_as_a_header_ends_in_one_error_or_no_tensors(value, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / SINGLE
    path.write_bytes(file(value))
    try:
        assert locate(path.parent) == {}
    except QlabError as error:
        assert "truncated or not a safetensors file" in str(error)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "..\\x", 7, None]
)
def test_no_index_leads_out_of_its_directory(name, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    refused(lambda: locate(tmp_path), INDEX, "no plain name of a file")


def test_the_index_decides_between_files_and_may_be_wrong_of_what_one_of_them_holds(tmp_path):
    one = torch.ones(1)
    write(tmp_path / "x.safetensors", [("a", one), ("b", one), ("c", one)])
    write(tmp_path / "y.safetensors", [("a", 2 * one)])
    refused(lambda: locate(tmp_path), "a is in", "x.safetensors", "y.safetensors")
    # b lies in the other file, c is left out, d is nowhere.
    index = {"a": "y.safetensors", "b": "y.safetensors", "d": "x.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    header = locate(tmp_path)
    assert (
        read("a", header["a"]) == 2
        and header["b"].file.name == header["c"].file.name == "x.safetensors"
    )
    assert header.keys() == {"a", "b", "c"} and unheld(tmp_path, header) == {"d": "x.safetensors"}
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"b": "x.safetensors", "c": "y.safetensors"}})
    )
    refused(lambda: locate(tmp_path), "a is in", "x.safetensors", "y.safetensors")


def test_a_pickle_is_named_and_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(
        lambda: locate(tmp_path),
        "pytorch_model.bin",
        "a pickle",
        "convert the model to safetensors",
    )


@pytest.mark.parametrize(
    "text, words",
    [("[" * 100_000, "not valid JSON"), ("[1]", "no JSON object"), ("1" * 5000, "not valid JSON")],
)
def test_json_that_is_no_configuration(text, words, tmp_path):
    (tmp_path / "f.json").write_text(text)
    refused(lambda: read_json(tmp_path / "f.json"), "f.json", words)


def test_a_configuration_of_any_size_is_not_read(tmp_path):
    with (tmp_path / "f.json").open("wb") as f:
        f.truncate(LARGEST_JSON + 1)
    refused(lambda: read_json(tmp_path / "f.json"), f"has {LARGEST_JSON + 1} bytes")
    refused(lambda: read_json(tmp_path / "none.json"), "none.json cannot be read")


def test_a_hundred_shards_are_opened_once_each(tmp_path, monkeypatch):
    names = {f"layer{i}.{j}": f"m-{i:05d}.safetensors" for i in range(100) for j in range(20)}
    for i in range(100):
        write(
            tmp_path / f"m-{i:05d}.safetensors",
            [(f"layer{i}.{j}", torch.zeros(1)) for j in range(20)],
        )
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    opened, real = [], type(tmp_path).open
    monkeypatch.setattr(
        type(tmp_path),
        "open",
        lambda self, *args, **kwargs: opened.append(self.name) or real(self, *args, **kwargs),
    )
    assert len(locate(tmp_path)) == 2000
    assert sorted(n for n in opened if n.endswith(".safetensors")) == sorted(set(names.values()))


def test_a_snapshot_of_links_to_blobs_is_a_directory(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write(tmp_path / "blobs" / "hash", [("a", torch.ones(2))])
    (tmp_path / "snapshot" / SINGLE).symlink_to(Path("..", "blobs", "hash"))
    header = locate(tmp_path / "snapshot")
    assert torch.equal(read("a", header["a"]), torch.ones(2))


@pytest.mark.parametrize("leads", [SINGLE, "nowhere", ".", "/dev/zero"])
def test_a_link_to_no_file_is_no_shard(leads, tmp_path):
    (tmp_path / SINGLE).symlink_to(leads)
    refused(lambda: locate(tmp_path), SINGLE)
