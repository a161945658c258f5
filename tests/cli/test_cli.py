"""The commands, end to end on a tiny model: what they print, what they write, and what they
refuse."""

import gc
import inspect
import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import pytest

import qlab
import qlab.cli
from qlab.cli import quantizing
from qlab.cli.running import loading

SMALL = ["--spec", "int4-g32", "--samples", "8", "--length", "32"]


@pytest.fixture
def call(command):
    return partial(command, qlab.cli.main)


@pytest.fixture(scope="module")
def quantized(saved, text, tmp_path_factory):
    """The tiny model quantized once by the command, with the JSON that it wrote."""
    folder = tmp_path_factory.mktemp("quantized")
    files = ["--calib", text, "--out", folder / "out", "--json", folder / "q.json"]
    command = [
        sys.executable,
        "-m",
        "qlab",
        "quantize",
        saved(),
        "--method",
        "gptq",
        *SMALL,
        *files,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bits per weight" in done.stdout and "quantized inputs" in done.stdout
    return folder


def sentence(printed):
    """What is complained of is one line that starts with the program's name, and no traceback."""
    code, _, error = printed
    lines = error.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("qlab: "), error
    return lines[0]


def test_files_after_the_first_one_belong_to_the_same_option(call, saved, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text())
    for arguments in (
        [saved(), "--calib", text, other, *SMALL],
        [*SMALL, "--calib", text, "--calib", other, saved()],
        [*SMALL, "--calib", text, other, saved()],
    ):
        code, _, error = call("plan", *arguments, "--json", tmp_path / "plan.json")
        assert code == 0, error
        assert json.loads((tmp_path / "plan.json").read_text())["tokens"] == 8 * 32
    assert call("plan", saved(), text, other)[0] == 2


def test_a_plan_takes_every_option_of_a_run_that_changes_its_answer():
    of_output = {"out", "overwrite", "resume", "model_free", "include", "exclude"}
    of_work = {"jobs", "statistics", "keep_statistics"}
    of_devices = {"ranks", "blocks", "link"}
    run, plan = (
        set(inspect.signature(f).parameters) for f in (quantizing.quantize, quantizing.plan)
    )
    plan = {name for name in plan - of_devices if not name.startswith("device_")}
    assert run - of_output - of_work == plan
    run, plan = (set(inspect.signature(f).parameters) for f in (qlab.quantize, qlab.plan))
    assert run - of_output - of_work == plan - {"skeleton", "ranks"}


def test_a_plan_is_of_the_inputs_and_the_budget_of_the_run(call, saved, text, tmp_path):
    job, files = [saved(), *SMALL, "--calib", text], ["--json", tmp_path / "plan.json"]
    for inputs, passes in ("quantized", 1), ("reference", 2):
        assert call("plan", *job, "--inputs", inputs, *files)[0] == 0
        assert json.loads((tmp_path / "plan.json").read_text())["passes"] == passes
    code, out, said = call("plan", *job, "--memory", 0.001)
    assert code == 2 and "predicted peak memory" in out and "the budget is 1 MiB" in said


def test_plan_says_everything_before_anything_runs(call, saved, text, tmp_path):
    before = sorted(saved().iterdir())
    code, out, _ = call("plan", saved(), *SMALL, "--calib", text, "--json", tmp_path / "plan.json")
    assert code == 0
    assert "gptq" in out and "predicted peak memory" in out and "lm_head" in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["peak_bytes"] == sum(plan["memory"].values())
    assert plan["statistics"] == ["second_moment"] and plan["tokens"] == 8 * 32
    assert plan["unquantized"] == ["lm_head"]
    assert {row["spec"] for row in plan["sites"].values()} == {"int4-g32"}
    assert sorted(saved().iterdir()) == before


def test_quantize_writes_a_model_directory_and_its_json(quantized):
    result = json.loads((quantized / "q.json").read_text())
    assert result["path"] == str(quantized / "out") and result["inputs"] == "quantized"
    assert result["bytes"] == sum(
        f.stat().st_size for f in (quantized / "out").glob("*.safetensors")
    )
    assert (
        result["seconds"] > 0 and result["peak_rss_bytes"] > 0 and 4 < result["bits_per_weight"] < 6
    )
    assert len(result["sites"]) == 14 and all(row["loss"] > 0 for row in result["sites"].values())
    assert {"config.json", "qlab.json", "tokenizer.json"} <= {
        f.name for f in (quantized / "out").iterdir()
    }
    assert not (quantized / "out.partial").exists()


def test_a_job_that_may_replace_and_go_on_can_be_started_again_and_again(call, saved, tmp_path):
    arguments = [
        "quantize",
        saved(),
        "--method",
        "rtn",
        "--spec",
        "int4-g32",
        "--out",
        tmp_path / "out",
        "--resume",
    ]
    assert call(*arguments[:4], "--spec", "int8-g32", *arguments[6:])[0] == 0
    former = (tmp_path / "out" / "qlab.json").read_bytes()
    code, _, error = call(*arguments)
    assert code == 2 and "exists and holds something else" in error
    for _ in range(2):
        code, _, error = call(*arguments, "--overwrite")
        assert code == 0, error
        written = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
        assert "qlab.json" in written and (tmp_path / "out" / "qlab.json").read_bytes() != former
    assert call(*arguments)[0] == 0
    assert written == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}


