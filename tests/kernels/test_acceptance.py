"""The cases that prove the kernels on a device: listed without one, checked in Triton's
interpreter, and able to fail."""

import shutil
from importlib import import_module
from pathlib import Path

import cases
import pytest
import torch

import qlab_kernels
from qlab_kernels.acceptance import FAMILIES, check, forms, timed
from qlab_kernels.acceptance import cases as listed
from qlab_kernels.capability import TARGETS, KernelError
from qlab_kernels.config import Config, Problem, legal

SOURCE = Path(qlab_kernels.__file__).parent


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cc", TARGETS, ids=str)
def test_names_are_unique_and_the_same_again(family, cc):
    names = [case.name for case in listed(family, cc)]
    assert len(set(names)) == len(names)
    assert names == [case.name for case in listed(family, cc)]


@pytest.mark.parametrize("family", FAMILIES)
def test_some_capability_has_cases(family):
    assert any(listed(family, cc) for cc in TARGETS)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_timed_computes_a_product(interpreter, family):
    timed_forms = forms(family, (9, 0))
    assert len(timed_forms) == len(getattr(import_module(FAMILIES[family]), "TIMED", ()))
    for form in [form for form in timed_forms if form.dtype == "bfloat16"]:
        y = interpreter.submit(cases.timed, form, (9, 0)).result()
        assert y.shape == (3, 128) and y.isfinite().all() and y.abs().max() > 0


def test_products_are_timed_where_something_computes_them():
    assert {form.dtype for form in forms("int4", (7, 5))} == {"float16"}
    assert {form.dtype for form in forms("int4", (9, 0))} == {"bfloat16", "float16"}
    no_such = Problem("int4_linear_cpu", "cpu-avx2", "", "bfloat16", 128, False, 64, 128, 1)
    with pytest.raises(KernelError, match="no kernels for compute capability"):
        timed(no_such, torch.device("cpu"), 0)


def test_an_unknown_case_and_family_are_refused():
    with pytest.raises(KernelError, match=r"no family 'int17': there are int4"):
        listed("int17", (9, 0))
    with pytest.raises(KernelError, match=r"int4 has no case 'nothing' for capability 9.0"):
        check("int4", "nothing", (9, 0), torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cc", [(8, 0), (9, 0)], ids=str)
def test_cases_hold_in_the_interpreter(interpreter, family, cc):
    """The first and the last; assembly is checked on GPUs."""
    names = [case.name for case in listed(family, cc) if not case.assembly]
    for name in {*names[:1], *names[-1:]}:
        assert interpreter.submit(cases.accepted, family, name, cc).result() <= 1, name


# ---------------------------------------------------------------- int4
@pytest.mark.parametrize("cc", TARGETS, ids=str)
def test_every_product_is_legal(cc):
    from qlab_kernels.acceptance.int4 import _problem

    for case in listed("int4", cc):
        for run in (
            case.excess.args[0] if case.name.split()[0] in ("gemm", "split_k", "fma") else []
        ):
            p = _problem(cc, run.dtype, (run.group, run.zeros), run.m)
            p = type(p)(**{**vars(p), "n": run.n, "k": run.k})
            assert legal(p, Config(*run.config)) is None, run


@pytest.mark.parametrize(
    "file, right, wrong, name",
    [
        ("dequantize.py", "w -= load_halves", "w += load_halves", "dequantize bfloat16 g128 zeros"),
        ("grouped.py", "tl.cumsum(tiles, 0) <= tile", "tl.cumsum(tiles, 0) < tile", "experts"),
    ],
)
def test_planted_faults_are_caught(interpreter, faulty, tmp_path, file, right, wrong, name):
    changed = shutil.copytree(SOURCE, tmp_path / "qlab_kernels") / file
    source = changed.read_text(encoding="utf-8")
    assert source.count(right) == 1
    changed.write_text(source.replace(right, wrong), encoding="utf-8")
    cc = (8, 0)
    name = next(case.name for case in listed("int4", cc) if case.name.startswith(name))
    assert interpreter.submit(cases.accepted, "int4", name, cc).result() <= 1
    assert not faulty(tmp_path, cases.accepted, "int4", name, cc) <= 1
