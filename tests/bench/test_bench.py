"""`python -m qlab.bench` on a tiny model, and once from the shell: rows, files, refusals."""

import json
import subprocess
import sys
from functools import partial

import pytest

from qlab.bench.__main__ import main

ROW = {
    "method": str,
    "spec": str,
    "perplexity": float,
    "perplexity_ci": list,
    "kl": float,
    "top1_agreement": float,
    "bits_per_weight": float,
    "bytes": int,
    "seconds": float,
    "peak_rss_bytes": int,
    "ratio": float,
    "ratio_ci": list,
    "kl_ci": list,
    "top1_ci": list,
    "inputs": str,
    "layer_error": list,
    "losses": dict,
}
SMALL = ["--spec", "int4-g32", "--samples", "8", "--length", "32", "--windows", "4"]


@pytest.fixture
def bench(command):
    return partial(command, main)


@pytest.fixture
def job(saved, text):
    return ["--model", saved(), "--calib", text, "--text", text, *SMALL]


@pytest.fixture
def alone(saved, text):
    """The job of methods that observe nothing."""
    return ["--model", saved(), "--text", text, *SMALL]


def check(record, methods, spec, inputs):
    assert [row["method"] for row in record["rows"]] == methods
    for row in record["rows"]:
        assert {key: type(row[key]) for key in ROW} == ROW
        assert row["spec"] == spec and row["inputs"] == inputs
        assert row["perplexity_ci"][0] <= row["perplexity"] <= row["perplexity_ci"][1]
        assert row["ratio"] == pytest.approx(row["perplexity"] / record["reference"]["perplexity"])
        assert (
            row["kl"] > 0
            and row["seconds"] > 0
            and row["peak_rss_bytes"] > 1e7
            and min(row["layer_error"]) > 0
        )
    reference = record["reference"]
    assert reference.keys() == record["rows"][0].keys()
    assert (
        reference["method"],
        reference["spec"],
        reference["kl"],
        reference["top1_agreement"],
    ) == ("reference", None, 0, 1)
    assert {"model", "data", "seed", "versions", "device", "inputs"} <= record.keys()
    assert record["inputs"] == inputs and record["versions"]["torch"]


def png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n")


def test_rows_come_in_order_with_both_plots(bench, job, tmp_path):
    copy, folder = tmp_path / "copy.json", tmp_path / "out"
    code, out, said = bench(*job, "--methods", "gptq,rtn", "--out", folder, "--json", copy)
    assert code == 0
    record = json.loads(copy.read_text())
    check(record, ["gptq", "rtn"], "int4-g32", "quantized")
    assert record == json.loads((folder / "bench.json").read_text())
    assert png(folder / "methods.png") and png(folder / "layers.png")
    assert "quantized inputs" in out and "95 %" in out and str(folder) in out
    first = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert [word for word in first if word in ("reference", "gptq", "rtn")] == [
        "reference",
        "gptq",
        "rtn",
    ]
    assert "gptq: quantized in" in said and "rtn: perplexity" in said
    assert (
        "calibrating on 256 tokens (8 windows of 32), evaluating on 128" in said
        and "the demo's text" not in said
    )
    # Plain RTN observes nothing.
    assert record["rows"][0]["losses"] and not record["rows"][1]["losses"]
    assert (
        record["reference"]["bits_per_weight"] == 32 and record["rows"][0]["bits_per_weight"] == 5
    )
    assert (
        record["data"]["calibration"]["samples"] == 8
        and record["data"]["evaluation"]["samples"] == 4
    )


def test_several_seeds_spread_beside_the_interval_over_windows(bench, job, tmp_path):
    folder = tmp_path / "out"
    code, out, _ = bench(*job, "--methods", "gptq,rtn", "--seeds", 3, "--out", folder)
    assert code == 0
    gptq, rtn = json.loads((folder / "bench.json").read_text())["rows"]
    assert [each["seed"] for each in gptq["seeds"]] == [0, 1, 2]
    assert len({each["kl"] for each in gptq["seeds"]}) == 3 and len(rtn["seeds"]) == 1
    assert gptq["seeds"][0]["kl"] == gptq["kl"] and (folder / "gptq-seed2").is_dir()
    assert "over seeds" in out and "over windows" in out


def test_the_subcommand_may_be_named(bench, alone, tmp_path):
    code, _, _ = bench("methods", *alone, "--methods", "rtn", "--out", tmp_path)
    assert code == 0
    check(json.loads((tmp_path / "bench.json").read_text()), ["rtn"], "int4-g32", "quantized")


def test_reference_inputs_share_one_pass_and_its_cost(bench, job, tmp_path):
    code, out, _ = bench(
        *job,
        "--methods",
        "rtn,awq,gptq",
        "--inputs",
        "reference",
        "--asymmetric",
        "--out",
        tmp_path,
    )
    assert code == 0 and "reference inputs" in out and "one pass" in out
    record = json.loads((tmp_path / "bench.json").read_text())
    check(record, ["rtn", "awq", "gptq"], "int4-g32-asym", "reference")
    assert len({row["seconds"] for row in record["rows"]}) == 1


