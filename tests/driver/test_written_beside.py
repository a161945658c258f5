"""Without data a block is written while the next one is solved: in whatever order the two come, the
bytes, what a kill leaves and what is refused are those of one after the other."""

from functools import partial
from threading import Event, current_thread, main_thread

import pytest
from killing import KILLED, dying, finish, start
from model_folders import contents, random_tokens, refused

from qlab.algebra.spec import parse_spec
from qlab.driver import run, segments
from qlab.driver.quantize import quantize
from qlab.errors import Unwritable
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn


@pytest.fixture(scope="module")
def job(saved):
    """job(out, **options): three blocks by a method without data."""
    model = open_checkpoint(saved("llama", num_hidden_layers=3))
    return lambda out, **options: quantize(model, rtn(parse_spec("int4-g16")), None, out, **options)


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """What an uninterrupted run writes."""
    return contents(job(tmp_path_factory.mktemp("whole") / "out").path)


def test_a_block_is_read_before_the_one_before_it_is_written(job, whole, tmp_path, monkeypatch):
    last_is_read, load, check = Event(), segments.load_block, run.refuse_misread
    overlapped = []

    def loading(skeleton, path, *more, **options):
        if path == list(skeleton.blocks)[2]:
            last_is_read.set()
        return load(skeleton, path, *more, **options)

    def checking(shard, *more):
        if shard.name.startswith("model-00003"):  # of the second block
            overlapped.append(last_is_read.wait(60))
        check(shard, *more)

    monkeypatch.setattr(segments, "load_block", loading)
    monkeypatch.setattr(run, "refuse_misread", checking)
    assert contents(job(tmp_path / "out").path) == whole
    assert overlapped == [True]


@pytest.mark.parametrize("point", [2, 4, 6, 8])
def test_killed_before_a_rename_and_resumed(point, job, whole, tmp_path):
    out = tmp_path / "out"
    assert finish(start(dying(partial(job, out), point, "before"))) == KILLED
    assert not out.exists()
    job(out, resume=True)
    assert contents(out) == whole


def test_a_block_that_is_not_written_ends_the_run(job, whole, tmp_path, monkeypatch):
    """Blocks before it stay, and a later run goes on behind them."""
    check = run.refuse_misread

    def refusing(shard, *more):
        if shard.name.startswith("model-00003"):
            raise Unwritable("the second block is not written")
        check(shard, *more)

    with monkeypatch.context() as patched:
        patched.setattr(run, "refuse_misread", refusing)
        refused(lambda: job(tmp_path / "out"), "the second block is not written")
    written = []
    monkeypatch.setattr(run, "_write", noting(written, run._write))
    job(tmp_path / "out", resume=True)
    assert written == [2, 3] and contents(tmp_path / "out") == whole


def test_with_data_a_block_is_written_by_the_thread_that_solves(saved, tmp_path, monkeypatch):
    """Which has all of torch's threads to itself."""
    model, write, wrote = open_checkpoint(saved("llama")), run._write, []

    def noted(of_run, solved):
        wrote.append(current_thread() is main_thread())
        write(of_run, solved)

    monkeypatch.setattr(run, "_write", noted)
    data = random_tokens(model.path, 2, 8)
    quantize(model, gptq(parse_spec("int4-g16")), data, tmp_path / "out")
    assert wrote == [True, True]


def noting(numbers, write):
    """`write`, with the number of each segment noted."""

    def noted(of_run, solved):
        numbers.append(solved.number)
        write(of_run, solved)

    return noted
