"""`qlab tune`, `qlab cache`, `python -m qlab.bench matmul|tune` on a CPU: what they print, write and refuse."""

import json

import pytest
import torch

import qlab
import qlab.cli
from qlab.bench import contenders
from qlab.bench.__main__ import main as bench_main
from qlab.bench.contenders import CONTENDERS, Case, Unavailable, prepare
from qlab.bench.matmul import compare_matmuls, losses, table, verdict
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.lower import QLinear, cpu, timing, tuning
from qlab.lower.timing import copies, microseconds
from qlab.lower.tuning import Form, parse_shapes, random_weight, weights_of
from qlab.methods.rtn import rtn
from qlab.spec import parse_spec
from qlab_kernels import cache
from qlab_kernels.config import Config

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SMALL = ["--shapes", "128x256", "--m", "1,8", "--group", "64", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """A machine with a small cache: few copies of every weight."""
    monkeypatch.setattr(timing, "last_cache", lambda device: 2**16)
    monkeypatch.setattr("qlab.bench.matmul.copy_rate", lambda device: 10.0)
    monkeypatch.setattr("qlab.bench.matmul.matmul_rate", lambda device, dtype: 0.1)


@pytest.fixture
def call(command):
    return lambda *arguments, main=qlab.cli.main: command(main, *arguments)


def test_tuning_fills_the_cache_and_a_second_time_measures_nothing(call, tmp_path, folder):
    code, out, said = call("tune", *SMALL, "--json", tmp_path / "tuned.json")
    assert code == 0 and str(folder) in out.replace("\n", "")
    rows = json.loads((tmp_path / "tuned.json").read_text())["rows"]
    assert [(row["m"], row["dense_copy"]) for row in rows] == [(1, False), (8, False), (1, True), (8, True)]
    assert all(row["timings"] >= 2 and row["config"]["kind"] in ("int4pack", "dense") and row["us"] > 0 for row in rows)
    assert "128x256, 8 tokens" in said
    code, out, said = call("tune", *SMALL)
    assert code == 0 and "4 entries, 0 timings" in out and said.count("measured before") == 4
    code, out, _ = call("tune", *SMALL, "--retune", main=bench_main)
    assert code == 0 and "4 entries, 0 timings" not in out


@pytest.mark.parametrize("fastest", ["int4pack", "dense"])
def test_what_was_tuned_is_what_runs(call, monkeypatch, fastest):
    """The key of the tuner is the key of the lowered product."""
    from qlab.lower import cpu

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
    sites = {"a": {**site, "shape": [128, 256]}, "b": {**site, "shape": [128, 256]}, "c": {**site, "shape": [64, 64]},
             "experts": {**site, "shape": [4, 192, 64]}, "lm_head": {**site, "spec": None, "shape": [99, 64]}}  # fmt: skip
    sites["float"] = {**site, "spec": "nvfp4", "shape": [128, 256]}  # no kernel takes it
    (tmp_path / "qlab.json").write_text(json.dumps({"sites": sites}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert weights_of(tmp_path, "cuda") == {Form(64): [(64, 64), (128, 256)], Form(64, experts=4): [(192, 64)]}
    one_by_one = {Form(64): [(64, 64), (128, 256), (192, 64)]}
    assert weights_of(tmp_path, "cpu") == one_by_one
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert weights_of(tmp_path, "cuda") == one_by_one
    (tmp_path / "qlab.json").write_text(json.dumps({"sites": {"float": sites["float"]}}))
    with pytest.raises(QlabError, match="has no weight for a kernel to be tuned for: nvfp4 has no kernel"):
        weights_of(tmp_path, "cpu")


def test_tuning_a_directory_measures_what_its_lowered_model_looks_up(call, saved, tmp_path):
    """Its groups, its zero points and its planes: every choice of the lowered model is then a measured one."""
    for text in ("int4-g32", "int3-g64-asym", "int4-channel", "int8-g32"):
        path = qlab.quantize(open_checkpoint(saved(dtype=torch.bfloat16)), rtn(parse_spec(text)), None, tmp_path / text).path
        code, _, error = call("tune", path, "--m", "1", "--device", "cpu", "--budget", "0.2")
        assert code == 0, error
        for module in qlab.lower(path).modules():
            if isinstance(module, QLinear):
                rows, half = module.words.shape
                problem = cpu.problem(1, torch.bfloat16, False, rows, 2 * half, module.group, module.zeros is not None)
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
    assert {row["file"] for row in json.loads((tmp_path / "list.json").read_text())} == {"int4_mm.sm80.json", "int4_mm.sm90.json"}
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
        (["tune", "--shapes", "128x100", "--device", "cpu"], "groups of 128 do not divide a weight of 128x100"),
        (["tune", *SMALL, "--m", "0"], "--m 0 is no number of tokens"),
        (["tune", *SMALL, "--experts", "4"], "cpu multiplies experts one by one, as linears"),
        (["tune", "model", "--experts", "4"], "model has its own groups, zero points and experts"),
        (["tune", *SMALL, "--m", "a"], "--m 'a' is no list of token counts"),
        (["tune", *SMALL, "--dtype", "float32"], "--dtype 'float32' is unknown"),
        (["tune", *SMALL, "--group", "16"], "groups of 16 have no int4 kernel; quantize with groups of 32"),
        (["tune", *SMALL, "--device", "tpu"], "'tpu' is no device; lower to 'cpu' or 'cuda'"),
        (["tune", *SMALL, "--dtype", "float16"], "always dense, so there is nothing to tune"),
        (["cache", "import", "/no/such/file"], "is no file; give one that `qlab cache export` wrote"),
        (["cache", "export", "/no/such/folder/file"], "cannot be written"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(call, arguments, part):
    code, out, said = call(*arguments)
    assert code == 2 and not out and said.startswith("qlab: ") and part in said and said.count("\n") == 1


def test_a_read_only_home_refuses_to_tune_in_one_sentence(call, folder):
    folder.write_text("in the way")
    code, out, said = call("tune", *SMALL)
    assert code == 2 and not out and "nothing that is tuned could be kept: set QLAB_CACHE_DIR" in said and said.count("\n") == 1


# ---------------------------------------------------------------- the bench
def test_the_bench_measures_everybody_and_says_who_is_absent(call, tmp_path):
    names = "qlab,dense copy,library,torch int4,gemlite"
    files = ["--json", tmp_path / "m.json", "--plot", tmp_path / "m.png", "--seconds", "0.01"]
    code, out, said = call("matmul", *SMALL, "--contenders", names, *files, main=bench_main)
    assert code == 0 and "128x256 library:" in said
    record = json.loads((tmp_path / "m.json").read_text())
    assert {(row["contender"], row["m"]) for row in record["rows"]} == {
        (name, m) for name in ("qlab", "dense copy", "library", "torch int4") for m in (1, 8)}  # fmt: skip
    ours = [row for row in record["rows"] if row["contender"] == "qlab"]
    assert all(row["ratio"].keys() == {"dense copy", "library", "torch int4"} and row["graph_us"] is None for row in ours)
    assert record["absent"] == {"gemlite": "runs on GPUs"} and "gemlite runs on GPUs" in out
    assert record["device"]["type"] == "cpu" and record["versions"]["torch"] and record["rates"]["copy_gbps"] == 10
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert "128x256" in out and ("int4 loses to the library's" in out or "int4 is nowhere slower" in out)


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_takes_no_figure_with_it(call, option):
    arguments = [*SMALL, "--contenders", "qlab, library", "--seconds", "0", option, "/no/such/folder/file"]
    code, out, said = call("matmul", *arguments, main=bench_main)
    assert code == 2 and "/no/such/folder/file cannot be written" in said
    measured = "128x256" in out and "library's bfloat16 matmul" in out
    assert measured == (option == "--plot") and bool(out) == measured  # of --json it is known beforehand


def test_tuning_before_the_bench_decides_what_runs(call, tmp_path):
    options = ["--contenders", "qlab", "--tune", "--seconds", "0.01", "--json", tmp_path / "m.json"]
    assert call("matmul", *SMALL, *options, main=bench_main)[0] == 0
    assert {row["source"] for row in json.loads((tmp_path / "m.json").read_text())["rows"]} == {"user"}


@pytest.mark.parametrize(("option", "value"), [
    ("--contenders", "marlin"), ("--group", "100"), ("--group", "16"), ("--m", "-1"), ("--device", "tpu"), ("--device", "meta"),
])  # fmt: skip
def test_the_bench_refuses_before_it_measures(call, option, value):
    code, out, said = call("matmul", *SMALL, option, value, main=bench_main)
    assert code == 2 and not out and said.count("\n") == 1


def row(name, m, us, **more):
    figures = {"graph_us": None, "gbps": 1.0, "tflops": 1.0, "percent_of_floor": 50.0, "floor_us": us / 2}
    return {"contender": name, "n": 64, "k": 64, "m": m, "us": us, **figures, **more}


def record(*rows):
    return {
        "shapes": [[64, 64]], "tokens": [1, 256], "dtype": "bfloat16", "group": 64, "zeros": False, "rows": list(rows),
        "absent": {"gemlite": "is not installed"}, "rates": {"copy_gbps": 1.0, "matmul_tflops": 1.0}, "device": {"name": "x"},
    }  # fmt: skip


def test_it_says_plainly_where_int4_loses():
    how = {"config": {"kind": "gemm", "bm": 16, "bn": 64, "bk": 128, "split": 1}, "source": "nearest", "stale": True}
    rows = [row("qlab", 1, 10.0, ratio={"library": 3.0, "torch int4": 1.2}, **how), row("library", 1, 30.0), row("torch int4", 1, 12.0),
            row("qlab", 256, 60.0, ratio={"library": 0.8, "torch int4": 0.5}, **how), row("library", 256, 48.0),
            row("torch int4", 256, 30.0)]  # fmt: skip
    assert losses(rows) == [{"n": 64, "k": 64, "m": 256, "times": 1.25}]
    assert verdict(record(*rows)) == [
        "64x64: int4 loses to the library's bfloat16 matmul at 1 of 2 numbers of tokens: 1.25 times its time at 256",
        "64x64 at 256: torch int4 is faster, qlab takes 2.00 times its time",
        "gemlite is not installed",
    ]
    drawn = table(record(*rows))
    cells = [list(column.cells) for column in drawn.columns]
    assert cells[2][0] == "gemm 16x64x128 (nearest, stale)" and cells[8] == ["30.0 (3.00x)", "48.0 (0.80x)"]
    assert verdict(record(*rows[:3]))[0] == "64x64: int4 is nowhere slower than the library's bfloat16 matmul"


@pytest.mark.parametrize(("k", "group"), [(100, 100), (1024, 1024), (192, 96)])
@pytest.mark.parametrize("zeros", [False, True])
def test_whole_rows_and_wide_groups_are_held_as_a_lowered_model_holds_them(k, group, zeros):
    for name in ("qlab", "dense copy"):
        prepare(name, Case(70, k, "bfloat16", group, zeros, CPU))  # checks itself against fp32
    rows = tuning.tune_shapes([(70, k)], [1], Form(group, zeros), budget=5.0)
    held = cpu.problem(1, torch.bfloat16, False, 128, k + -k % 64, 32 if group == 96 else 128 if k == 100 else 256, zeros)
    assert cache.lookup(held).source == "user" and all(row["timings"] >= 2 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("bench", ["tune", "matmul"])
def test_a_gpu_that_is_not_there_is_refused(call, bench):
    code, out, said = call(bench, *SMALL, "--device", "cuda", main=bench_main)
    assert code == 2 and not out and "torch finds no CUDA device here" in said and said.count("\n") == 1


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", [name for name in CONTENDERS if name not in ("compiled", "gemlite")])
def test_contenders_multiply_the_same_weight(name, zeros):
    case = Case(64, 128, "bfloat16", 32, zeros, CPU)
    try:
        products = prepare(name, case)  # checks itself against fp32
    except Unavailable as why:
        assert name == "torchao", why
        pytest.skip(str(why))
    assert len(products) >= 4 and products[0](torch.ones(3, 128).bfloat16()).shape == (3, 64)


def test_the_compiled_baseline_multiplies_the_same_weight(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # its arithmetic, without half a minute of compiler
    assert prepare("compiled", Case(64, 128, "bfloat16", 32, True, CPU))


def test_a_contender_that_computes_something_else_is_shown_the_door(monkeypatch):
    wrong = {"library": lambda case: [lambda x: x @ torch.zeros(case.n, case.k).bfloat16().mT]}
    monkeypatch.setattr(contenders, "CONTENDERS", wrong)
    with pytest.raises(Unavailable, match="computes something else: relative error 1"):
        prepare("library", Case(64, 128, "bfloat16", 32, False, CPU))


def test_the_weight_of_a_seed_is_the_same_everywhere_and_other_seeds_differ():
    a, b, c = (random_weight(8, 64, 32, True, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(a.codes, b.codes) and torch.equal(a.zeros, b.zeros) and not torch.equal(a.codes, c.codes)
    W = a.dense(torch.float64)
    assert W[3, 40] == (a.codes[3, 40].double() - a.zeros[3, 1].double()) * a.scales[3, 1]


def test_calls_take_turns_so_that_no_weight_stays_in_the_cache():
    seen = []
    microseconds([lambda i=i: seen.append(i) for i in range(3)], 7, CPU)
    assert seen == [0, 1, 0, 1, 2, 0, 1, 2, 0]  # two to warm up
    assert copies(2**30, CPU) == 4 and copies(2**15, CPU) == 4 and copies(2**13, CPU) == 16 and copies(1, CPU) == 64


def test_a_time_limit_still_leaves_three_repetitions():
    seen = []
    microseconds([lambda: seen.append(0)], 50, CPU, seconds=0.0)
    assert len(seen) == 1 + 3


def test_shapes_are_rows_by_columns():
    assert parse_shapes("8192x8192,4096X14336") == [(8192, 8192), (4096, 14336)]


@pytest.mark.gpu
@needs_gpu
def test_the_bench_on_a_gpu():
    found = compare_matmuls([(4096, 4096)], [1, 16, 1024], device="cuda", seconds=0.2)
    assert {row["contender"] for row in found["rows"]} >= {"qlab", "library", "compiled", "torch int4"}, found["absent"]
    assert all(row["graph_us"] for row in found["rows"] if row["contender"] in ("qlab", "library"))


@pytest.mark.gpu
@needs_gpu
def test_tuning_on_a_gpu_measures_once():
    rows = tuning.tune_shapes([(1024, 1024)], [1, 64], device="cuda", budget=30)
    assert all(row["timings"] and row["source"] == "measured" for row in rows)
    assert not any(row["timings"] for row in tuning.tune_shapes([(1024, 1024)], [1, 64], device="cuda"))


@pytest.mark.gpu
@needs_gpu
def test_tuning_experts_on_a_gpu():
    if tuning.one_by_one(torch.device("cuda")):
        pytest.skip("this GPU multiplies experts one by one")
    [row] = tuning.tune_shapes([(512, 1024)], [100], Form(experts=8), device="cuda", budget=30)
    assert row["source"] == "measured" and row["timings"] > 1 and (row["op"], row["experts"], row["m"]) == ("int4_grouped_mm", 8, 128)
