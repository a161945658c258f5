"""Commands, reports and benches replace what qlab wrote and nobody changed, and nothing else."""

import json
import os
import shutil

import pytest
from model_folders import contents, rewrite

import qlab
import qlab.cli
from qlab.bench.__main__ import main as bench_main
from qlab.bench.methods import _folder_name
from qlab.files.figures import refuse_foreign_figure, save_figure

INT4, INT8 = (qlab.rtn(qlab.parse_spec(name)) for name in ("int4-g16", "int8-g16"))


def empty(path):
    path.write_bytes(b"")


# ------------------------------------------------------------------ the commands
@pytest.fixture
def call(command):
    return lambda *arguments, main=qlab.cli.main: command(main, *arguments)


def test_commands_refuse_places_before_they_read_anything(call, saved, former, tmp_path, no_work):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for arguments in (
        ["quantize", saved()],
        ["quantize", saved(), "--model-free"],
        ["convert", former, "--codec", "gptq"],
    ):
        code, _, said = call(
            *arguments, "--out", tmp_path / "mine", "--overwrite", "--json", tmp_path / "new.json"
        )
        assert code == 2 and "thesis.tex, which qlab did not write" in said
        code, _, said = call(*arguments, "--out", "", "--overwrite")
        assert code == 2 and "is the current folder" in said
        for inside in (tmp_path / "new", tmp_path / "new.partial"):
            inside.mkdir(exist_ok=True)
            code, _, said = call(*arguments, "--out", tmp_path / "new", "--json", inside / "r.json")
            assert code == 2 and "lies in the output directory" in said
            inside.rmdir()
    assert (
        contents(tmp_path / "mine") == {"thesis.tex": b"years of work"}
        and not (tmp_path / "new.json").exists()
    )


def test_a_report_replaces_only_a_report(call, folder, tmp_path):
    report, before = tmp_path / "r.json", contents(folder)
    for _ in range(2):
        assert call("inspect", folder, "--json", report)[0] == 0
    (tmp_path / "link.json").symlink_to(report)
    assert (
        call(
            "plan",
            folder,
            "--method",
            "rtn",
            "--spec",
            "int4-g32",
            "--json",
            tmp_path / "link.json",
        )[0]
        == 0
    )
    assert (tmp_path / "link.json").is_symlink() and "peak_bytes" in json.loads(report.read_text())
    empty(tmp_path / "empty.json")
    assert call("inspect", folder, "--json", tmp_path / "empty.json")[0] == 0
    rewrite(report, lambda value: value.update(remark="mine"))
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "settings.json").write_text(
        json.dumps({"mine": 1}, indent=2, sort_keys=True) + "\n"
    )
    for path in (
        report,
        tmp_path / "thesis.tex",
        tmp_path / "settings.json",
        folder / "config.json",
        folder / "model.safetensors",
    ):
        code, _, said = call("inspect", folder, "--json", path)
        assert code == 2 and "is no report that qlab wrote and nobody changed" in said
    os.mkfifo(tmp_path / "pipe")
    for path, words in {
        tmp_path / "pipe": "is no regular file",
        folder: "cannot be written",
    }.items():
        code, _, said = call("inspect", folder, "--json", path)
        assert code == 2 and words in said
    assert contents(folder) == before and json.loads(report.read_text())["remark"] == "mine"


