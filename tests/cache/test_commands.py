"""`qlab tune` and `qlab cache` on a CPU: what they print, write and refuse."""

import json

import pytest
import torch

import qlab
import qlab.cli
from qlab.algebra.spec import parse_spec
from qlab.bench.__main__ import main as bench_main
from qlab.bench.contenders import Case, prepare
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.lowering import QLinear
from qlab.lowering.tuning import tune as tuning
from qlab.lowering.tuning.shapes import Form, parse_shapes, weights_of
from qlab.lowering.weights import cpu
from qlab.methods.rtn import rtn
from qlab_kernels import cache
from qlab_kernels.config import Config

pytestmark = pytest.mark.usefixtures("small_cache")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SMALL = ["--shapes", "128x256", "--m", "1,8", "--group", "64", "--device", "cpu"]


def test_tuning_fills_the_cache_and_a_second_time_measures_nothing(call, tmp_path, folder):
    code, out, said = call("tune", *SMALL, "--json", tmp_path / "tuned.json")
    assert code == 0 and str(folder) in out.replace("\n", "")
    rows = json.loads((tmp_path / "tuned.json").read_text())["rows"]
    assert [(row["m"], row["dense_copy"]) for row in rows] == [
        (1, False),
        (8, False),
        (1, True),
        (8, True),
    ]
    assert all(
        row["timings"] >= 2 and row["config"]["kind"] in ("int4pack", "dense") and row["us"] > 0
        for row in rows
    )
    assert "128x256, 8 tokens" in said
    code, out, said = call("tune", *SMALL)
    assert code == 0 and "4 entries, 0 timings" in out and said.count("measured before") == 4
    code, out, _ = call("tune", *SMALL, "--retune", main=bench_main)
    assert code == 0 and "4 entries, 0 timings" not in out


@pytest.mark.parametrize("fastest", ["int4pack", "dense"])
def test_what_was_tuned_is_what_runs(call, monkeypatch, fastest):
    """The key of the tuner is the key of the lowered product."""
    from qlab.lowering.weights import cpu

    def invented(calls, *_):
        is_int4 = calls[0].func is torch.ops.aten._weight_int4pack_mm_for_cpu
        return 1.0 if is_int4 == (fastest == "int4pack") else 9.0

    monkeypatch.setattr(tuning, "microseconds", invented)
    assert call("tune", *SMALL, "--m", "1,8,1024")[0] == 0
    for m in (1, 8, 7, 1000):
        for dense_copy in (False, True):
            assert cpu.kind(m, torch.bfloat16, dense_copy, 128, 256, 64, False) == fastest


