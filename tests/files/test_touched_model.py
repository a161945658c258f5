"""A model is touched while it is read: nothing is made of two models, and what is done stays."""

import errno
import os
import shutil

import pytest
from model_folders import contents, refused

import qlab
from qlab.files import directory
from qlab.files.directory import locate, read_header
from qlab.files.tensors import read
from qlab.files.writer import Writer

INT4 = qlab.rtn(qlab.parse_spec("int4-g16"))
TOUCHED = "was changed or replaced while the model was read"


@pytest.fixture
def model(saved, tmp_path):
    """A model in several files."""
    return shutil.copytree(saved("llama", shard_size="100KB"), tmp_path / "model")


def grown(file):
    file.write_bytes(file.read_bytes() + b"0")


def truncated(file):
    os.truncate(file, file.stat().st_size - 1)


def changed(file):
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def replaced(file):
    changed(shutil.copyfile(file, file.with_suffix(".new")))
    os.replace(file.with_suffix(".new"), file)


@pytest.mark.parametrize("touch", [grown, truncated, changed, replaced])
def test_a_file_that_is_touched_is_refused_and_what_is_done_stays(touch, model, tmp_path):
    files = sorted(model.glob("*.safetensors"))
    qlab.quantize_files(model, INT4, tmp_path / "whole")
    kept, real = files[-1].read_bytes(), Writer.write_notes

    def write_notes(writer, index, notes):
        real(writer, index, notes)
        touch(files[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "write_notes", write_notes)
        refused(lambda: qlab.quantize_files(model, INT4, tmp_path / "out"), files[-1].name, TOUCHED)
    files[-1].write_bytes(kept)
    done = list((tmp_path / "out.partial" / ".work").glob("notes-*"))
    assert len(done) == len(files) - 1 > 1
    qlab.quantize_files(model, INT4, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_disk_that_fails_once_costs_no_finished_part(model, tmp_path, monkeypatch):
    real, is_same = Writer.write_notes, directory.Seen.is_same

    def failing(seen, file):
        monkeypatch.setattr(directory.Seen, "is_same", is_same)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def write_notes(writer, index, notes):
        real(writer, index, notes)
        monkeypatch.setattr(Writer, "write_notes", real)
        monkeypatch.setattr(directory.Seen, "is_same", failing)

    monkeypatch.setattr(Writer, "write_notes", write_notes)
    run = lambda **options: qlab.quantize(qlab.open(model), INT4, None, tmp_path / "out", **options)
    refused(run, "cannot be read (Input/output error)", "--resume")
    done = sorted((tmp_path / "out.partial" / ".work").glob("notes-*"))
    assert [path.name for path in done] == ["notes-00000.json"]
    run(resume=True)


def test_files_of_one_size_and_time_that_change_places_are_told_apart(model):
    files = sorted(model.glob("*.safetensors"))
    stored = locate(model)
    shutil.copyfile(files[0], model / "copy")
    header = read_header(files[0])
    changed_header = (model / "copy").read_bytes().replace(b"weight", b"weighs")
    (model / "copy").write_bytes(changed_header)
    seen = next(iter(header.values())).seen
    os.utime(model / "copy", ns=(seen.modified, seen.modified))
    os.replace(model / "copy", files[0])
    name = next(name for name in stored if stored[name].file == files[0])
    refused(lambda: read(name, stored[name]), TOUCHED)


def test_a_file_that_the_file_system_numbers_anew_is_the_same_file(model):
    stored = locate(model)
    name, tensor = next(iter(stored.items()))
    before = read(name, tensor)
    shutil.copy2(tensor.file, model / "copy")
    os.replace(model / "copy", tensor.file)
    assert read(name, tensor).equal(before)
