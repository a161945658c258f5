"""Schemes on the command line."""

import json
from functools import partial

import pytest

import qlab.bench.__main__
import qlab.cli
from qlab.methods.schemes import SCHEMES

SMALL = ["--samples", "2", "--length", "16"]
RTN = ["--method", "rtn"]


@pytest.fixture
def call(command):
    return partial(command, qlab.cli.main)


def test_the_command_lists_every_scheme(call, tmp_path):
    code, said, error = call("schemes", "--json", tmp_path / "schemes.json")
    assert code == 0, error
    assert all(name in said for name in SCHEMES)
    rows = json.loads((tmp_path / "schemes.json").read_text())
    by_name = {row["scheme"]: row for row in rows}
    assert by_name["W8A8"]["inputs"] == "int8-token" and by_name["NVFP4"]["capability"] == [10, 0]


@pytest.mark.parametrize(
    "scheme, inputs", [("w8a8_static", "int8-tensor static"), ("fp8", "fp8-tensor static")]
)
@pytest.mark.parametrize(
    "method, steps",
    [("wanda-2:4+gptq", ["wanda", "gptq"]), ("awq", ["awq_scale", "absorb", "rtn"])],
)
def test_a_scheme_with_a_method_and_a_cache_is_written(
    scheme, inputs, method, steps, call, saved, text, tmp_path
):
    out = tmp_path / "out"
    job = [saved("llama"), *SMALL, "--calib", text, "--scheme", scheme, "--out", out]
    code, _, error = call(
        "quantize",
        *job,
        "--method",
        method,
        "--kv-cache",
        "fp8-head",
        "--static",
        "least_error",
    )
    assert code == 0, error
    model = qlab.open(out)
    assert {str(spec) for spec in model.inputs.values()} == {inputs}
    config = model.raw["quantization_config"]
    assert config["kv_cache_scheme"]["strategy"] == "attn_head"
    stages = [row["stage"] for row in json.loads((out / "qlab.json").read_text())["job"]["recipe"]]
    assert stages == [*steps, "quantize_inputs", "kv_cache"]


def test_a_scheme_keeps_what_is_kept_and_is_planned(call, saved, text):
    job = [saved("llama"), *SMALL, "--calib", text, "--keep", "*.down_proj"]
    code, said, error = call("plan", *job, "--scheme", "W4A8-g32", "--kv-cache", "int8")
    assert code == 2 and "int8" in error  # which needs what a scale covers
    code, said, error = call("plan", *job, "--scheme", "W4A8-g32", "--kv-cache", "int8-token")
    assert code == 0 and "kv_cache" in said and "quantize_inputs" in said, error
    code, said, error = call("plan", saved("llama"), *SMALL, "--scheme", "KV_INT8_TOKEN")
    assert code == 0 and "gptq" not in said, error


@pytest.mark.parametrize(
    "options, words",
    [
        (["--scheme", "W4A16", "--spec", "int4-g32"], "--scheme W4A16 and --spec both say"),
        (["--scheme", "W4A16", "--asymmetric"], "--scheme W4A16 and --asymmetric both say"),
        (["--scheme", "W4A16", "--bits", "4"], "--scheme W4A16 and --bits both say"),
        (["--scheme", "W8A"], "the scheme 'W8A' is unknown; the nearest are W8A8"),
        (["--scheme", "KV_INT8_HEAD", "--method", "gptq"], "--method gptq would round nothing"),
        (["--scheme", "KV_INT8_HEAD", "--kv-cache", "fp8-head"], "rounds the cache already"),
        (["--kv-cache", "KV_FP8"], "--kv-cache KV_FP8 is unknown; the nearest are KV_FP8_"),
        (["--kv-cache", "int9-head"], "int9 is not a grid"),
        (["--scheme", "W8A8", "--static", "quantile"], "all scales of W8A8 are found at run time"),
        (["--scheme", "FP8", "--static", "median"], "'median' measures no scale"),
        (["--static", "quantile"], "no scheme is named"),
        (["--kv-cache", "W4A16"], "--kv-cache W4A16 is a scheme of weights"),
        (["--kv-cache", "int9-head"], "int9"),
        (["--scheme", "W4A16", *RTN], "groups of 128 do not divide the 64 input channels"),
        (["--scheme", "W4A8-g32", *RTN, "--codec", "gptq"], "GPTQ holds no run-time operations"),
        (["--scheme", "W4A8-g32", *RTN, "--target", "sglang"], "sglang rounds no inputs"),
    ],
)
def test_what_contradicts_itself_is_one_sentence(options, words, call, saved):
    code, _, error = call("plan", saved("llama"), *options)
    assert code == 2 and len(error.strip().splitlines()) == 1, error
    assert words in error


def test_methods_that_fill_a_scheme_are_compared(command, saved, text, tmp_path):
    small = ["--samples", "2", "--length", "16", "--windows", "2"]
    texts = ["--calib", text, "--text", text]
    code, _, error = command(
        qlab.bench.__main__.main,
        *["--model", saved("llama"), "--methods", "rtn,gptq", "--scheme", "W8A8", *small],
        *[*texts, "--out", tmp_path / "bench"],
    )
    assert code == 0, error
    record = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert [row["spec"] for row in record["rows"]] == ["W8A8", "W8A8"]
    assert {str(s) for s in qlab.open(tmp_path / "bench" / "rtn").inputs.values()} == {
        "int8-channel"
    }