def test_eval_prints_every_figure_with_its_interval(call, quantized, saved, text, tmp_path):
    code, out, _ = call(
        "eval",
        quantized / "out",
        "--against",
        saved(),
        "--text",
        text,
        "--length",
        32,
        "--windows",
        4,
        "--json",
        tmp_path / "eval.json",
    )
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert code == 0 and "95 % interval" in out and "4 windows of 32" in " ".join(out.split())
    for name, value in {
        "perplexity_ci": "perplexity",
        "ratio_ci": "ratio",
        "kl_ci": "kl",
        "top1_ci": "top1_agreement",
    }.items():
        low, high = figures[name]
        assert (
            low
            <= (
                figures["perplexity"] / figures["reference_perplexity"]
                if value == "ratio"
                else figures[value]
            )
            <= high
        )
        assert f"{low:.4f} to {high:.4f}" in out
    (short := tmp_path / "short.txt").write_text(" ".join(text.read_text().split()[:48]))
    said = sentence(
        call("eval", quantized / "out", "--against", saved(), "--text", short, "--length", 32)
    )
    assert "gives one window of 32 tokens, and an interval needs two" in said
    assert (
        figures["data"]["length"] == 32
        and figures["predictions"] == 4 * 31
        and len(figures["layer_error"]) == 2
    )


def test_inspect_shows_the_sites(call, quantized, tmp_path):
    code, out, _ = call("inspect", quantized / "out", "--json", tmp_path / "inspect.json")
    record = json.loads((tmp_path / "inspect.json").read_text())
    assert code == 0 and "14 of 14 weights quantized" in out
    assert all(site in out for site in record["sites"])
    written = json.loads((quantized / "out" / "qlab.json").read_text())
    assert all(record[key] == written[key] for key in ("job", "certificates", "changed"))
    assert all(
        row.items() <= record["sites"][site].items() for site, row in written["sites"].items()
    )


def test_inspect_says_over_how_many_ranks_a_model_can_be_divided(call, saved, tmp_path):
    for path, degrees, says in (
        (saved("qwen3_moe"), [1, 2], "over 1, 2 ranks"),
        (saved("llama", num_key_value_heads=1), [1], "over 1 rank\n"),
        (saved("opt"), [1], "no tensor parallel plan for the blocks of opt models"),
    ):
        code, out, _ = call("inspect", path, "--json", tmp_path / "inspect.json")
        told = json.loads((tmp_path / "inspect.json").read_text())["tensor_parallel"]
        assert (
            code == 0
            and says in out
            and says.strip() in told["says"]
            and told["degrees"] == degrees
        )


def test_convert_and_verify_go_by_exit_codes(call, quantized, saved, tmp_path):
    code, out, _ = call(
        "convert", quantized / "out", "--codec", "compressed-tensors", "--out", tmp_path / "again"
    )
    assert code == 0 and "14 weights with the same codes, 0 rounded anew" in out
    code, out, _ = call(
        "verify", tmp_path / "again", "--against", saved(), "--json", tmp_path / "v.json"
    )
    assert (
        code == 0
        and "14 quantized weights, 0 faults" in out
        and json.loads((tmp_path / "v.json").read_text())["faults"] == []
    )
    code, out, _ = call("verify", tmp_path / "again", "--against", saved("llama", seed=1))
    assert code == 1 and "14 faults" not in out and "was made from another model" in out


