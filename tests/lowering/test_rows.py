"""The table of kernels: which row multiplies a weight, and who is told why a faster one does
not."""

import copy
import json
import pickle

import pytest
import torch
from lowering_cases import CPU, random_leaf
from row_cases import multiplies_floats, pruned
from test_coded import leaf_of
from typer.testing import CliRunner

import qlab
from qlab.algebra.e4m3 import numbers
from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import Int, Tile, parse_spec
from qlab.bench.__main__ import app as bench
from qlab.cli import app
from qlab.errors import QlabError
from qlab.lowering import QLinear
from qlab.lowering.rows import rows_of
from qlab.lowering.weights import floats, fp8_fp8, int8_int8, kernels, sparse24
from qlab.lowering.weights.integers import is_exact
from qlab.lowering.weights.kernels import KERNELS, choose
from qlab.lowering.weights.setting import Setting
from qlab_kernels.compiled import Uncompiled


def setting(**changes):
    return Setting(**{"dtype": torch.bfloat16, "device": CPU} | changes)


@pytest.fixture
def ready(saved, tmp_path):
    """ready(spec) -> a tiny quantized directory."""

    def make(spec):
        out = tmp_path / spec
        qlab.quantize(saved("llama"), qlab.rtn(spec), None, out)
        return out

    return make


def test_rows_have_names_of_their_own_and_the_last_takes_everything():
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)
    for spec in (Int(4, Tile(1, 16)), Int(8, Tile(3, 48)), Int(1, Tile(None, None))):
        leaf = random_leaf(9, 96, spec)
        assert KERNELS[-1].meant(leaf, setting()) and KERNELS[-1].takes(leaf, setting()) is None


def test_the_first_row_that_takes_wins_and_keeps_the_reasons_of_those_before_it():
    assert choose(random_leaf(8, 64, Int(4, Tile(1, 32))), setting()) == (kernels.INT4, ())
    kernel, passed = choose(random_leaf(8, 64, Int(4, Tile(1, 16))), setting())
    assert kernel is kernels.CODES
    assert [(p.row, p.reason.partition(";")[0]) for p in passed] == [
        ("int4", "groups of 16 have no int4 kernel")
    ]


def test_a_module_says_in_a_copy_too_why_it_is_slow():
    module = QLinear(
        "site", random_leaf(8, 64, Int(4, Tile(1, 16))), None, torch.bfloat16, CPU, False
    )
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert "layout=int4-g16, not int4: groups of 16 have no int4 kernel)" in repr(one)
        assert one.kernel is kernels.CODES
    fast = QLinear(
        "site", random_leaf(8, 64, Int(4, Tile(1, 32))), None, torch.bfloat16, CPU, False
    )
    assert "not " not in repr(fast)


def test_the_warning_says_which_rows_do_not_take_the_weights(ready):
    with pytest.warns(UserWarning, match=r"'int4' does not take 14 of them, because groups of 16"):
        qlab.lower(ready("int4-g16"))


