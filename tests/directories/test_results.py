"""Several runs in one table, read back from what they wrote."""

import csv
import io
import json
import shutil
import sys

import pytest

import qlab
from qlab.directories.results import COLUMNS, Results
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def runs(saved, text, tmp_path_factory):
    """Three runs on one tiny model, the last of them in another format, and an evaluation of the
    first."""
    model, folder = open_checkpoint(saved()), tmp_path_factory.mktemp("runs")
    data = qlab.tokens(model, [text], samples=8, length=32)
    spec = qlab.parse_spec("int4-g32")
    gptq = qlab.quantize(model, qlab.gptq(spec), data, folder / "gptq")
    rtn = qlab.quantize(
        model, qlab.rules({"*.o_proj": qlab.keep(), "*": qlab.rtn(spec)}), None, folder / "rtn"
    )
    awq = qlab.convert(gptq.path, "compressed-tensors", folder / "converted")
    windows = qlab.first_windows(model, [text], length=32, count=4)
    return gptq, rtn, awq, qlab.evaluate(open_checkpoint(gptq.path), model, windows)


def test_directories_say_what_was_done_and_what_it_lost(runs):
    gptq, rtn, converted, _ = runs
    first, second, third = qlab.results([gptq.path, str(rtn.path), converted.path]).rows
    assert [row["run"] for row in (first, second, third)] == ["gptq", "rtn", "converted"]
    assert (first["method"], first["spec"], first["inputs"]) == ("gptq", "int4-g32", "quantized")
    assert first["calibration"] == "8 x 32 of calibration.txt" and second["calibration"] is None
    assert (
        first["bits_per_weight"] == gptq.bits_per_weight
        and first["weights"] == 14
        and second["weights"] == 12
    )
    assert first["largest_weight_error"] == max(row["weight_error"] for row in gptq.sites.values())
    assert (
        first["loss"] == pytest.approx(sum(row["loss"] for row in gptq.sites.values()))
        and second["loss"] is None
    )
    assert all(
        row["seconds"] is None and row["perplexity"] is None and tuple(row) == COLUMNS
        for row in (first, second, third)
    )


def test_what_was_returned_knows_its_cost_and_may_come_with_its_evaluation(runs):
    gptq, _, _, evaluation = runs
    (row,) = qlab.results([(gptq, evaluation)]).rows
    assert row["seconds"] == gptq.seconds and row["peak_rss_bytes"] == gptq.peak_rss_bytes
    assert {key: row[key] for key in ("perplexity", "kl", "top1_agreement")} == {
        key: getattr(evaluation, key) for key in ("perplexity", "kl", "top1_agreement")
    }
    assert (
        qlab.results((str(gptq.path), evaluation) for _ in range(2)).rows[1]["kl"] == evaluation.kl
    )


def test_a_benchs_folder_has_a_row_for_every_method(runs, tmp_path):
    gptq, *_ = runs
    shutil.copytree(gptq.path, tmp_path / "bench" / "gptq")
    rows = [
        {"method": name, "perplexity": 3.5, "kl": 0.25, "seconds": 7.0} for name in ("gptq", "gone")
    ]
    (tmp_path / "bench" / "bench.json").write_text(json.dumps({"rows": rows}))
    first, second = qlab.results(tmp_path / "bench").rows
    assert (first["run"], first["perplexity"], first["weights"]) == ("bench/gptq", 3.5, 14)
    assert (second["run"], second["kl"], second["weights"]) == ("bench/gone", 0.25, None)


def test_as_text_as_html_as_csv(runs, tmp_path):
    table = qlab.results([runs[0], runs[1]])
    header, *lines = str(table).splitlines()
    assert (
        header.split()[:3] == ["run", "method", "spec"]
        and "perplexity" not in header
        and [line.split()[0] for line in lines] == ["gptq", "rtn"]
    )
    assert table._repr_html_().count("<tr>") == 3 and len(repr(table)) < 300
    read = list(csv.DictReader(io.StringIO(table.to_csv(tmp_path / "runs.csv"))))
    assert (tmp_path / "runs.csv").read_text() == table.to_csv() and list(read[0]) == list(COLUMNS)
    table.to_csv(tmp_path / "runs.csv")  # its like is replaced
    (tmp_path / "mine.csv").write_text("mine")
    for wrong in (tmp_path / "mine.csv", tmp_path, tmp_path / "no" / "runs.csv"):
        with pytest.raises(QlabError, match=r"is no table of results|cannot be written"):
            table.to_csv(wrong)
    assert (tmp_path / "mine.csv").read_text() == "mine"
    assert float(read[0]["bits_per_weight"]) == runs[0].bits_per_weight and read[1]["loss"] == ""
    assert json.loads(json.dumps(table.json())) == table.json()


def test_pandas_is_asked_for_by_name_where_it_is_missing(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(QlabError, match=r"pandas is not installed.*to_csv\(\)"):
        qlab.results([runs[0]]).to_dataframe()


def test_a_data_frame_has_the_rows(runs):
    pandas = pytest.importorskip("pandas", reason="pandas is no dependency of qlab")
    frame = qlab.results([runs[0], runs[1]]).to_dataframe()
    assert isinstance(frame, pandas.DataFrame) and list(frame["method"]) == ["gptq", "rtn"]


def test_what_is_no_run_is_refused(saved, tmp_path):
    with pytest.raises(QlabError, match="no run was given"):
        qlab.results([])
    with pytest.raises(QlabError, match="is not a model directory"):
        qlab.results([tmp_path / "nothing"])
    with pytest.raises(QlabError, match="a run is a directory or what quantize"):
        qlab.results([7])
    (plain,) = qlab.results([saved()]).rows
    assert (
        plain["format"] == "unquantized"
        and plain["weights"] == 0
        and isinstance(qlab.results(saved()), Results)
    )