def test_codecs_and_targets_are_checked_before_anything_runs(call, saved, text, tmp_path):
    job = ["quantize", saved(), *SMALL, "--method", "rtn", "--out", tmp_path / "out"]
    assert "codec 'nothing' is unknown" in sentence(call(*job, "--codec", "nothing"))
    within = sentence(call(*job, "--codec", "nothing", "--bits", 4))
    assert "codec 'nothing' is unknown" in within
    assert "target 'engine' is unknown; qlab knows the limits of vllm" in sentence(
        call(*job, "--target", "engine")
    )
    wrong = sentence(call(*job, "--target", "vllm", "--spec", "int4-g16"))
    assert (
        "vllm loads no int4-g16 weights" in wrong
        and "the nearest it loads is int4-g32" in wrong
        and "q_proj" in wrong
    )
    assert not (tmp_path / "out").exists()
    assert call(*job, "--target", "vllm")[0] == 0


def test_quantizing_without_a_model(call, saved, tmp_path):
    job = ["quantize", saved(), "--model-free", "--out", tmp_path / "out"]
    code, out, _ = call(
        *job,
        "--spec",
        "fp8-channel",
        "--exclude",
        "*down_proj",
        "--exclude",
        "*.1.*",
        "--json",
        tmp_path / "q.json",
    )
    assert code == 0 and "compressed-tensors, 6 weights" in out
    assert len(json.loads((tmp_path / "q.json").read_text())["sites"]) == 6
    assert call("verify", tmp_path / "out", "--against", saved())[0] == 0
    assert "observes second_moment" in sentence(call(*job, "--method", "gptq", "--overwrite"))
    assert "go with --model-free" in sentence(
        call("quantize", saved(), "--include", "*", "--out", tmp_path / "no")
    )


def test_a_folder_of_others_is_kept_whatever_is_told(call, saved, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    job = ["quantize", saved(), "--method", "rtn", *SMALL, "--out", out]
    assert "exists" in sentence(call(*job))
    assert [f.name for f in out.iterdir()] == ["mine.txt"]
    assert "mine.txt, which qlab did not write" in sentence(call(*job, "--overwrite"))
    assert [f.name for f in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--method", "gtpq"], "method 'gtpq' is unknown; known are rtn, "),
        (["--spec", "int4"], "spec 'int4' is unknown"),
        (["--spec", "int9-g32"], "bits go from 1 to 8"),
        (["--spec", "int4-g48"], "groups of 48 do not divide the 64 input channels"),
        (["--inputs", "both"], "inputs 'both' are unknown; choose 'quantized' or 'reference'"),
        (["--calib", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--samples", "9999"], "9999 were asked for"),
        (["--memory", "0.001"], "the budget is 1 MiB"),
        (["--memory", "nan"], "--memory nan is no budget; give it in GiB"),
        (["--memory", "-1"], "--memory -1.0 is no budget"),
        (["--device", "gpu"], "the device 'gpu' cannot be used here"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(call, saved, text, tmp_path, arguments, part):
    calib = [] if "--calib" in arguments else ["--calib", text]
    assert part in sentence(
        call("quantize", saved(), *SMALL, *calib, "--out", tmp_path / "out", *arguments)
    )
    assert not list(tmp_path.iterdir())


def test_demo_is_a_model_for_every_command_that_takes_one(call, saved, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(saved())
    monkeypatch.setenv("QLAB_DEMO", str(tmp_path))
    code, printed, _ = call("inspect", "demo")
    assert code == 0 and "llama, unquantized" in printed
    assert "is not quantized" in sentence(call("verify", "demo", "--against", "demo"))
    assert "is not quantized" in sentence(
        call("convert", "demo", "--codec", "gptq", "--out", tmp_path / "out")
    )


def test_other_commands_refuse_in_one_sentence_too(call, saved, tmp_path):
    assert "is not a model directory" in sentence(call("plan", tmp_path / "nothing"))
    assert "is not a model directory" in sentence(call("inspect", tmp_path / "nothing"))
    assert "is not quantized" in sentence(
        call("convert", saved(), "--codec", "compressed-tensors", "--out", tmp_path / "out")
    )
    assert "is not quantized" in sentence(call("verify", saved(), "--against", saved()))
    assert "is not a model directory" in sentence(
        call("eval", saved(), "--against", tmp_path / "nothing")
    )


def test_help_lists_the_commands():
    done = subprocess.run([sys.executable, "-m", "qlab", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("plan", "quantize", "eval", "inspect"))


def test_the_commands_import_what_they_need_when_they_run():
    code = (
        "import sys, qlab.cli; print(sorted({'torch', 'transformers', 'safetensors', "
        "'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("error", [None, ImportError])
def test_the_collector_rests_while_a_command_loads_and_no_longer(error, monkeypatch):
    frozen = []
    # Not in this process, where it would keep other tests' garbage.
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    with nullcontext() if error is None else pytest.raises(error), loading():
        assert not gc.isenabled()
        if error:
            raise error
    assert gc.isenabled() and frozen == [False]