def test_the_shapes_of_a_directory_are_its_weights(tmp_path, monkeypatch):
    """Experts are a linear each on a CPU and on old GPUs, and one grouped product on others."""
    site = {"spec": "int4-g64", "bits_per_weight": 4.25}
    sites = {
        "a": {**site, "shape": [128, 256]},
        "b": {**site, "shape": [128, 256]},
        "c": {**site, "shape": [64, 64]},
        "experts": {**site, "shape": [4, 192, 64]},
        "lm_head": {**site, "spec": None, "shape": [99, 64]},
    }
    sites["float"] = {**site, "spec": "nvfp4", "shape": [128, 256]}  # no kernel takes it
    (tmp_path / "qlab.json").write_text(json.dumps({"sites": sites}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert weights_of(tmp_path, "cuda") == {
        Form(64): [(64, 64), (128, 256)],
        Form(64, experts=4): [(192, 64)],
    }
    one_by_one = {Form(64): [(64, 64), (128, 256), (192, 64)]}
    assert weights_of(tmp_path, "cpu") == one_by_one
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert weights_of(tmp_path, "cuda") == one_by_one
    (tmp_path / "qlab.json").write_text(json.dumps({"sites": {"float": sites["float"]}}))
    with pytest.raises(
        QlabError, match="has no weight for a kernel to be tuned for: nvfp4 has no kernel"
    ):
        weights_of(tmp_path, "cpu")


def test_tuning_a_directory_measures_what_its_lowered_model_looks_up(call, saved, tmp_path):
    """Its groups, its zero points and its planes: every choice of the lowered model is then a
    measured one."""
    for text in ("int4-g32", "int3-g64-asym", "int4-channel", "int8-g32"):
        path = qlab.quantize(
            open_checkpoint(saved(dtype=torch.bfloat16)),
            rtn(parse_spec(text)),
            None,
            tmp_path / text,
        ).path
        code, _, error = call("tune", path, "--m", "1", "--device", "cpu", "--budget", "0.2")
        assert code == 0, error
        for module in qlab.lower(path).modules():
            if isinstance(module, QLinear):
                packed = module.packed
                rows, half = packed.words.shape
                problem = cpu.problem(
                    1, torch.bfloat16, False, rows, 2 * half, packed.group, packed.zeros is not None
                )
                assert cache.lookup(problem).source == "user", (text, module)


def test_paths_and_names_are_printed_as_they_are(call, tmp_path, monkeypatch, problem, entry):
    monkeypatch.setenv("QLAB_CACHE_DIR", str(tmp_path / "a[/b]"))
    cache.refresh()
    cache.store(problem(), entry(device="[/red]:smile:"))
    code, out, _ = call("cache", "list")
    assert code == 0 and "a[/b]" in out and "[/red]:smile:" in out
    code, out, _ = call("cache", "export", tmp_path / "[bold].json")
    assert code == 0 and "[bold].json" in out.replace("\n", "")


def test_the_cache_commands(call, tmp_path, problem, entry):
    cache.store(problem(), entry())
    cache.store(problem(cc=(8, 0), device="a100"), entry(Config("dequant")))
    code, out, _ = call("cache", "list", "--json", tmp_path / "list.json")
    assert code == 0 and "split_k bm=16" in out and "user, measured" in out and "stale" not in out
    assert {row["file"] for row in json.loads((tmp_path / "list.json").read_text())} == {
        "int4_mm.sm80.json",
        "int4_mm.sm90.json",
    }
    assert "shipped, modelled" in call("cache", "list", "--shipped")[1]
    assert "2 entries written" in call("cache", "export", tmp_path / "all.json")[1]
    assert "1 entries removed" in call("cache", "clear", "--capability", "sm80")[1]
    assert "1 entries removed" in call("cache", "clear")[1]
    assert "2 entries taken" in call("cache", "import", tmp_path / "all.json")[1]
    assert cache.refresh().lookup(problem()).source == "user"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["tune"], "give either a directory that qlab quantized or --shapes"),
        (["tune", "--shapes", "128"], "--shapes '128' is no list of NxK"),
        (
            ["tune", "--shapes", "128x100", "--device", "cpu"],
            "groups of 128 do not divide a weight of 128x100",
        ),
        (["tune", *SMALL, "--m", "0"], "--m 0 is no number of tokens"),
        (["tune", *SMALL, "--experts", "4"], "cpu multiplies experts one by one, as linears"),
        (["tune", "model", "--experts", "4"], "model has its own groups, zero points and experts"),
        (["tune", *SMALL, "--m", "a"], "--m 'a' is no list of token counts"),
        (["tune", *SMALL, "--dtype", "float32"], "--dtype 'float32' is unknown"),
        (
            ["tune", *SMALL, "--group", "16"],
            "groups of 16 have no int4 kernel; quantize with groups of 32",
        ),
        (["tune", *SMALL, "--device", "tpu"], "'tpu' is no device; lower to 'cpu' or 'cuda'"),
        (["tune", *SMALL, "--dtype", "float16"], "always dense, so there is nothing to tune"),
        (
            ["cache", "import", "/no/such/file"],
            "is no file; give one that `qlab cache export` wrote",
        ),
        (["cache", "export", "/no/such/folder/file"], "cannot be written"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(call, arguments, part):
    code, out, said = call(*arguments)
    assert (
        code == 2
        and not out
        and said.startswith("qlab: ")
        and part in said
        and said.count("\n") == 1
    )


def test_a_read_only_home_refuses_to_tune_in_one_sentence(call, folder):
    folder.write_text("in the way")
    code, out, said = call("tune", *SMALL)
    assert (
        code == 2
        and not out
        and "nothing that is tuned could be kept: set QLAB_CACHE_DIR" in said
        and said.count("\n") == 1
    )


# ---------------------------------------------------------------- the bench
@pytest.mark.parametrize(("k", "group"), [(100, 100), (1024, 1024), (192, 96)])
@pytest.mark.parametrize("zeros", [False, True])
def test_whole_rows_and_wide_groups_are_held_as_a_lowered_model_holds_them(k, group, zeros):
    for name in ("qlab", "dense copy"):
        prepare(
            name,
            Case(n=70, k=k, dtype="bfloat16", group=group, zeros=zeros, device=torch.device("cpu")),
        )  # checks itself against fp32
    rows = tuning.tune_shapes([(70, k)], [1], Form(group, zeros), budget=5.0)
    lowered_problem = cpu.problem(
        1,
        torch.bfloat16,
        False,
        128,
        k + -k % 64,
        32 if group == 96 else 128 if k == 100 else 256,
        zeros,
    )
    assert cache.lookup(lowered_problem).source == "user" and all(
        row["timings"] >= 2 for row in rows
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("bench", ["tune", "matmul"])
def test_a_gpu_that_is_not_there_is_refused(call, bench):
    code, out, said = call(bench, *SMALL, "--device", "cuda", main=bench_main)
    assert (
        code == 2
        and not out
        and "torch finds no CUDA device here" in said
        and said.count("\n") == 1
    )


def test_shapes_are_rows_by_columns():
    assert parse_shapes("8192x8192,4096X14336") == [(8192, 8192), (4096, 14336)]


@pytest.mark.gpu
@needs_gpu
def test_tuning_on_a_gpu_measures_once():
    rows = tuning.tune_shapes([(1024, 1024)], [1, 64], device="cuda", budget=30)
    assert all(row["timings"] and row["source"] == "measured" for row in rows)
    assert not any(
        row["timings"] for row in tuning.tune_shapes([(1024, 1024)], [1, 64], device="cuda")
    )


@pytest.mark.gpu
@needs_gpu
def test_tuning_experts_on_a_gpu():
    if tuning.one_by_one(torch.device("cuda")):
        pytest.skip("this GPU multiplies experts one by one")
    [row] = tuning.tune_shapes([(512, 1024)], [100], Form(experts=8), device="cuda", budget=30)
    assert (
        row["source"] == "measured"
        and row["timings"] > 1
        and (row["op"], row["experts"], row["m"]) == ("int4_grouped_mm", 8, 128)
    )
