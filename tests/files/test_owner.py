"""One run owns a work folder: a second one is refused whatever it asks for and whenever it starts,
and the result is one run's."""

import os
import shutil
import signal
import threading
from functools import partial

import pytest
from killing import finish, start
from model_folders import contents, refused

from qlab.algebra.spec import parse_spec
from qlab.directories.convert import convert
from qlab.directories.model_free import quantize_files
from qlab.driver.quantize import compare, quantize
from qlab.files import work_folder, workplace
from qlab.files.checkpoint import open_checkpoint
from qlab.files.writer import Writer
from qlab.methods.rtn import rtn

INT4, INT8 = (rtn(parse_spec(name)) for name in ("int4-g16", "int8-g16"))
BUSY = "another run is writing to"


@pytest.fixture(scope="module")
def model(saved):
    return open_checkpoint(saved("llama"))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return contents(quantize(model, INT4, None, tmp_path_factory.mktemp("whole") / "out").path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def second(model, saved, tmp_path_factory):
    """Every run that could come in between: name -> run(out)."""
    quantized = quantize(model, INT8, None, tmp_path_factory.mktemp("second") / "q").path
    return {
        "the same": lambda out: quantize(model, INT4, None, out),
        "another recipe": lambda out: quantize(model, INT8, None, out),
        "resumed": lambda out: quantize(model, INT4, None, out, resume=True),
        "overwriting": lambda out: quantize(model, INT8, None, out, overwrite=True),
        "both": lambda out: quantize(model, INT4, None, out, overwrite=True, resume=True),
        "a comparison": lambda out: compare(model, {out.name: INT8}, None, out.parent),
        "without a model": lambda out: quantize_files(saved("llama"), INT8, out, overwrite=True),
        "a conversion": lambda out: convert(quantized, "gptq", out, overwrite=True),
    }


def test_nobody_comes_in_while_a_block_is_written(model, whole, second, out, monkeypatch):
    real, tried = Writer.write_notes, []

    def write_notes(writer, index, notes):
        monkeypatch.setattr(Writer, "write_notes", real)
        for run in second.values():
            refused(lambda run=run: run(out), BUSY, "out.partial", "wait until it ends")
            tried.append(run)
        real(writer, index, notes)

    monkeypatch.setattr(Writer, "write_notes", write_notes)
    quantize(model, INT4, None, out)
    assert len(tried) == len(second) and contents(out) == whole


@pytest.mark.parametrize("name", ["the same", "resumed", "overwriting", "both"])
@pytest.mark.parametrize(
    "moment",
    [
        "before the swap",
        "within the swap",
        "after the swap",
        "while it clears up",
        "at its very end",
    ],
)
def test_nobody_comes_in_at_the_end(moment, name, model, whole, second, out, monkeypatch):
    replace, remove, said = os.replace, workplace.remove_work_folder, []
    quantize(model, INT8, None, out)

    def come(now):
        if now == moment and not said:
            said.append(None)
            try:
                second[name](out)
            except ValueError as error:
                said.append(str(error))

    def replacing(source, target):
        come("before the swap" if source == out else "")
        come("within the swap" if target == out else "")
        replace(source, target)
        come("after the swap" if target == out else "")

    def removing(work):
        if work.parent == out:
            come("while it clears up")
            for path in work.iterdir():
                if path.name not in (work_folder.LOCK, work_folder.JOB):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            come("at its very end")
        remove(work)

    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(workplace, "remove_work_folder", removing)
    quantize(model, INT4, None, out, overwrite=True)
    assert len(said) == 2 and (
        BUSY in said[1] or ("exists and holds" in said[1] and name == "the same")
    )
    assert contents(out) == whole and [path.name for path in out.parent.iterdir()] == ["out"]


def test_nobody_comes_in_while_an_earlier_run_is_cleared_away(
    model, whole, second, out, monkeypatch
):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "write_notes", stop)
        quantize(model, INT8, None, out)
    real, tried = workplace.delete, []

    def delete(path):
        for run in () if tried else second.values():
            tried.append(run)
            refused(lambda run=run: run(out), BUSY)
        real(path)

    monkeypatch.setattr(workplace, "delete", delete)
    quantize(model, INT4, None, out)
    assert tried and contents(out) == whole


def test_of_many_at_once_one_run_goes_through(model, whole, out):
    ends, ready = [], threading.Barrier(4)

    def run(resume):
        ready.wait()
        try:
            ends.append(quantize(model, INT4, None, out, resume=resume).path)
        except ValueError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=run, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert out in ends and all(
        end == out or BUSY in end or "exists and holds" in end for end in ends
    )
    assert contents(out) == whole and [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_process_that_dies_lets_go(model, whole, out):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def killed():
        Writer.write_notes = die
        quantize(model, INT4, None, out)

    assert finish(start(killed)) == -signal.SIGKILL
    quantize(model, INT4, None, out, resume=True)
    assert contents(out) == whole


def test_another_process_is_kept_out_too(model, whole, out, monkeypatch):
    real = Writer.write_notes

    def busy():
        refused(lambda: quantize(model, INT8, None, out, overwrite=True), BUSY)

    def write_notes(writer, index, notes):
        monkeypatch.setattr(Writer, "write_notes", real)
        assert finish(start(busy)) == 0
        real(writer, index, notes)

    monkeypatch.setattr(Writer, "write_notes", write_notes)
    quantize(model, INT4, None, out)
    assert contents(out) == whole


def test_a_run_whose_folder_was_taken_away_writes_nothing_into_the_next_ones(
    model, whole, out, monkeypatch
):
    real = Writer.write_notes

    def write_notes(writer, index, notes):
        monkeypatch.setattr(Writer, "write_notes", real)
        shutil.rmtree(out.with_name("out.partial"))
        quantize(model, INT4, None, out)
        real(writer, index, notes)

    monkeypatch.setattr(Writer, "write_notes", write_notes)
    refused(
        partial(quantize, model, INT8, None, out), "out.partial was taken away while it was written"
    )
    assert contents(out) == whole


def test_a_second_run_that_is_refused_leaves_no_folders(model, out, monkeypatch):
    real = Writer.write_notes

    def write_notes(writer, index, notes):
        monkeypatch.setattr(Writer, "write_notes", real)
        there = out.parent / "deep"
        refused(lambda: compare(model, {"a": INT4, "out": INT4}, None, out.parent), BUSY)
        refused(lambda: quantize(model, INT4, None, there / "er" / "q", memory=1), "the budget")
        assert sorted(path.name for path in out.parent.iterdir()) == ["out.partial"]
        real(writer, index, notes)

    monkeypatch.setattr(Writer, "write_notes", write_notes)
    quantize(model, INT4, None, out)
