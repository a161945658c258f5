"""`python -m qlab.bench matmul`: what it measures, prints, writes and refuses, and that all
contenders multiply the same weight."""

import json

import pytest
import torch

from qlab.algebra.qtensor import dense
from qlab.bench import contenders
from qlab.bench.__main__ import main as bench_main
from qlab.bench.contenders import CONTENDERS, Case, Unavailable, prepare
from qlab.bench.matmul import compare_matmuls, losses
from qlab.bench.matmul_table import table, verdict
from qlab.lowering.tuning.random_weight import random_weight, rounded_once
from qlab.lowering.tuning.timing import copies, microseconds

pytestmark = pytest.mark.usefixtures("small_cache")
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SMALL = ["--shapes", "128x256", "--m", "1,8", "--group", "64", "--device", "cpu"]


def test_the_bench_measures_everybody_and_says_who_is_absent(call, tmp_path):
    names = "qlab,dense copy,library,torch int4,gemlite"
    files = ["--json", tmp_path / "m.json", "--plot", tmp_path / "m.png", "--seconds", "0.01"]
    code, out, said = call("matmul", *SMALL, "--contenders", names, *files, main=bench_main)
    assert code == 0 and "128x256 library:" in said
    record = json.loads((tmp_path / "m.json").read_text())
    assert {(row["contender"], row["m"]) for row in record["rows"]} == {
        (name, m) for name in ("qlab", "dense copy", "library", "torch int4") for m in (1, 8)
    }
    ours = [row for row in record["rows"] if row["contender"] == "qlab"]
    assert all(
        row["ratio"].keys() == {"dense copy", "library", "torch int4"} and row["graph_us"] is None
        for row in ours
    )
    assert record["absent"] == {"gemlite": "runs on GPUs"} and "gemlite runs on GPUs" in out
    assert (
        record["device"]["type"] == "cpu"
        and record["versions"]["torch"]
        and record["rates"]["copy_gbps"] == 10
    )
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert "128x256" in out and (
        "int4 loses to the library's" in out or "int4 is nowhere slower" in out
    )


def test_a_contender_that_stops_takes_nobodys_figures_with_it(monkeypatch):
    def few(x):
        if len(x) > 4:
            raise RuntimeError("out of memory")
        return x @ W.mT

    W = rounded_once(random_weight(128, 256, 64, False, CPU), torch.bfloat16)
    monkeypatch.setitem(contenders.CONTENDERS, "library", lambda case: [few])
    record = compare_matmuls([(128, 256)], [1, 8], group=64, names=["library", "qlab"], seconds=0.0)
    assert {(row["contender"], row["m"]) for row in record["rows"]} == {
        ("library", 1),
        ("qlab", 1),
        ("qlab", 8),
    }
    assert record["absent"] == {
        "library": "failed at 8 tokens of 128x256: RuntimeError: out of memory"
    }


def test_a_dense_copy_moves_the_bytes_of_what_it_multiplies():
    record = compare_matmuls(
        [(128, 256)], [1, 300], group=64, names=["qlab", "dense copy", "library"], seconds=0.0
    )
    moved = {(row["contender"], row["m"]): row["gbps"] * row["us"] for row in record["rows"]}
    assert (
        moved["dense copy", 1] == pytest.approx(moved["qlab", 1])
        and moved["qlab", 1] < moved["library", 1] / 3
    )
    assert moved["dense copy", 300] == pytest.approx(moved["library", 300])


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(call, option):
    arguments = [
        *SMALL,
        "--contenders",
        "qlab, library",
        "--seconds",
        "0",
        option,
        "/no/such/folder/file",
    ]
    code, out, said = call("matmul", *arguments, main=bench_main)
    assert code == 2 and not out and "/no/such/folder/file cannot be written" in said


def test_tuning_before_the_bench_decides_what_runs(call, tmp_path):
    options = [
        "--contenders",
        "qlab",
        "--tune",
        "--dtype",
        "bf16",
        "--seconds",
        "0.01",
        "--json",
        tmp_path / "m.json",
    ]
    assert call("matmul", *SMALL, *options, main=bench_main)[0] == 0
    assert {row["source"] for row in json.loads((tmp_path / "m.json").read_text())["rows"]} == {
        "user"
    }


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--contenders", "marlin"),
        ("--group", "100"),
        ("--group", "16"),
        ("--m", "-1"),
        ("--device", "tpu"),
        ("--device", "meta"),
    ],
)
def test_the_bench_refuses_before_it_measures(call, option, value):
    code, out, said = call("matmul", *SMALL, option, value, main=bench_main)
    assert code == 2 and not out and said.count("\n") == 1


def case_of(zeros):
    return Case(n=64, k=128, dtype="bfloat16", group=32, zeros=zeros, device=CPU)


