"""work: the runs of a shared folder, whoever does which part of them, give the bytes of one
process."""

import errno
import fcntl
import importlib
import json
import os
import shutil

import pytest
from killing import KILLED, dying, finish, start
from model_folders import change, contents, refused, rewrite

import qlab
import qlab.cli.working
import qlab.driver.batches
import qlab.driver.observe
import qlab.driver.write
from qlab.cli.working import work
from qlab.driver.pieces import Blocks
from qlab.files.ownership import sealed
from qlab.files.parts import claimed

DATA_FREE = ("--method", "rtn")
REFERENCE = ("--method", "gptq", "--inputs", "reference")
RUNS = {
    "data-free": DATA_FREE,
    "of stored statistics": REFERENCE,
    "from files": ("--model-free",),
    "block after block": ("--method", "gptq"),
}


@pytest.fixture(scope="module")
def model(saved):
    return saved("llama", num_hidden_layers=3, shard_size="100KB")


@pytest.fixture
def quantize(model, text, command, tmp_path):
    """quantize(out, *words) -> what the command said; it succeeds, or is refused by that."""

    def run(out, *words, ends=0):
        said = ["--calib", text, "--samples", 4, "--length", 16] if "gptq" in words else []
        options = ["--spec", "int4-g16", "--out", tmp_path / out, *words, *said]
        code, _, error = command(qlab.cli.main, "quantize", model, *options)
        assert code == ends, error
        return error

    return run


@pytest.fixture
def jobs(quantize, tmp_path):
    """jobs(*words) -> the shared folder with a run that writes to "out"."""

    def add(*words, out="out"):
        quantize(out, *words, "--jobs", tmp_path / "jobs")
        return tmp_path / "jobs"

    return add


def interrupted(monkeypatch, act):
    """Call act() in the middle of the first piece that is made."""
    acts = [act]
    make = Blocks.make

    def making(self, parts, index):
        if acts:
            acts.pop()()
        make(self, parts, index)

    monkeypatch.setattr(Blocks, "make", making)


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_one_shard_makes_all_that_nobody_makes(words, jobs, quantize, tmp_path):
    quantize("alone", *words)
    folder = jobs(*words)
    worked = work(folder, shard=(2, 3))
    assert worked.whole == (tmp_path / "out",) and worked.left == {}
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert work(folder).made == 0


@pytest.mark.parametrize(("words", "shard"), [(DATA_FREE, (2, 3)), (REFERENCE, (1, 3))])
def test_others_at_the_same_time_make_the_rest(words, shard, jobs, quantize, tmp_path, monkeypatch):
    """Twice the same shard, too: the piece that one is at is left to it."""
    quantize("alone", *words)
    folder, others = jobs(*words), []
    interrupted(monkeypatch, lambda: others.append(work(folder, shard=shard)))
    worked = work(folder, shard=(2, 3))
    assert worked.made == 1 and worked.whole == (tmp_path / "out",)
    assert others[0].made == 3 and others[0].left == {tmp_path / "out": 1}
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_without_locks_work_is_done_twice_and_nothing_else(jobs, quantize, tmp_path, monkeypatch):
    quantize("alone", *DATA_FREE)

    def no_lock(handle, how):
        if how & fcntl.LOCK_NB and "claims" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOLCK, "No locks available")
        return flock(handle, how)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", no_lock)
    folder, others = jobs(*DATA_FREE), []
    interrupted(monkeypatch, lambda: others.append(work(folder)))
    assert work(folder).whole == others[0].whole == (tmp_path / "out",)
    assert others[0].made == 4
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_killed_again_and_again_and_started_again(jobs, quantize, tmp_path):
    quantize("alone", *DATA_FREE)
    folder, lives = jobs(*DATA_FREE), 0
    # each lives a little longer: the end of a run is begun anew
    while status := finish(start(dying(lambda: work(folder), 4 + 3 * lives, "after"))):
        assert status == KILLED
        lives += 1
    assert lives > 2
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("before", [0, 1])
def test_one_that_comes_when_a_run_is_noted_as_whole_makes_nothing_again(before, tmp_path):
    class Noted:
        """A run, and its parts: they go, and it is noted, after the first question, or before."""

        asked = before

        def claim(self, index):
            return tmp_path / "claim"

        @property
        def is_whole(self):
            self.asked += 1
            return self.asked > 1

        def is_written(self, index):
            self.asked += 1
            return self.asked == 1

    run = Noted()
    assert not qlab.cli.working._made(run, None, run, 0)


