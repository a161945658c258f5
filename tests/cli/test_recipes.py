"""Recipes of one's own on the command line: what is run, what is recorded, and one sentence for
everything that is wrong with a file."""

import json
import math
from functools import partial

import pytest

import qlab
import qlab.cli

SMALL = ["--samples", "4", "--length", "32"]
GOOD = """
import qlab
from dataclasses import dataclass

@dataclass
class Settings:
    damp: float = 0.02

def mine(spec):
    return qlab.gptq(spec, damp=Settings().damp)

def nothing(spec):
    return None

def failing(spec):
    left = 0
    return 1 / left

settled = qlab.rtn("int8-g32")
number = 3
"""


@pytest.fixture
def call(command):
    return partial(command, qlab.cli.main)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_recipes.py"
    path.write_text(GOOD)
    return path


def sentence(printed):
    code, _, error = printed
    lines = error.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("qlab: "), error
    return lines[0]


def recipe_of(out):
    return json.loads((out / "qlab.json").read_text())["job"]["recipe"]


def test_a_function_of_a_spec_and_a_transform_are_run_and_recorded(
    call, saved, text, file, tmp_path
):
    out = tmp_path / "out"
    job = [saved(), *SMALL, "--calib", text]
    code, said, error = call(
        "quantize", *job, "--spec", "int4-g32", "--recipe", f"{file}:mine", "--out", out
    )
    assert code == 0, error
    [stage] = recipe_of(out)
    assert stage["stage"] == "gptq" and "damp 0.02" in stage["detail"]
    assert f"of {file}:mine (sha256 " in stage["detail"] and stage["spec"].startswith("int4-g32")
    out = tmp_path / "settled"
    code, _, error = call("quantize", saved(), "--recipe", f"{file}:settled", "--out", out)
    assert code == 0 and recipe_of(out)[0]["spec"].startswith("int8-g32"), error
    code, said, error = call("plan", saved(), "--recipe", f"{file}:settled")
    assert code == 0 and "my_recipes.py" in said.replace("\n", ""), error


def test_a_run_does_not_go_on_with_another_content_of_the_file(call, saved, file, tmp_path):
    out, job = tmp_path / "out", ["--recipe", f"{file}:settled", "--resume"]
    assert call("quantize", saved(), *job, "--out", out)[0] == 0
    assert call("quantize", saved(), *job, "--out", out)[0] == 0
    file.write_text(GOOD + "# another thought\n")
    assert "holds something else" in sentence(call("quantize", saved(), *job, "--out", out))


