"""A resumed run believes what it can prove: whatever became of a killed run's files, the bytes are
those of one that was not killed."""

import json
import shutil

import pytest
from model_folders import contents, random_tokens, refused, rewrite

from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import rules
from qlab.directories.convert import convert
from qlab.directories.model_free import quantize_files
from qlab.driver.quantize import compare, quantize
from qlab.files.checkpoint import open_checkpoint
from qlab.files.writer import Writer
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn

SPEC = parse_spec("int4-g16")


@pytest.fixture(scope="module")
def jobs(saved, tmp_path_factory):
    """name -> (a job(out, resume), what it writes, the folder that it leaves when it is killed
    before its last block's notes)."""
    source = saved("llama", num_hidden_layers=3)
    single = rules({"*.v_proj": gptq(SPEC), "*": rtn(SPEC)})
    shards = quantize(
        open_checkpoint(source), rtn(SPEC), None, tmp_path_factory.mktemp("shards") / "q"
    ).path
    runs = {
        "without data": lambda out, **options: quantize(
            open_checkpoint(source), rtn(SPEC), None, out, **options
        ),
        "with data": lambda out, **options: quantize(
            open_checkpoint(source), single, random_tokens(source), out, **options
        ),
        "convert": lambda out, **options: convert(shards, "compressed-tensors", out, **options),
        "model-free": lambda out, **options: quantize_files(
            shards.parent / "dense", rtn(SPEC), out, **options
        ),
    }
    _in_shards(source, shards.parent / "dense")
    real, folder = Writer.write_notes, tmp_path_factory.mktemp("jobs")

    def stopping(writer, index, notes):
        if index == 3:
            raise KeyboardInterrupt
        real(writer, index, notes)

    for name, job in runs.items():
        whole = contents(job(folder / f"{name} whole").path)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Writer, "write_notes", stopping)
            job(folder / name)
        runs[name] = job, whole, folder / f"{name}.partial"
    return runs