def test_inspect_says_which_row_runs_each_group_of_weights(ready, tmp_path):
    path, out = ready("int4-g16"), tmp_path / "held.json"
    arguments = ["inspect", str(path), "--run", "--device", "cpu", "--json", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    run = json.loads(out.read_text())["run"]
    assert sum(group["count"] for group in run["groups"]) == 14
    assert {group["row"] for group in run["groups"]} == {"codes"}
    assert all(group["passed"]["int4"].startswith("groups of 16") for group in run["groups"])
    assert {group["weights"] for group in run["groups"]} >= {"model.layers.*.mlp.up_proj"}
    assert "codes" in result.output and "groups of" in result.output
    lowered = {
        name: module.kernel.name
        for name, module in qlab.lower(path, dense_cache=True).named_modules()
        if isinstance(module, QLinear)
    }
    assert set(lowered.values()) == {"codes"} and len(lowered) == 14
    assert "codes: 14 weights" in repr(rows_of(path, "cpu"))


def test_where_weights_run_is_asked_with_run_alone(saved):
    result = CliRunner().invoke(app, ["inspect", str(saved("llama")), "--device", "cpu"])
    assert isinstance(result.exception, QlabError) or "give --run with them" in result.output


def test_activations_that_no_kernel_rounds_to_are_refused_by_name(ready):
    path = ready("int4-g32")
    for call in (
        qlab.lower,
        lambda path, activations: rows_of(path, "cpu", activations=activations),
    ):
        with pytest.raises(
            QlabError, match=r"activations='int7' is nothing .*give 'int8', or None"
        ):
            call(path, activations="int7")


def test_activations_that_nothing_rounds_are_announced(ready):
    with pytest.warns(
        UserWarning, match=r"activations='int8' changes nothing at 14 weights \(mxfp"
    ):
        qlab.lower(ready("mxfp8"), activations="int8")


def test_what_the_directory_rounds_is_in_the_setting():
    inputs = QuantizeInput(parse_spec("int8-channel"))
    module = QLinear(
        "site",
        random_leaf(8, 64, Int(4, Tile(1, 32))),
        None,
        torch.bfloat16,
        CPU,
        False,
        inputs=inputs,
    )
    assert module.rounding == "int8-channel" and "int8-channel" in repr(module)


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "capability, spec, inputs, row, reason",
    [
        ((8, 9), "fp8-channel", "fp8-channel", "fp8_fp8", None),
        ((8, 9), "fp8-tensor", "fp8-tensor", "fp8_fp8", None),
        ((7, 5), "fp8-channel", "fp8-channel", "codes", "capability 7.5 has no such fp8 product"),
        ((8, 0), "fp8-channel", "fp8-channel", "fused_floats", "8.0 has no such fp8 product"),
        ((8, 9), "fp8-b128x128", "fp8-g128", "fp8_fp8", None),
        ((9, 0), "fp8-b128x128", "fp8-g128", "fp8_fp8", None),
        ((12, 0), "fp8-b128x128", "fp8-g128", "fp8_fp8", None),
        ((9, 0), "fp8-b128x128", "fp8-channel", "fused_floats", "have no fp8 product; rows beside"),
        ((9, 0), "mxfp8", "mxfp8", "fused_floats", None),
        ((7, 5), "int8-channel", "int8-channel", "int8_int8", None),
        ((7, 0), "int8-channel", "int8-channel", "int4", "this GPU multiplies no int8 codes"),
        ((9, 0), "int8-g128", "int8-channel", "int4", "groups of 128 need a product each"),
        ((9, 0), "int8-channel", "int8-g32", "int4", "have several scales in a token"),
        ((9, 0), "int8-channel", None, "int4", None),
    ],
)
def test_a_gpu_runs_what_its_capability_has(capability, spec, inputs, row, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fp8_fp8, "tried", lambda device, form: None)
    rounding = None if inputs is None else QuantizeInput(parse_spec(inputs))
    leaf = leaf_of(parse_spec(spec), 256, 256)
    kernel, passed = choose(leaf, setting(device=GPU, inputs=rounding))
    assert kernel.name == row
    assert reason in passed[0].reason if reason else not passed


def test_blocks_that_do_not_divide_a_weight_are_named():
    leaf = leaf_of(parse_spec("fp8-b128x128"), 192, 256)
    inputs = QuantizeInput(parse_spec("fp8-g128"))
    _, passed = choose(leaf, setting(inputs=inputs))
    assert "128x128 blocks do not divide a weight (192, 256)" in passed[0].reason


@pytest.mark.skipif(not multiplies_floats(), reason="torch multiplies no 8-bit floats here")
@pytest.mark.parametrize("form", ["rows", "blocks"])
def test_a_gpu_is_tried_before_its_fp8_products_are_believed(form, monkeypatch):
    assert floats.tried.__wrapped__(CPU, form) is None
    right = floats.product

    def answers(answer):
        """The product of the device."""
        monkeypatch.setattr(floats, "product", lambda *operands: answer(right(*operands)))

    def failing(y):
        raise RuntimeError("no such recipe")

    answers(lambda y: 1.05 * y)
    assert "5% off on this GPU" in floats.tried.__wrapped__(CPU, form)
    answers(failing)
    assert "fails on this GPU (no such recipe)" in floats.tried.__wrapped__(CPU, form)


def test_a_cpu_runs_integers_where_its_sums_are_exact(monkeypatch):
    leaf, inputs = random_leaf(8, 64, Int(8, Tile(1, None))), QuantizeInput(Int(8, Tile(1, None)))
    monkeypatch.setattr(int8_int8, "is_exact", lambda: True)
    assert choose(leaf, setting(inputs=inputs)) == (kernels.INT8_INT8, ())
    monkeypatch.setattr(int8_int8, "is_exact", lambda: False)
    kernel, passed = choose(leaf, setting(inputs=inputs))
    assert kernel is kernels.INT8 and "which saturate" in passed[0].reason


def test_without_a_compiler_whole_tokens_are_rounded_to_integers(monkeypatch):
    def uncompiled():
        raise Uncompiled("there is no compiler")

    monkeypatch.setattr("qlab_kernels.int4_int8.best_path", uncompiled)
    monkeypatch.setattr(int8_int8, "is_exact", lambda: True)
    leaf = random_leaf(8, 64, Int(8, Tile(1, None)))
    kernel, passed = choose(leaf, setting(activations="int8"))
    assert kernel is kernels.INT8_INT8 and [p.row for p in passed] == ["int4_int8"]
    assert "there is no compiler" in passed[0].reason
    four = choose(random_leaf(8, 64, Int(4, Tile(1, 32))), setting(activations="int8"))
    assert four.kernel is kernels.INT4