@pytest.mark.parametrize(
    "recipe, words",
    [
        ("{file}", "names no recipe of a file; write FILE.py:NAME"),
        ("missing.py:mine", "missing.py is no file; give --recipe a file"),
        ("{file}:mien", "has no 'mien'; it has mine, nothing, failing, settled"),
        ("{file}:number", "number is of type int; name a transform"),
        ("{file}:Settings", "Settings is of type type; name a transform"),
        ("{file}:nothing", "nothing returned of type NoneType; return a transform"),
        ("{file}:failing", "line 17 in failing(int4-g64) raised ZeroDivisionError: division by"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_one_sentence(call, saved, file, tmp_path, recipe, words):
    said = sentence(
        call("quantize", saved(), "--recipe", recipe.format(file=file), "--out", tmp_path / "out")
    )
    assert words in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        ("def mine(spec:\n    pass\n", "line 1 raised SyntaxError"),
        ("import qlab\n\nimport nowhere_at_all\n", "line 3 raised ModuleNotFoundError"),
        ("raise SystemExit('enough')\n", "line 1 raised SystemExit: enough"),
        ("import qlab\nmine = qlab.rtn('int4-g6x')\n", "line 2 raised QlabError: "),
        ("mine = ()\n", "mine is an empty tuple"),
    ],
)
def test_what_a_file_raises_is_one_sentence_with_its_line(call, saved, tmp_path, content, words):
    path = tmp_path / "wrong.py"
    path.write_text(content)
    assert words in sentence(call("plan", saved(), "--recipe", f"{path}:mine"))


def test_options_that_would_not_be_used_are_refused(call, saved, file):
    settled = ["plan", saved(), "--recipe", f"{file}:settled"]
    assert "are both recipes" in sentence(call(*settled, "--method", "rtn"))
    assert "--spec would not be used" in sentence(call(*settled, "--spec", "int4-g32"))


def test_without_a_model_a_recipe_of_files_is_run_too(call, saved, file, tmp_path):
    out = tmp_path / "out"
    job = ["--model-free", "--recipe", f"{file}:settled", "--out", out]
    code, _, error = call("quantize", saved(), *job)
    assert code == 0 and len(qlab.open(out).quantized) == 14, error


def test_a_budget_of_bits_is_spent_among_widths(call, saved, text, file, tmp_path):
    out, job = tmp_path / "out", [saved(), *SMALL, "--calib", text, "--spec", "int4-g32"]
    code, _, error = call("quantize", *job, "--method", "rtn", "--bits", 6, "--out", out)
    assert code == 0, error
    assert len({str(spec) for spec in qlab.open(out).quantized.values()}) > 1
    rows = json.loads((out / "qlab.json").read_text())["sites"].values()
    sizes = [math.prod(row["shape"]) for row in rows]
    mean = sum(row["bits_per_weight"] * n for row, n in zip(rows, sizes)) / sum(sizes)
    assert 5 < mean <= 6
    for arguments, why in (
        (["--spec", "nvfp4", "--bits", 4], "--bits 4 chooses among widths of integers"),
        (["--spec", "int4-g32", "--bits", 1], "smallest choices of allocate take"),
        (["--recipe", f"{file}:settled", "--bits", 4], "--bits would not be used"),
    ):
        printed = call(
            "quantize", saved(), *SMALL, "--calib", text, *arguments, "--out", tmp_path / "b"
        )
        assert printed[0] == 2 and why in printed[2].strip().splitlines()[-1], printed[2]


def test_rows_of_steps_are_methods(call, saved, text, tmp_path):
    for method, why in (
        ("sparsegpt+gptq", "sparsegpt lacks what it takes; write for example sparsegpt-2:4"),
        ("quarot-3+gptq", "quarot takes nothing behind its name"),
        ("smoothquant-x+rtn", "smoothquant 'x', which is no number"),
        ("eora-x", "the rank 'x' is no whole number"),
        ("sparsegpt-4:8", "rounds no weights; put a rounding into the row"),
        ("sparsegpt-2:4+gtpq", "method 'gtpq' is unknown in 'sparsegpt-2:4+gtpq'"),
        ("rtn+inputs-int5x", "int5x"),
        ("rtn+static_inputs-int8-token", "inputs int8-channel have several scales"),
        ("kv-int8-token+rtn", "no scale per token of all heads"),
        ("rtn+gptq", "is rounded by two stages"),
    ):
        job = ["plan", saved(), "--method", method, "--spec", "int4-g32", *SMALL]
        code, _, error = call(*job)
        assert code == 2 and why in error.strip().splitlines()[-1], (method, error)
    out, job = tmp_path / "out", [saved(), *SMALL, "--calib", text, "--spec", "int4-g32"]
    code, _, error = call("quantize", *job, "--method", "SparseGPT-4:8+GPTQ", "--out", out)
    assert code == 0, error
    assert [stage["stage"] for stage in recipe_of(out)] == ["sparsegpt", "gptq"]


def test_a_recipe_is_evaluated_without_being_written(call, saved, text, file, tmp_path):
    job = [saved(), *SMALL, "--text", text, "--windows", 4, "--spec", "int4-g32"]
    calibrated = [*job, "--calib", text]
    for recipe, why in (
        (["--method", "eora-4+rtn"], "eora makes up for what a step before it lost"),
        (["--recipe", f"{file}:nothing"], "nothing returned of type NoneType"),
    ):
        code, _, error = call("eval", *calibrated, *recipe)
        assert code == 2 and why in error.strip().splitlines()[-1], error
    runs = {}
    for name in ("rtn", "rtn+eora-4"):
        data = calibrated if "eora" in name else job
        saying = tmp_path / f"{name}.json"
        code, out, error = call("eval", *data, "--method", name, "--seeds", 2, "--json", saying)
        assert code == 0 and "KL divergence" in out and "over seeds" in out, error
        runs[name] = json.loads(saying.read_text())
        assert runs[name]["seeds"]["seeds"] == [0, 1] and runs[name]["method"] == name
    assert runs["rtn+eora-4"]["kl"] < runs["rtn"]["kl"]
    code, _, error = call("eval", *calibrated, "--recipe", f"{file}:mine")
    assert code == 0, error
    assert "--spec would not be used, since no recipe" in sentence(call("eval", *job))