def test_figures_and_exports_replace_only_their_like(call, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.setenv("QLAB_CACHE_DIR", str(tmp_path / "configs"))
    (tmp_path / "photo.png").write_bytes(b"\x89PNG mine")
    (tmp_path / "thesis.tex").write_text("years of work")
    bench = [
        "matmul",
        "--shapes",
        "128x256",
        "--m",
        "1",
        "--device",
        "cpu",
        "--contenders",
        "library",
        "--seconds",
        "0",
    ]
    code, out, said = call(*bench, "--plot", tmp_path / "photo.png", main=bench_main)
    assert code == 2 and not out and "is no figure that qlab drew" in said
    for _ in range(2):
        refuse_foreign_figure(tmp_path / "new.png")
        save_figure(Figure(), tmp_path / "new.png")
        assert call("cache", "export", tmp_path / "all.json")[0] == 0
    (tmp_path / "configs").mkdir(exist_ok=True)
    wrong = {
        tmp_path / "thesis.tex": "is no file that `qlab cache export` wrote",
        tmp_path / "configs" / "x.json": "among the entries",
    }
    for path, words in wrong.items():
        code, _, said = call("cache", "export", path)
        assert code == 2 and words in said
    assert (tmp_path / "photo.png").read_bytes() == b"\x89PNG mine" and (
        tmp_path / "thesis.tex"
    ).read_text() == "years of work"


# ------------------------------------------------------------------ benches
def test_two_benches_never_share_a_folder(call, folder, text, tmp_path, monkeypatch):
    monkeypatch.setenv("QLAB_HOME", str(tmp_path / "home"))
    other = shutil.copytree(folder, tmp_path / "other" / folder.name)
    job = [
        "--text",
        text,
        "--spec",
        "int4-g32",
        "--length",
        "32",
        "--windows",
        "2",
        "--methods",
        "rtn",
    ]
    run = lambda model, *more: call(
        "--model", model, "--samples", "2", *job, *more, main=bench_main
    )
    assert run(folder)[0] == run(other)[0] == 0
    kept = [
        json.loads(path.read_text()) for path in (tmp_path / "home" / "bench").glob("*/bench.json")
    ]
    assert {record["model"] for record in kept} == {str(folder), str(other)} and len(kept) == 2
    assert _folder_name("m", kept[0]["job"]) != _folder_name("m", kept[0]["job"] | {"seed": 1})
    out = tmp_path / "home" / "bench" / kept[0]["out"].rpartition("/")[2]
    before = contents(out)
    code, _, said = run(other, "--samples", "3", "--out", out)
    assert code == 2 and "holds another bench" in said and contents(out) == before
    rewrite(out / "bench.json", lambda record: record.update(remark="mine"))
    code, _, said = run(kept[0]["model"], "--out", out)
    assert code == 2 and "bench.json is no record of a bench, or was changed since" in said


def test_a_bench_keeps_others_out_while_it_runs_and_after_it_was_stopped(
    call, folder, text, tmp_path, monkeypatch
):
    import qlab.bench.methods as methods

    job = [
        "--model",
        folder,
        "--text",
        text,
        "--length",
        "32",
        "--windows",
        "2",
        "--methods",
        "rtn",
    ]
    run = lambda *more: call(
        *job, "--spec", "int4-g32", "--out", tmp_path / "out", *more, main=bench_main
    )
    real = methods._evaluate

    def during(*arguments):
        monkeypatch.setattr(methods, "_evaluate", real)
        code, _, said = run("--samples", "2")
        assert code == 2 and "another run is writing to" in said
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "_evaluate", during)
    with pytest.raises(KeyboardInterrupt):
        methods.compare_methods(
            str(folder),
            ["rtn"],
            "int4-g32",
            text=[text],
            samples=2,
            length=32,
            windows=2,
            out=tmp_path / "out",
        )
    code, _, said = run("--samples", "3")
    assert code == 2 and "holds another bench" in said
    assert run("--samples", "2")[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "rtn",
        "bench.json",
        "methods.png",
        "layers.png",
    }


def test_shipped_tables_are_written_over_tables_alone(call, tmp_path):
    (tmp_path / "int4_mm.sm90.json").write_text("mine")
    code, _, said = call("modelled", "--out", tmp_path, main=bench_main)
    assert code == 2 and "int4_mm.sm90.json exists and is no table of configurations" in said
    assert contents(tmp_path) == {"int4_mm.sm90.json": b"mine"}
