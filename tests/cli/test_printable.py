"""Names out of files on their way to a terminal, a figure, a message: shown as they read, obeyed by
nobody."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlab.cli
from qlab.bench.plots import draw
from qlab.errors import QlabError, printable
from qlab.process.progress import progress
from qlab.process.shown import Shown

EVIL = "\x1b[2J\x1b[31m[bold]x\u202e\x9b\n77 quantized weights, 0 faults.weight"
UNSEEN = set("\x1b\u202e\x9b\x07")


@pytest.fixture
def evil(folder):
    """A model in a folder that is markup and mathematics, with a tensor that would write to the
    screen."""
    moved = folder.with_name("a[red]$x_{$b")
    shutil.move(folder, moved)
    tensors = load_file(moved / "model.safetensors") | {EVIL: torch.zeros(4, 64)}
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    return moved


def test_commands_show_names_out_of_files_as_they_read(evil, tmp_path, command):
    call = partial(command, qlab.cli.main)
    out = tmp_path / "out[/red]"
    words = ["quantize", evil, "--method", "rtn", "--spec", "int4-g32", "--out", out]
    printed = [call(*words), call("inspect", evil)]
    if out.exists():
        printed += [call("inspect", out), call("verify", out, "--against", evil)]
    shown = "".join(out + err for _, out, err in printed)
    assert not UNSEEN & set(shown) and "a[red]$x_{$b" in shown
    assert not [line for line in shown.splitlines() if line.startswith("77 quantized weights")]


def test_errors_and_results_are_lines_that_hold_no_control_characters():
    class Found(Shown):
        def summary(self):
            return {"name": EVIL}

    for text in (str(QlabError(f"{EVIL} is wrong")), repr(Found()), str(Found()).split("\n", 1)[1]):
        assert not UNSEEN & set(text) and "\n" not in text and r"\x1b[2J" in text
    assert "\x1b" not in Found()._repr_html_()
    assert printable("caf\xe9 \u65e5\u672c '$' [bold]") == "caf\xe9 \u65e5\u672c '$' [bold]"
    assert printable("\ud800") == r"\ud800"


def test_a_sentence_of_thousands_of_characters_keeps_its_beginning_and_its_end():
    said = str(QlabError(f"m.gguf holds {'x' * 3000}; download it again"))
    assert len(said) == 2000 and "x ... x" in said
    assert said.startswith("m.gguf holds xx") and said.endswith("xx; download it again")
    assert str(QlabError("y" * 2000)) == "y" * 2000
    assert len(str(QlabError("\n" * 1500))) == 2000  # as it is shown


def test_progress_says_names_as_they_read(capsys):
    assert list(progress([1], f"reading {EVIL}")) == [1]
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and not UNSEEN & set(said)


def test_a_figure_takes_no_name_for_mathematics(tmp_path):
    row = {
        "spec": "int4-g32",
        "ratio": 1.1,
        "ratio_ci": [1.0, 1.2],
        "kl": 0.1,
        "kl_ci": [0.0, 0.2],
        "layer_error": [0.1, 0.2],
    }
    rows = [{**row, "method": name, "losses": {}} for name in ("$x_{", "a$b$c{")]
    record = {"model": f"/models/a$x_{{$b{EVIL}", "rows": rows, "inputs": "reference"}
    draw({**record, "reference": {"predictions": 10, "perplexity": 3.0}}, tmp_path)
    assert (tmp_path / "methods.png").stat().st_size and (tmp_path / "layers.png").stat().st_size


def test_json_of_a_command_keeps_the_name_itself(evil, tmp_path, command):
    command(qlab.cli.main, "inspect", evil, "--json", tmp_path / "i.json")
    assert json.loads((tmp_path / "i.json").read_text())


def test_what_others_log_of_a_file_is_shown_as_it_reads(folder, command, monkeypatch, capsys):
    import logging

    from qlab.directories import inspect as inspection

    real, before = inspection.inspect, logging.getLogRecordFactory()

    def logs(directory):
        logging.getLogger("others").warning("unknown " + EVIL)
        logging.getLogger("others").warning("unknown %s", EVIL)
        return real(directory)

    monkeypatch.setattr(inspection, "inspect", logs)
    handler = logging.StreamHandler()
    logging.getLogger("others").addHandler(handler)
    try:
        code, _, said = command(qlab.cli.main, "inspect", folder)
    finally:
        logging.getLogger("others").removeHandler(handler)
    assert code == 0 and said.count("unknown ") == 2 and not UNSEEN & set(said.replace("\n", ""))
    assert len(said.splitlines()) == 2 and logging.getLogRecordFactory() is before