def _in_shards(source, out):
    """The model of `source` in four files."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source).save_pretrained(out, max_shard_size="130KB")
    assert len(list(out.glob("*.safetensors"))) >= 4


@pytest.fixture
def resumed(jobs, tmp_path, capsys):
    """resumed(name of a job, damage) -> what the run says that goes on after damage(its folder);
    its bytes are checked."""

    def run(name, damage):
        job, whole, left = jobs[name]
        partial = shutil.copytree(left, tmp_path / "out.partial")
        damage(partial)
        capsys.readouterr()
        job(tmp_path / "out", resume=True)
        assert contents(tmp_path / "out") == whole
        assert not partial.exists()
        return capsys.readouterr().err

    return run


def shard(partial, index=1):
    return sorted(partial.glob("*.safetensors"))[index]


def notes(partial, index=1):
    return partial / ".work" / f"notes-{index:05d}.json"


def carry(partial):
    [path] = (partial / ".work").glob("carry-*.bin")
    return path


def edit(path, change):
    path.write_bytes(change(path.read_bytes()))


def flip(raw):
    return raw[:-40] + bytes([raw[-40] ^ 1]) + raw[-39:]


DAMAGE = {
    "a shard of zeros": lambda p: edit(shard(p), lambda raw: raw[:800] + bytes(len(raw) - 800)),
    "one bit of a shard": lambda p: edit(shard(p), flip),
    "a shard cut short": lambda p: edit(shard(p), lambda raw: raw[:-1]),
    "an emptied shard": lambda p: edit(shard(p), lambda raw: b""),
    "a shard longer": lambda p: edit(shard(p), lambda raw: raw + b"\0"),
    "no shard": lambda p: shard(p).unlink(),
    "another's shard": lambda p: shutil.copyfile(shard(p, 2), shard(p)),
    "no notes": lambda p: notes(p).unlink(),
    "emptied notes": lambda p: notes(p).write_text(""),
    "notes of zeros": lambda p: edit(notes(p), lambda raw: bytes(len(raw))),
    "another number in the notes": lambda p: rewrite(
        notes(p), lambda value: value["notes"]["sites"].popitem()
    ),
    "another's notes": lambda p: shutil.copyfile(notes(p, 2), notes(p)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_segment_is_named_and_made_again(damage, resumed):
    said = resumed("without data", DAMAGE[damage])
    assert "model-00002-of-00004" in said or "notes-00001" in said
    assert "that part is made again" in said


@pytest.mark.parametrize("name", ["with data", "convert", "model-free"])
def test_every_door_that_resumes_checks_all_it_finds(name, resumed):
    assert "is not what was written; that part is made again" in resumed(
        name, DAMAGE["one bit of a shard"]
    )


CARRIED = {
    "half of it zeros": lambda raw: bytes(len(raw) // 2) + raw[len(raw) // 2 :],
    "one bit": flip,
    "cut short": lambda raw: raw[: len(raw) // 2],
    "longer": lambda raw: raw + raw,
    "its hash": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
    "emptied": lambda raw: b"",
}


@pytest.mark.parametrize("damage", CARRIED)
def test_damaged_hidden_states_are_named_and_run_again(damage, resumed):
    assert "carry-quantized-00002.bin is not what was written" in resumed(
        "with data", lambda p: edit(carry(p), CARRIED[damage])
    )


def test_missing_hidden_states_are_run_again(resumed):
    resumed("with data", lambda p: carry(p).unlink())


def test_hidden_states_of_another_block_are_not_taken(resumed):
    resumed("with data", lambda p: carry(p).rename(carry(p).with_name("carry-quantized-00001.bin")))


def test_only_the_damaged_block_is_solved_again_where_there_are_no_data(resumed, monkeypatch):
    written, real = [], Writer.write_shard
    monkeypatch.setattr(
        Writer, "write_shard", lambda self, i, tensors: written.append(i) or real(self, i, tensors)
    )
    resumed("without data", DAMAGE["no notes"])
    assert written == [1, 3]


def test_what_no_run_wrote_is_moved_beside_the_output(resumed, tmp_path):
    def add(partial):
        (partial / "thesis.tex").write_text("years of work")
        (partial / ".work" / "ideas.txt").write_text("more")
        (partial / "model-00007-of-00007.safetensors").write_text("of another model")

    said = resumed("without data", add)
    assert "thesis.tex is no file of this run; it was moved to" in said
    aside = {
        "thesis.tex": b"years of work",
        ".work/ideas.txt": b"more",
        "model-00007-of-00007.safetensors": b"of another model",
    }
    assert contents(tmp_path / "out.aside") == aside


def test_a_run_that_begins_anew_deletes_only_what_qlab_wrote(jobs, tmp_path):
    job, whole, left = jobs["without data"]
    partial = shutil.copytree(left, tmp_path / "out.partial")
    (partial / "thesis.tex").write_text("years of work")
    job(tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    assert contents(tmp_path / "out.aside") == {"thesis.tex": b"years of work"}


def test_a_finished_job_is_not_believed_either(jobs, tmp_path):
    job, *_ = jobs["without data"]
    job(tmp_path / "out")
    edit(shard(tmp_path / "out"), flip)
    before = contents(tmp_path)
    refused(
        lambda: job(tmp_path / "out", resume=True),
        "is finished",
        "model-00002-of-00004.safetensors is not what was written",
    )
    assert contents(tmp_path) == before


def test_the_record_names_every_file(jobs):
    _, whole, _ = jobs["without data"]
    assert json.loads(whole["qlab.json"])["written"].keys() == whole.keys()


def test_a_comparison_that_one_folder_refuses_leaves_what_another_has(jobs, saved, tmp_path):
    source, rounded = open_checkpoint(saved("llama", num_hidden_layers=3)), rtn(SPEC)
    for name in ("a", "b"):
        shutil.copytree(jobs["without data"][2], tmp_path / f"{name}.partial")
    before = contents(tmp_path)
    refused(
        lambda: compare(
            source, {"a": rounded, "b": rtn(parse_spec("int8-g16"))}, None, tmp_path, resume=True
        ),
        "b.partial belongs",
    )
    assert contents(tmp_path) == before