def test_results_of_qlab_are_replaced_and_nothing_else(bench, job, alone, tmp_path):
    run = [*alone, "--methods", "rtn", "--out", tmp_path]
    assert bench(*run)[0] == 0
    first = (tmp_path / "rtn" / "qlab.json").read_bytes()
    assert bench(*run)[0] == 0
    assert (tmp_path / "rtn" / "qlab.json").read_bytes() == first
    (tmp_path / "gptq").mkdir()
    (tmp_path / "gptq" / "thesis.txt").write_text("irreplaceable")
    code, _, said = bench(*job, "--methods", "rtn,gptq", "--out", tmp_path)
    assert code == 2 and said.startswith(
        f"qlab: {tmp_path / 'gptq'} exists and is no result of qlab"
    )
    assert (tmp_path / "gptq" / "thesis.txt").read_text() == "irreplaceable"


def test_without_out_it_goes_to_the_home_of_qlab(bench, alone, monkeypatch, tmp_path):
    monkeypatch.setenv("QLAB_HOME", str(tmp_path))
    code, out, _ = bench(*alone, "--methods", "rtn")
    [folder] = (tmp_path / "bench").iterdir()
    assert (
        code == 0
        and folder.name.endswith("-int4-g32")
        and f"are in {folder}" in out.replace("\n", "")
    )
    assert {"bench.json", "layers.png", "methods.png", "rtn"} == {
        path.name for path in folder.iterdir()
    }


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--methods", "rtn,gtpq"], "method 'gtpq' is unknown; known are rtn, "),
        (["--methods", "awq,awq"], "method 'awq' is given 2 times"),
        (
            ["--methods", "rtn,hqq"],
            "--calib would not be used, since none of these methods observes anything",
        ),
        (["--spec", "int4"], "spec 'int4' is unknown"),
        (["--spec", "int4-g48"], "groups of 48 do not divide the 64 input channels"),
        (["--inputs", "both"], "inputs 'both' are unknown; choose 'quantized' or 'reference'"),
        (["--windows", "9999"], "9999 were asked for"),
    ],
)
def test_bad_input_is_one_sentence(bench, job, tmp_path, arguments, part):
    code, out, said = bench(*job, "--out", tmp_path / "out", *arguments)
    assert code == 2 and not out and not (tmp_path / "out").exists()
    *before, refusal = said.splitlines()
    assert refusal.startswith("qlab: ") and part in refusal
    assert all(line.startswith("calibrating on ") for line in before)


def test_the_demo_from_the_shell(shelf, tmp_path, monkeypatch):
    """Of a model and texts that stand for the demo's."""
    monkeypatch.setenv("QLAB_DEMO", str(shelf))
    small = ["--methods", "rtn", "--samples", "2", "--length", "128", "--windows", "2"]
    command = [sys.executable, "-m", "qlab.bench", *small, "--out", "out", "--json", "bench.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    check(record, ["rtn"], "int4-g64", "quantized")
    assert record["model"] == "demo" and record["reference"]["bits_per_weight"] == 16
    assert len(record["rows"][0]["layer_error"]) == 2


def test_what_no_format_holds_is_measured_without_being_written(bench, job, tmp_path):
    own = tmp_path / "own.py"
    own.write_text("import qlab\n\ndef mine(spec):\n    return qlab.rtn(spec, 'weighted')\n")
    names = f"gptq+kv-int8-token,rtn,rtn+eora-4,{own}:mine"
    folder = tmp_path / "out"
    code, _, said = bench(*job, "--methods", names, "--seeds", 2, "--out", folder)
    assert code == 0, said
    rows = {row["method"]: row for row in json.loads((folder / "bench.json").read_text())["rows"]}
    assert list(rows) == names.split(",")
    assert rows["gptq+kv-int8-token"]["bytes"] is None and rows["rtn+eora-4"]["bytes"] is None
    assert rows["rtn+eora-4"]["kl"] < rows["rtn"]["kl"]
    assert rows["rtn+eora-4"]["bits_per_weight"] > rows["rtn"]["bits_per_weight"] == 5
    assert [len(row["seeds"]) for row in rows.values()] == [2, 1, 2, 2]
    written = {path.name for path in folder.iterdir() if path.is_dir()}
    assert written == {"rtn", "own.py-mine", "own.py-mine-seed1"}
    [stage] = json.loads((folder / "bench.json").read_text())["job"]["recipes"][f"{own}:mine"]
    assert f"of {own}:mine (sha256 " in stage["detail"]
    assert "measured without being written" in said and "no scale per token of all heads" in said
    code, _, said = bench(
        *job, "--methods", "gptaq", "--inputs", "reference", "--out", tmp_path / "b"
    )
    assert code == 2 and "they never are" in said
