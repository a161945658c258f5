"""How qlab speaks: versions, help, names in any case, progress without a terminal, results in a few
lines, and no noise of others."""

import json
import logging
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from model_folders import prose, random_tokens

import qlab
import qlab.cli
from qlab.cli import options
from qlab.codecs import CODECS
from qlab.codecs.engines import TARGETS
from qlab.evaluation.perplexity import read
from qlab.files.checkpoint import open_checkpoint
from qlab.methods import METHODS
from qlab.process import progress as progress_module
from qlab.process.progress import progress
from qlab.process.quiet import UNHELPFUL

SMALL = ["--spec", "int4-g32", "--samples", "8", "--length", "32"]


@pytest.fixture
def call(command):
    return partial(command, qlab.cli.main)


@pytest.fixture
def demo(tmp_path_factory, monkeypatch):
    """A demo text in the tiny models' words."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text").mkdir()
    for split in ("calibration", "heldout"):
        (folder / "text" / f"{split}.jsonl").write_text(
            json.dumps({"title": "", "text": prose(2048)})
        )
    monkeypatch.setenv("QLAB_DEMO", str(folder))
    return folder


def test_the_version_is_said(call):
    code, out, _ = call("--version")
    assert code == 0 and out == f"qlab {qlab.__version__}\n"


@pytest.mark.parametrize("arguments", [["-h"], ["quantize", "-h"], ["cache", "list", "-h"]])
def test_help_has_a_short_name(call, arguments):
    code, out, _ = call(*arguments)
    assert code == 0 and "Usage" in out


def test_help_lists_the_names_that_exist_without_loading_what_they_stand_for(call):
    assert (
        tuple(METHODS) == options.METHODS
        and tuple(CODECS) == options.CODECS
        and {name for name in CODECS if CODECS[name].file} == set(options.ONE_FILE)
        and set(options.TARGETS) == set(TARGETS)
    )
    code, out, _ = call("quantize", "--help")
    assert code == 0 and all(name in out for name in (*METHODS, *CODECS, *TARGETS))
    code = "import sys; sys.argv = ['qlab', 'quantize', '--help']; import qlab.cli, atexit\n"
    code += "atexit.register(lambda: print('torch' in sys.modules)); qlab.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("False"), done.stderr


def test_names_are_meant_without_regard_to_case(call, saved, tmp_path):
    job = [
        "--method",
        "RTN",
        "--spec",
        "INT4-G32",
        "--codec",
        "Compressed-Tensors",
        "--target",
        "vLLM",
        "--inputs",
        "Reference",
    ]
    code, out, error = call("quantize", saved(), *job, "--device", "CPU", "--out", tmp_path / "out")
    assert code == 0 and "reference inputs" in out, error


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--method", "rtn"], "this method observes nothing"),
        (["--model-free"], "--model-free runs no model"),
    ],
)
@pytest.mark.parametrize("option", ["--calib", "--images"])
def test_calibration_that_would_not_be_used_is_refused(
    call, saved, text, tmp_path, arguments, why, option
):
    code, _, error = call(
        "quantize", saved(), *SMALL, *arguments, option, text, "--out", tmp_path / "out"
    )
    assert (
        code == 2
        and f"{option} would not be used, since {why}" in error
        and not (tmp_path / "out").exists()
    )


def test_calibrating_ones_own_model_on_the_demos_text_is_said(call, saved, text, demo):
    code, _, error = call("plan", saved(), *SMALL)
    assert code == 0 and "on the demo's text" in error and "--calib takes" in error
    assert "demo's text" not in call("plan", saved(), *SMALL, "--calib", text)[2]
    (demo / "model").symlink_to(saved())
    assert "demo's text" not in call("plan", "demo", *SMALL)[2]


def test_the_size_of_a_calibration_is_said_and_the_readmes_is_the_benchs(
    call, saved, text, tmp_path
):
    job = [saved(), *SMALL, "--calib", text]
    assert "over 256 tokens" in call("plan", *job)[1]
    assert (
        "quantizing blocks on 256 tokens: 1 of 2"
        in call("quantize", *job, "--out", tmp_path / "out")[2]
    )
    readme = (Path(qlab.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    line = next(line for line in readme.splitlines() if line.startswith("qlab quantize demo"))
    assert "--samples 32 --length 512" in line and f"{32 * 512:,} tokens" in line


def test_a_directory_is_evaluated_without_a_reference(call, saved, text, tmp_path):
    job = [saved(), "--text", text, "--length", 32, "--windows", 4, "--json", tmp_path / "e.json"]
    code, out, error = call("eval", *job)
    alone = json.loads((tmp_path / "e.json").read_text())
    assert (
        code == 0
        and "perplexity" in out
        and "KL" not in out.splitlines()[3]
        and "--against MODEL adds" in out
    ), error
    assert call("eval", *job, "--against", saved())[0] == 0
    both = json.loads((tmp_path / "e.json").read_text())
    assert alone["against"] is None and {
        key: both[key] for key in ("perplexity", "perplexity_ci", "predictions")
    } == {key: alone[key] for key in ("perplexity", "perplexity_ci", "predictions")}


def test_what_nobody_can_act_on_is_not_said_and_the_rest_is(caplog):
    for name, messages in UNHELPFUL.items():
        for message in messages:
            logging.getLogger(name).warning(message + "x", *(["y"] if "%s" in message else []))
        logging.getLogger(name).warning("something else")
    assert [record.message for record in caplog.records] == ["something else"] * len(UNHELPFUL)


def test_a_program_that_is_asked_for_other_sizes_logs_no_failure(saved, caplog, monkeypatch):
    monkeypatch.setattr(
        logging.getLogger("torch._subclasses.fake_tensor"), "handlers", [caplog.handler]
    )
    for length in (8, 16):
        read(open_checkpoint(saved("llama", head_dim=8)), random_tokens(saved("llama"), 2, length))
    assert [
        record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR
    ] == []


def test_progress_is_lines_where_there_is_no_terminal(capsys, monkeypatch):
    now = iter([0.0, 4.0, 8.0, 15.0, 16.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(now))
    assert list(progress("abcd", "reading")) == list("abcd")
    assert capsys.readouterr().err.splitlines() == [
        "reading: 1 of 4, 4 s, about 12 s left",
        "reading: 3 of 4, 15 s, about 5 s left",
        "reading: 4 of 4, 16 s",
    ]


@pytest.fixture(scope="module")
def results(saved, text, tmp_path_factory):
    """What the public functions give for one tiny model."""
    model = open_checkpoint(saved())
    data = qlab.tokens(model, [text], samples=8, length=32)
    recipe = qlab.gptq(qlab.parse_spec("int4-g32"))
    result = qlab.quantize(model, recipe, data, tmp_path_factory.mktemp("results") / "out")
    windows = qlab.first_windows(model, [text], length=32, count=4)
    quantized = open_checkpoint(result.path)
    return {
        "model": quantized,
        "tokens": data,
        "plan": qlab.plan(model, recipe, data),
        "result": result,
        "inspection": qlab.inspect(result.path),
        "evaluation": qlab.evaluate(quantized, model, windows),
        "perplexity": qlab.perplexity(quantized, windows),
        "verdict": qlab.verify(result.path, model.path),
        "converted": qlab.convert(result.path, "compressed-tensors", result.path.parent / "again"),
        "rewritten": qlab.quantize_files(
            model, qlab.rtn(qlab.parse_spec("int4-g32")), result.path.parent / "files"
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        "model",
        "tokens",
        "plan",
        "result",
        "inspection",
        "evaluation",
        "perplexity",
        "verdict",
        "converted",
        "rewritten",
    ],
)
def test_results_are_a_few_lines_and_a_table_in_a_notebook(results, name):
    shown = results[name]
    assert (
        1 < len(str(shown).splitlines()) < 12 and len(str(shown)) < 1000 and len(repr(shown)) <= 300
    )
    assert shown._repr_html_().startswith("<table>") and len(shown._repr_html_()) < 2000
    assert all(fact in str(shown) for fact in shown.summary().values())


def test_names_of_files_are_no_markup_in_a_notebook(results):
    odd = qlab.Tokens(ids=results["tokens"].ids, texts=("<b>.txt",), sha256="0" * 64, seed=0)
    assert "&lt;b&gt;.txt" in odd._repr_html_() and "<b>" not in odd._repr_html_()


@pytest.mark.parametrize(
    "option", [["--memory", "4"], ["--inputs", "reference"], ["--calibrate-all-experts"]]
)
def test_options_of_a_model_that_is_not_run_are_refused(call, saved, tmp_path, option):
    code, _, error = call(
        "quantize",
        saved(),
        "--model-free",
        "--spec",
        "int4-g32",
        *option,
        "--out",
        tmp_path / "out",
    )
    assert (
        code == 2
        and f"{option[0]}" in error
        and "would change nothing" in error
        and not (tmp_path / "out").exists()
    )


def test_a_budget_beyond_all_numbers_and_a_figure_without_a_folder_are_refused(
    call, command, saved, tmp_path, monkeypatch
):
    from qlab.bench import matmul
    from qlab.bench.__main__ import main

    code, _, error = call(
        "quantize",
        saved(),
        "--method",
        "rtn",
        "--spec",
        "int4-g32",
        "--memory",
        "1e300",
        "--out",
        tmp_path / "out",
    )
    assert code == 2 and "--memory 1e+300 is no budget" in error
    monkeypatch.setattr(matmul, "compare_matmuls", None)  # fails where it is called
    code, _, error = command(
        main, "matmul", "--device", "cpu", "--plot", tmp_path / "none" / "x.png"
    )
    assert code == 2 and "give --plot a file in a folder that is there" in error


def test_zero_points_of_no_rounding_are_refused(call, saved, tmp_path):
    code, _, error = call(
        "convert", saved(), "--codec", "gptq", "--asymmetric", "--out", tmp_path / "out"
    )
    assert code == 2 and "--asymmetric says how --requantize rounds" in error


def test_names_in_python_are_meant_without_regard_to_case(saved, tmp_path, monkeypatch, demo):
    assert qlab.parse_spec("INT4-G32") == qlab.parse_spec("int4-g32") and qlab.parse_spec(
        "NVFP4"
    ) == qlab.parse_spec("nvfp4")
    options = {
        "codec": "Compressed-Tensors",
        "target": "vLLM",
        "inputs": "Reference",
        "device": "CPU",
    }
    assert (
        qlab.quantize(saved(), qlab.rtn("W8A16"), None, tmp_path / "q", **options).inputs
        == "reference"
    )
    (demo / "model").symlink_to(saved())
    monkeypatch.chdir(tmp_path)
    assert qlab.open("Demo").path == qlab.open("demo").path