def test_a_damaged_part_is_named_and_made_again(jobs, quantize, tmp_path, monkeypatch, capsys):
    quantize("alone", *DATA_FREE)
    folder = jobs(*DATA_FREE)
    finish_whole, damaged = Blocks.finish, []

    def damaging(self, parts, out, overwrite):
        if not damaged:
            damaged.append(parts.shard(1))
            damaged[0].write_bytes(damaged[0].read_bytes()[:-1])
        return finish_whole(self, parts, out, overwrite)

    monkeypatch.setattr(Blocks, "finish", damaging)
    assert work(folder).made == 5
    assert str(damaged[0]) in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_another_recipe_in_the_folder_runs_no_block(jobs, tmp_path, monkeypatch):
    work(jobs(*REFERENCE))
    folder = jobs(*REFERENCE, "--asymmetric", out="other")
    for module, name in (
        (qlab.driver.observe, "inputs_of"),
        (qlab.driver.batches, "outputs_of"),
    ):
        monkeypatch.setattr(module, name, None)
    assert {*work(folder).whole} == {tmp_path / "out", tmp_path / "other"}


def test_two_workers_of_dask(jobs, quantize, tmp_path):
    distributed = pytest.importorskip("distributed")
    patient = {f"distributed.comm.timeouts.{name}": "600s" for name in ("connect", "tcp")}
    quantize("alone", *DATA_FREE)
    folder = jobs(*DATA_FREE)
    with (
        importlib.import_module("dask").config.set(patient),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        shards = [client.submit(work, folder, shard=(i, 2), pure=False) for i in (1, 2)]
        worked = client.gather(shards)
    assert sum(each.made for each in worked) >= 4  # what both begin is made twice, alike
    work(folder)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize("shard", ["3/2", "0/2", "1", "a/b", "1/0", "-1/2", "1/2/3", ""])
def test_shards_that_are_none(shard, command, jobs):
    code, _, said = command(qlab.cli.main, "work", jobs(*DATA_FREE), "--shard", shard)
    assert code == 2 and said.count("\n") == 1 and "shard" in said


def test_folders_that_hold_no_runs(tmp_path, quantize):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("empty", "file", "nowhere"):
        refused(lambda name=name: work(tmp_path / name), str(tmp_path / name), "--jobs")
    (tmp_path / "empty" / "mine.txt").write_text("")
    assert "mine.txt" in quantize("out", *DATA_FREE, "--jobs", tmp_path / "empty", ends=2)
    assert "file" in quantize("out", *DATA_FREE, "--jobs", tmp_path / "file", ends=2)


def test_another_version_is_named(jobs, tmp_path, monkeypatch):
    folder = jobs(*DATA_FREE)
    versions = {**qlab.driver.write.versions(), "torch": "1.0"}
    monkeypatch.setattr(qlab.driver.write, "versions", lambda: versions)
    refused(lambda: work(folder), "torch", "1.0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [DATA_FREE, REFERENCE, ("--model-free",)])
def test_another_model_is_named(words, model, jobs, saved, tmp_path):
    folder = jobs(*words)
    (run,) = (folder / "runs").iterdir()
    moved = shutil.copytree(saved("llama"), tmp_path / "other")
    change(moved, lm_head__weight=lambda t: t + 1)
    said = json.loads((run / "run.json").read_text())
    said["words"]["model"] = str(moved)
    (run / "run.json").write_text(json.dumps(sealed(said)))
    refused(lambda: work(folder), "the model is another")


def test_other_data_are_named(jobs, text, tmp_path, model, command):
    mine = tmp_path / "mine.txt"
    mine.write_text(text.read_text())
    words = ["--inputs", "reference", "--spec", "int4-g16", "--samples", 4, "--length", 16]
    options = ["--calib", mine, *words, "--out", tmp_path / "out", "--jobs", tmp_path / "jobs"]
    assert command(qlab.cli.main, "quantize", model, *options)[0] == 0
    mine.write_text(text.read_text()[::-1])
    refused(lambda: work(tmp_path / "jobs"), "calibration data")


def test_a_changed_list_is_refused(jobs):
    folder = jobs(*DATA_FREE)
    (run,) = (folder / "runs").iterdir()
    rewrite(run / "run.json", lambda said: said.update(out="/elsewhere"))
    refused(lambda: work(folder), str(run), "not what was written")


def test_runs_that_cannot_be_divided_or_named(jobs, quantize, tmp_path):
    folder = jobs(*DATA_FREE)
    jobs(*DATA_FREE)  # the same once more is the same
    assert len(list((folder / "runs").iterdir())) == 1
    other = ("--method", "hqq", "--asymmetric", "--jobs", folder)
    assert "another run" in quantize("out", *other, ends=2)
    gguf = (*DATA_FREE, "--codec", "gguf", "--jobs", folder)
    assert "one file" in quantize("file.gguf", *gguf, ends=2)
    assert "--resume" in quantize("more", *DATA_FREE, "--jobs", folder, "--resume", ends=2)


def test_a_folder_without_atomic_renames_is_refused(jobs, tmp_path, monkeypatch):
    folder = jobs(*DATA_FREE)

    def copying(source, target):
        shutil.copyfile(source, f"{target}.new")
        os.unlink(target)
        rename(f"{target}.new", target)
        os.unlink(source)

    def refusing(source, target):
        raise OSError(errno.ENOSYS, "Function not implemented")

    rename = os.rename
    for replace in (copying, refusing):
        monkeypatch.setattr(os, "replace", replace)
        refused(lambda: work(folder), str(folder), "atomically")


def test_a_run_that_is_refused_keeps_no_other_from_being_made(jobs, model, tmp_path, command):
    """In whichever order they come, and the ones that are made are said."""
    lost = jobs(*DATA_FREE)
    (run,) = (lost / "runs").iterdir()
    said = json.loads((run / "run.json").read_text())
    said["words"]["model"] = str(tmp_path / "moved")
    (run / "run.json").write_text(json.dumps(sealed(said)))
    for name in ("first", "second"):
        jobs(*DATA_FREE, out=name)
    code, printed, error = command(qlab.cli.main, "work", lost)
    assert code == 2 and error.splitlines()[-1].startswith(f"qlab: {tmp_path / 'out'} is not made")
    assert str(tmp_path / "moved") in error
    assert all(f"{tmp_path / name} is in place" in printed for name in ("first", "second"))
    refused(lambda: work(lost), str(tmp_path / "moved"))


def test_progress_names_the_run_and_counts_its_pieces(jobs, tmp_path, capsys):
    work(jobs(*DATA_FREE))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"making the pieces of {tmp_path / 'out'}: 1 of 4")
    assert not [line for line in lines if "quantizing blocks" in line]


def test_commands_that_are_told_can_be_pasted(command, tmp_path):
    folder = tmp_path / "of us"
    folder.mkdir()
    assert f"--jobs '{folder}'" in command(qlab.cli.main, "work", folder)[2]


def test_an_output_that_was_taken_away_is_named(jobs, tmp_path):
    folder = jobs(*DATA_FREE)
    work(folder)
    shutil.rmtree(tmp_path / "out")
    refused(lambda: work(folder), str(tmp_path / "out"), "whole.json")


def test_a_claim_ends_with_its_holder(tmp_path):
    with claimed(tmp_path / "1") as mine:
        assert mine
        with claimed(tmp_path / "1") as also:
            assert not also
    with claimed(tmp_path / "1") as then:
        assert then