def row(name, m, us, **more):
    figures = {
        "graph_us": None,
        "gbps": 1.0,
        "tflops": 1.0,
        "percent_of_floor": 50.0,
        "floor_us": us / 2,
    }
    return {"contender": name, "n": 64, "k": 64, "m": m, "us": us, **figures, **more}


def record(*rows):
    return {
        "shapes": [[64, 64]],
        "tokens": [1, 256],
        "dtype": "bfloat16",
        "group": 64,
        "zeros": False,
        "rows": list(rows),
        "absent": {"gemlite": "is not installed"},
        "rates": {"copy_gbps": 1.0, "matmul_tflops": 1.0},
        "device": {"name": "x"},
    }


def test_it_says_plainly_where_int4_loses():
    how = {
        "config": {"kind": "gemm", "bm": 16, "bn": 64, "bk": 128, "split": 1},
        "source": "nearest",
        "stale": True,
    }
    rows = [
        row("qlab", 1, 10.0, ratio={"library": 3.0, "torch int4": 1.2}, **how),
        row("library", 1, 30.0),
        row("torch int4", 1, 12.0),
        row("qlab", 256, 60.0, ratio={"library": 0.8, "torch int4": 0.5}, **how),
        row("library", 256, 48.0),
        row("torch int4", 256, 30.0),
    ]
    assert losses(rows) == [{"n": 64, "k": 64, "m": 256, "times": 1.25}]
    assert verdict(record(*rows)) == [
        "64x64: int4 loses to the library's bfloat16 matmul at 1 of 2 numbers of tokens: 1.25 "
        "times its time at 256",
        "64x64 at 256: torch int4 is faster, qlab takes 2.00 times its time",
        "gemlite is not installed",
    ]
    drawn = table(record(*rows))
    cells = [list(column.cells) for column in drawn.columns]
    assert cells[2][0] == "gemm 16x64x128 (nearest, stale)" and cells[8] == [
        "30.0 (3.00x)",
        "48.0 (0.80x)",
    ]
    assert (
        verdict(record(*rows[:3]))[0]
        == "64x64: int4 is nowhere slower than the library's bfloat16 matmul"
    )


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    "name", [name for name in CONTENDERS if name not in ("compiled", "gemlite")]
)
def test_contenders_multiply_the_same_weight(name, zeros):
    case = case_of(zeros)
    try:
        products = prepare(name, case)  # checks itself against fp32
    except Unavailable as why:
        assert name == "torchao", why
        pytest.skip(str(why))
    assert len(products) >= 4 and products[0](torch.ones(3, 128).bfloat16()).shape == (3, 64)


def test_the_compiled_baseline_multiplies_the_same_weight(monkeypatch):
    # Uncompiled: the same arithmetic, without half a minute of compiler.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert prepare("compiled", case_of(True))


def test_a_contender_that_computes_something_else_is_shown_the_door(monkeypatch):
    wrong = {"library": lambda case: [lambda x: x @ torch.zeros(case.n, case.k).bfloat16().mT]}
    monkeypatch.setattr(contenders, "CONTENDERS", wrong)
    with pytest.raises(Unavailable, match="computes something else: relative error 1"):
        prepare("library", case_of(False))


def test_the_weight_of_a_seed_is_the_same_everywhere_and_other_seeds_differ():
    a, b, c = (random_weight(8, 64, 32, True, CPU, seed) for seed in (0, 0, 1))
    assert (
        torch.equal(a.codes, b.codes)
        and torch.equal(a.zeros, b.zeros)
        and not torch.equal(a.codes, c.codes)
    )
    W = dense(a, torch.float64)
    assert W[3, 40] == (a.codes[3, 40].double() - a.zeros[3, 1].double()) * a.scales[3, 1]


def test_calls_take_turns_so_that_no_weight_stays_in_the_cache():
    seen = []
    microseconds([lambda i=i: seen.append(i) for i in range(3)], 7, CPU)
    assert seen == [0, 1, 0, 1, 2, 0, 1, 2, 0]  # two to warm up
    assert (
        copies(2**30, CPU) == 4
        and copies(2**15, CPU) == 4
        and copies(2**13, CPU) == 16
        and copies(1, CPU) == 64
    )


def test_a_time_limit_still_leaves_three_repetitions():
    seen = []
    microseconds([lambda: seen.append(0)], 50, CPU, seconds=0.0)
    assert len(seen) == 1 + 3


@pytest.mark.gpu
@needs_gpu
def test_the_bench_on_a_gpu():
    record = compare_matmuls([(4096, 4096)], [1, 16, 1024], device="cuda", seconds=0.2)
    assert {row["contender"] for row in record["rows"]} >= {
        "qlab",
        "library",
        "compiled",
        "torch int4",
    }, record["absent"]
    assert all(row["graph_us"] for row in record["rows"] if row["contender"] in ("qlab", "library"))
