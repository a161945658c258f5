"""Where a result cannot be written, what is there stays as it is, and the run can be continued."""

import errno
import json
import resource

import pytest
import torch
from killing import finish, start
from model_folders import contents, random_tokens, refused

import qlab
from qlab.files.checkpoint import open_checkpoint
from qlab.files.parts import Parts

INT4 = qlab.parse_spec("int4-g16")


def test_an_existing_output_directory_stays_as_it_is(folder, tmp_path):
    out = tmp_path / "q"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    refused(
        lambda: qlab.quantize(open_checkpoint(folder), qlab.rtn(INT4), None, out),
        "q exists",
        "--overwrite",
    )
    assert contents(out) == {"mine.txt": b"precious"}


def test_a_full_disk_leaves_the_former_result_and_can_be_resumed(folder, tmp_path, monkeypatch):
    from qlab.files import segments

    model, out = open_checkpoint(folder), tmp_path / "q"
    qlab.quantize(model, qlab.rtn(INT4), None, out)
    before, write = contents(out), segments.write

    def full(path, tensors):
        if "00003" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(segments, "write", full)
    again = qlab.rtn(qlab.parse_spec("int3-g16"))
    refused(
        lambda: qlab.quantize(model, again, None, out, overwrite=True), "00003", "No space left"
    )
    assert contents(out) == before
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(segments, "write", write)
    qlab.quantize(model, again, None, out, resume=True)
    assert json.loads((out / "qlab.json").read_text())["bits_per_weight"] == 3 + 32 / 16


def test_an_output_that_is_the_model_or_lies_below_a_file(folder):
    before, model = contents(folder), open_checkpoint(folder)
    refused(
        lambda: qlab.quantize(model, qlab.rtn(INT4), None, folder, overwrite=True),
        "is the model itself",
    )
    refused(
        lambda: qlab.quantize(model, qlab.rtn(INT4), None, folder / "config.json" / "q"),
        "q.partial cannot be created",
    )
    assert contents(folder) == before


def test_an_output_around_the_model_is_refused_even_when_it_may_be_overwritten(folder):
    before, model = contents(folder.parent), open_checkpoint(folder)
    refused(
        lambda: qlab.quantize(model, qlab.rtn(INT4), None, folder.parent, overwrite=True),
        "holds the model",
        "choose another",
    )
    assert contents(folder.parent) == before


def test_an_output_that_cannot_be_put_in_place_can_be_resumed(folder, tmp_path, monkeypatch):
    from qlab.files import writer

    rename, out = writer.os.replace, tmp_path / "q"

    def busy(source, target):  # as where a file system is mounted
        if target == out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(writer.os, "replace", busy)
    refused(
        lambda: qlab.quantize(open_checkpoint(folder), qlab.rtn(INT4), None, out),
        "q cannot be put in place",
        "busy",
        "--resume",
    )
    monkeypatch.setattr(writer.os, "replace", rename)
    assert (
        qlab.quantize(open_checkpoint(folder), qlab.rtn(INT4), None, out, resume=True).path == out
    )


# These limits stop the job file, the report, the hidden states and a shard.
@pytest.mark.parametrize("limit", [100, 4000, 12000, 30000])
def test_files_that_the_system_refuses_to_let_grow(folder, tmp_path, limit):
    out, recipe = tmp_path / "out", qlab.gptq(INT4)
    job = lambda out, **options: qlab.quantize(
        open_checkpoint(folder), recipe, random_tokens(folder), out, **options
    )

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        refused(
            lambda: job(out, overwrite=True),
            "cannot be written",
            "File too large",
            "free some space",
        )

    job(tmp_path / "whole")
    before = contents(qlab.quantize(open_checkpoint(folder), qlab.rtn(INT4), None, out).path)
    assert finish(start(limited)) == 0
    assert contents(out) == before
    assert not list(tmp_path.rglob("*.tmp"))
    job(out, overwrite=True, resume=True)
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


# The disk is full while tensors are taken, or when the last of them leave the buffer of their file.
@pytest.mark.parametrize("sizes", [(10007, 10007), (19990, 100)])
def test_tensors_that_wait_for_their_file_on_a_full_disk_are_let_go_of(tmp_path, sizes):
    parts = Parts(tmp_path, 1)
    tensors = [(f"of {i}", torch.zeros(n, dtype=torch.uint8)) for i, n in enumerate(sizes)]

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        refused(
            lambda: parts.write_spool(0, parts.spooled(0, tensors)),
            "cannot be written",
            "File too large",
            "free some space",
        )

    assert finish(start(limited)) == 0
    assert not list(tmp_path.iterdir())
