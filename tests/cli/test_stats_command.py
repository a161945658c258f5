"""stats list and prune: what is kept, of what, and what is removed."""

import json
import os

import pytest
import torch

import qlab.cli
from qlab.files.statistics import Shelf

DAY = 86400


def of(model, block):
    return {
        "model": model * 64,
        "block": f"layers.{block}",
        "wire": "x",
        "statistic": "absmax",
        "dtype": "torch.float32",
        "device": "cpu",
        "calibrate_all_experts": False,
        "versions": {},
    }


@pytest.fixture
def shelf(tmp_path):
    """Three statistics of one model and one of another, the longest unused first."""
    shelf = Shelf(tmp_path / "kept")
    for age, (model, block) in enumerate([("b", 0), ("a", 2), ("a", 1), ("a", 0)]):
        about = {"model": str(tmp_path / model), "data": {"texts": ["t"], "seed": 0}, "tokens": 8}
        before = {*shelf.folder.glob("*")}
        shelf.put(of(model, block), torch.ones(1000, dtype=torch.float32), about)
        (path,) = {*shelf.folder.glob("*")} - before
        then = path.stat().st_mtime - (9 - age) * DAY
        os.utime(path, (then, then))
    return shelf


@pytest.fixture
def stats(shelf, command, tmp_path):
    """stats(*words) -> what was printed, and the report; or what was refused."""

    def run(*words, ends=0):
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        options = ["--statistics", shelf.folder, "--json", report]
        code, out, error = command(qlab.cli.main, "stats", *words, *options)
        assert code == ends
        return (error, None) if ends else (out, json.loads(report.read_text()))

    return run


def left(shelf):
    return sorted((kept.of["model"][0], kept.of["block"]) for kept in shelf.listed()[0])


def test_the_list_has_a_line_for_each_model(stats, shelf, tmp_path):
    printed, report = stats("list")
    rows = {row["model"]: row for row in report["rows"]}
    assert rows.keys() == {str(tmp_path / "a"), str(tmp_path / "b")}
    assert [rows[str(tmp_path / name)]["blocks"] for name in "ab"] == [3, 1]
    assert report["bytes"] == sum(path.stat().st_size for path in shelf.folder.iterdir())
    assert str(tmp_path / "a") in printed and "absmax" in printed and "8 tokens of t" in printed


def test_prune_by_model(stats, shelf, tmp_path):
    stats("prune", "--model", tmp_path / "b")
    assert {model for model, _ in left(shelf)} == {"a"}
    stats("prune", "--model", "aaaaaaaa")
    assert left(shelf) == []


def test_prune_by_age(stats, shelf):
    stats("prune", "--older-than", 7.5)
    assert left(shelf) == [("a", "layers.0"), ("a", "layers.1")]


def test_prune_to_a_size_removes_what_was_longest_unused(stats, shelf):
    bytes = sum(path.stat().st_size for path in shelf.folder.iterdir())
    _, report = stats("prune", "--to-size", bytes * 0.6 / 2**30)
    assert left(shelf) == [("a", "layers.0"), ("a", "layers.1")]
    assert report["removed"] == 2 and report["freed_bytes"] + report["left_bytes"] == bytes


def test_prune_all_says_what_it_freed_and_takes_the_damaged_along(stats, shelf):
    path = min(shelf.folder.iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    assert "1 damaged" in stats("list")[0]
    bytes = sum(path.stat().st_size for path in shelf.folder.iterdir())
    printed, report = stats("prune", "--all")
    assert report["freed_bytes"] == bytes and report["left_bytes"] == 0
    assert report["removed"] == 3 and report["damaged"] == 1 and "3 statistics removed" in printed
    assert not list(shelf.folder.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing says what to remove"),
        (("--all", "--model", "x"), "--all removes everything"),
        (("--older-than", -1), "--older-than -1"),
        (("--to-size", "nan"), "--to-size nan"),
        (("--model", "/nowhere"), "no statistics of /nowhere"),
    ],
)
def test_a_prune_that_says_nothing_or_too_much(words, said, stats, shelf):
    assert said in stats("prune", *words, ends=2)[0]
    assert len(left(shelf)) == 4


def test_a_folder_that_is_none(command, tmp_path):
    code, _, said = command(qlab.cli.main, "stats", "list", "--statistics", tmp_path / "no")
    assert code == 2 and str(tmp_path / "no") in said


def test_without_a_folder_it_is_that_of_qlab(command, tmp_path, monkeypatch):
    monkeypatch.setenv("QLAB_HOME", str(tmp_path))
    code, said, _ = command(qlab.cli.main, "stats", "list")
    assert code == 0 and f"0 statistics, 0 bytes, in {tmp_path / 'statistics'}" in said
