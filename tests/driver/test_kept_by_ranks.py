"""Statistics that several ranks keep are the files that one process keeps, and either starts from
what the other kept."""

import os
import shutil
import signal

import pytest
from model_folders import contents, random_tokens
from ranks import LENGTH, run_ranks

import qlab.driver.batches
import qlab.driver.observe
import qlab.files.atomic
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain
from qlab.driver import batches
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.auto_round import auto_round_refine
from qlab.methods.awq import awq_scale
from qlab.methods.gptq import gptq
from qlab.process.watched import Lost

SPEC = parse_spec("int4-g16")
RECIPES = {
    "gptq": gptq(SPEC),
    "awq-gptq": chain(awq_scale(SPEC), gptq(SPEC)),
    "int3": gptq(parse_spec("int3-g16")),
    "learned": chain(gptq(SPEC), auto_round_refine(steps=1, windows=2)),
}


def written(source, name, out, kept):
    batches.BATCH_TOKENS = LENGTH
    data, model = random_tokens(source, samples=5, length=LENGTH), open_checkpoint(source)
    return quantize(model, RECIPES[name], data, out, inputs="reference", keep_statistics=kept)


def counted(rank, cases, folder, kept):
    """Of each case how often this rank ran a block on a batch. kept: name -> where its statistics
    are."""
    runs = []
    for module, name in ((qlab.driver.observe, "inputs_of"), (qlab.driver.batches, "outputs_of")):
        run = getattr(module, name)
        counting = lambda *args, run=run, **options: (runs.append(1), run(*args, **options))[1]
        setattr(module, name, counting)
    found = []
    for source, name in cases:
        runs.clear()
        written(source, name, folder / f"{source.name}-{name}", kept / source.name)
        found.append(len(runs))
    return found


@pytest.fixture
def by_windows(monkeypatch):
    for module, name in (
        (batches, "BATCH_TOKENS"),
        (qlab.driver.observe, "inputs_of"),
        (qlab.driver.batches, "outputs_of"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back behind the test


def test_ranks_keep_the_files_of_one_process_and_each_starts_from_the_others(
    saved, tmp_path, by_windows
):
    mixture = saved("qwen3_moe", num_hidden_layers=1)
    cases = [(saved("llama"), "awq-gptq"), (mixture, "gptq")]
    counted(0, cases, tmp_path / "alone", tmp_path / "kept-1")
    for world, some in ((2, cases[1:]), (3, cases)):
        kept = tmp_path / f"kept-{world}"
        found = run_ranks(tmp_path, world, counted, some, tmp_path / f"by-{world}", kept)
        assert all(map(all, found)), found
        for source, name in some:
            assert contents(kept / source.name) == contents(tmp_path / "kept-1" / source.name)
            out = f"{source.name}-{name}"
            assert contents(tmp_path / f"by-{world}" / out) == contents(tmp_path / "alone" / out)
    later = [(saved("llama"), "gptq"), (mixture, "int3")]
    assert not any(counted(0, later, tmp_path / "later-1", tmp_path / "kept-3"))
    found = run_ranks(tmp_path, 2, counted, later, tmp_path / "later-2", tmp_path / "kept-1")
    assert found == [[0, 0], [0, 0]]
    for folder in (tmp_path / "later-1").iterdir():
        assert contents(folder) == contents(tmp_path / "later-2" / folder.name), folder.name


def test_ranks_make_the_states_that_what_is_missing_needs(saved, tmp_path, by_windows):
    source = saved("llama")
    cases = [(source, "learned")]
    counted(0, cases, tmp_path / "alone", tmp_path / "kept")
    kept = tmp_path / "kept" / source.name
    before = contents(kept)
    for path in kept.iterdir():  # of the last block
        if b"layers.1" in path.read_bytes():
            path.unlink()
    run_ranks(tmp_path, 2, counted, cases, tmp_path / "ranks", tmp_path / "kept")
    assert contents(kept) == before
    name = f"{source.name}-learned"
    assert contents(tmp_path / "ranks" / name) == contents(tmp_path / "alone" / name)


# ------------------------------------------------------------------ a rank that is gone
def dies(rank, source, out, kept, dying, count):
    """The dying rank kills itself where it would rename the statistic of that number."""
    replace, seen = os.replace, []

    def renamed(source, target):
        seen.append(str(target).endswith(".statistic"))
        if rank == dying and sum(seen) == count and seen[-1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(source, target)

    qlab.files.atomic.os.replace = renamed
    written(source, "gptq", out, kept)


def test_what_a_rank_leaves_that_is_gone_is_never_taken_for_whole(saved, tmp_path, by_windows):
    source = saved("qwen3_moe", num_hidden_layers=1)
    whole = contents(written(source, "gptq", tmp_path / "whole", tmp_path / "kept").path)
    said = run_ranks(tmp_path, 3, dies, source, tmp_path / "out", tmp_path / "some", 1, 1)
    assert said[1] is None and all(type(said[rank]) is Lost for rank in (0, 2)), said
    left = [path for path in (tmp_path / "some").iterdir() if path.suffix == ".statistic"]
    expected = contents(tmp_path / "kept")
    assert len(left) < len(expected)
    assert all(path.read_bytes() == expected[path.name] for path in left)
    shutil.rmtree(tmp_path / "out.partial")
    resumed = run_ranks(tmp_path, 2, of_rank, source, tmp_path / "out", tmp_path / "some")
    assert resumed == [None, None] and contents(tmp_path / "out") == whole
    finished = {k: v for k, v in contents(tmp_path / "some").items() if k.endswith(".statistic")}
    assert finished == expected


def of_rank(rank, source, out, kept):
    written(source, "gptq", out, kept)


def unlike(rank, source, folder):
    try:
        written(source, "gptq", folder / "out", folder / "kept" if rank else None)
    except QlabError as error:
        return str(error)


def test_ranks_of_which_one_keeps_statistics_are_refused(saved, tmp_path):
    first, _ = run_ranks(tmp_path, 2, unlike, saved("llama"), tmp_path)
    assert "different folders of statistics: rank 1 has" in first
