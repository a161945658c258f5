"""The table of kernels: which row multiplies a weight, and who is told why a faster one does
not."""

import copy
import json
import pickle

import pytest
import torch
from lowering_cases import CPU, random_leaf
from typer.testing import CliRunner

import qlab
from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import Int, Tile, parse_spec
from qlab.cli import app
from qlab.errors import QlabError
from qlab.lowering import QLinear
from qlab.lowering.rows import rows_of
from qlab.lowering.weights import kernels
from qlab.lowering.weights.kernels import KERNELS, choose
from qlab.lowering.weights.setting import Setting


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
