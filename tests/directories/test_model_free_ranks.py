"""Several ranks that rewrite a directory without its model write the bytes of one process."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest
from model_folders import contents
from ranks import run_ranks

import qlab.files.atomic
from qlab.algebra.spec import parse_spec
from qlab.cli import main
from qlab.directories.by_ranks import _begun
from qlab.directories.model_free import quantize_files
from qlab.errors import QlabError, ToldElsewhere
from qlab.files.tensors import OpenFiles
from qlab.methods.rtn import rtn
from qlab.process.watched import Lost

RECIPE = rtn(parse_spec("int4-g16"))


@pytest.fixture
def source(saved):
    folder = saved("qwen3_moe", shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 4
    return folder


def made(rank, source, out, **options):
    """The files that this rank wrote, and those of which it read more than the header."""
    replace, written, read, at = os.replace, [], set(), OpenFiles.at

    def renamed(path, target):
        written.append(os.fspath(target))
        return replace(path, target)

    qlab.files.atomic.os.replace = renamed
    OpenFiles.at = lambda self, path, *place: read.add(path) or at(self, path, *place)
    result = quantize_files(source, RECIPE, out, **options)
    shards = [name for name in written if name.endswith(".safetensors")]
    return len(shards), {path.name for path in read if path.parent == source}, len(result.sites)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_divide_the_files_and_write_the_bytes_of_one_process(source, tmp_path, world):
    whole = quantize_files(source, RECIPE, tmp_path / "alone")
    found = run_ranks(tmp_path, world, made, source, tmp_path / "ranks")
    assert contents(tmp_path / "ranks") == contents(whole.path)
    assert {sites for _, _, sites in found} == {len(whole.sites)}
    assert all(shards > 0 for shards, _, _ in found[1:]), found
    read = [files for _, files, _ in found]  # each of them by one rank
    assert set.union(*read) == {file.name for file in source.glob("*.safetensors")}
    assert sum(map(len, read)) == len(set.union(*read))


# ------------------------------------------------------------------ a rank that is gone
def dies(rank, source, out, dying, count):
    """The dying rank kills itself where it would rename a shard for the `count`-th time."""
    replace, seen = os.replace, []

    def renamed(path, target):
        seen.append(os.fspath(target).endswith(".safetensors"))
        if rank == dying and seen[-1] and sum(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    qlab.files.atomic.os.replace = renamed
    quantize_files(source, RECIPE, out)


@pytest.mark.parametrize("world, dying, then", [(3, 1, 2), (2, 0, 1)])
def test_a_run_whose_rank_is_gone_goes_on_with_another_number(source, tmp_path, world, dying, then):
    whole = contents(quantize_files(source, RECIPE, tmp_path / "alone").path)
    out = tmp_path / "out"
    said = run_ranks(tmp_path, world, dies, source, out, dying, 2)
    assert said.pop(dying) is None and all(type(error) is Lost for error in said), said
    assert not out.exists()
    if then == 1:
        quantize_files(source, RECIPE, out, resume=True)
    else:
        run_ranks(tmp_path, then, resumes, source, out)
    assert contents(out) == whole


def resumes(rank, source, out):
    quantize_files(source, RECIPE, out, resume=True)


def test_what_ranks_of_a_run_before_left_takes_no_place(tmp_path):
    (tmp_path / "parts-before").mkdir()
    (tmp_path / "parts-before" / "part-00000.safetensors").write_bytes(b"some")
    writer = SimpleNamespace(work=tmp_path, has=lambda index: index == 1)
    folder, lacking = _begun(writer, 3)
    assert list(tmp_path.iterdir()) == [folder] and lacking == [0, 2]


# ------------------------------------------------------------------ what is refused
def refusals(rank, source, folder):
    """What this rank says of ranks that choose other weights, and of a place that is taken."""
    said = []
    for include, name in (([f"*.{rank}.self_attn.*"], "new"), (["*.self_attn.*"], "taken")):
        try:
            quantize_files(source, RECIPE, folder / name, include=include)
        except QlabError as error:
            said.append((type(error), str(error)))
    return said


def test_ranks_that_choose_other_weights_or_find_a_place_taken_are_refused_once(source, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter").write_text("a")
    first, second = run_ranks(tmp_path, 2, refusals, source, tmp_path)
    assert [kind for kind, _ in first] == [QlabError] * 2, first
    assert [kind for kind, _ in second] == [ToldElsewhere] * 2, second
    assert "the ranks see different chosen weights: rank 1 has" in first[0][1]
    assert "exists and holds something else" in first[1][1]


def command(rank, *words):
    sys.argv = ["qlab", *map(str, words)]
    main()


def test_the_command_divides_the_files_too(source, tmp_path):
    words = ["quantize", source, "--model-free", "--spec", "int4-g16", "--out"]
    ended = run_ranks(tmp_path, 2, command, *words, tmp_path / "two", joins=False)
    assert [end.code for end in ended] == [0, 0]
    whole = quantize_files(source, RECIPE, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(whole.path)
    assert (tmp_path / "out1").read_text() == ""