@pytest.mark.processor
def test_a_processor_that_adds_in_16_bits_is_found_out(monkeypatch):
    """oneDNN without VNNI moves activations to 0..255 and adds two products in 16 bits."""

    def saturating(p, q):
        products = (p.int() + 128)[:, None] * q.mT.int()
        pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
        return pairs.sum(-1) - 128 * q.int().sum(0)

    assert is_exact() == is_exact.__wrapped__()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not is_exact.__wrapped__()
    monkeypatch.setattr(torch, "_int_mm", lambda p, q: p.int() @ q.int())
    assert is_exact.__wrapped__()


@pytest.mark.processor
def test_floats_on_a_cpu_are_cast_and_it_is_said_why():
    inputs, leaf = (
        QuantizeInput(parse_spec("fp8-channel")),
        leaf_of(parse_spec("fp8-channel"), 32, 64),
    )
    kernel, passed = choose(leaf, setting(inputs=inputs))
    assert kernel is kernels.FP8 and "on a CPU takes as long" in passed[0].reason
    assert choose(leaf, setting()) == (kernels.FP8, ())
    kernel, passed = choose(leaf, setting(dtype=torch.float32))
    assert kernel is kernels.CODES and "take no torch.float32 activations" in passed[0].reason
    edge = leaf_of(parse_spec("fp8-b16x48"), 32, 64)
    assert "48 do not divide 64" in choose(edge, setting())[1][0].reason
    assert choose(leaf_of(parse_spec("nvfp4"), 32, 64), setting()) == (kernels.CODES, ())


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("flush", [False, True])
def test_every_8_bit_float_is_the_number_that_it_is(dtype, flush):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    right = codes.to(dtype)
    torch.set_flush_denormal(flush)
    try:
        computed = [numbers(codes, dtype), numbers(codes.view(16, 16).mT, dtype).mT.flatten()]
    finally:
        torch.set_flush_denormal(False)
    for x in computed:
        assert torch.equal(x.isnan(), right.isnan()) and x.dtype == dtype
        assert torch.equal(x.nan_to_num(), right.nan_to_num())
        assert torch.equal(x.signbit()[~x.isnan()], right.signbit()[~x.isnan()])


def test_bytes_in_other_dtypes_than_bfloat16_are_planes():
    kernel, passed = choose(random_leaf(8, 64, Int(8, Tile(1, None))), setting(dtype=torch.float32))
    assert kernel is kernels.INT4 and "takes torch.float32 activations" in passed[0].reason
    assert choose(random_leaf(8, 64, Int(8, Tile(1, 32))), setting()) == (kernels.INT4, ())


def test_zeros_are_skipped_where_a_gpu_does_and_else_it_is_said_why(monkeypatch):
    leaf, inputs = random_leaf(32, 64, Int(8, Tile(1, None))), QuantizeInput(Int(8, Tile(1, None)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(sparse24, "tried", lambda device: None)
    assert choose(leaf, setting(device=GPU, inputs=inputs))[0] is kernels.INT8_INT8
    assert choose(pruned(leaf), setting(device=GPU)) == (kernels.INT4, ())
    assert choose(pruned(leaf), setting(device=GPU, inputs=inputs)) == (kernels.SPARSE24, ())
    reasons = {
        "torch has no cuSPARSELt": setting(device=GPU, inputs=inputs),
        "no CPU skips the zeros": setting(inputs=inputs),
    }
    monkeypatch.setattr(sparse24, "tried", lambda device: "torch has no cuSPARSELt")
    for reason, where in reasons.items():
        passed = choose(pruned(leaf), where)[1]
        assert passed[0].row == "sparse24" and reason in passed[0].reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    _, passed = choose(pruned(leaf), setting(device=GPU, inputs=inputs))
    assert "8.0 is the first" in passed[0].reason


@pytest.mark.processor
@pytest.mark.skipif(not is_exact(), reason="the sums of this processor are not exact")
def test_a_gpu_is_tried_before_its_sparse_products_are_believed(monkeypatch):
    assert sparse24.tried.__wrapped__(CPU) is None
    right = sparse24.multiplied
    monkeypatch.setattr(sparse24, "multiplied", lambda words, p: right(words, p) + 1)
    assert "not exact on this GPU" in sparse24.tried.__wrapped__(CPU)
    monkeypatch.setattr(sparse24, "compressed", torch.linalg.cholesky)
    assert "fails on this GPU" in sparse24.tried.__wrapped__(CPU)


def test_the_bench_times_every_kernel_that_takes_a_weight(tmp_path):
    out = tmp_path / "rows.json"
    arguments = ["rows", "--weights", "int8-channel:int8-token,mxfp4", "--shapes", "64x96"]
    arguments += ["--m", "1,3", "--seconds", "0.01", "--device", "cpu", "--json", str(out)]
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    timed = [(row["weights"], row["kernel"], row["m"]) for row in rows]
    assert {("int8-channel", "int4", 3), ("mxfp4", "codes", 1), ("mxfp4", "dense", 3)} <= set(timed)
    assert all(row["microseconds"] > 0 for row in rows)
    assert not [row for row in timed if row[:2] == ("mxfp4", "int4")]
