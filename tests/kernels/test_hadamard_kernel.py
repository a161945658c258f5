"""The Hadamard kernel against float64 in Triton's interpreter and on a GPU; faults planted in its
source are caught."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qlab_kernels
from qlab_kernels import Config, KernelError, Problem, candidates, heuristic, legal, reference
from qlab_kernels.acceptance.hadamard import Rows, excess, operands
from qlab_kernels.families.hadamard import refusal

HERE = torch.device("cpu")
SOURCE = Path(qlab_kernels.__file__).parent
few = settings(max_examples=30)
DTYPE = st.sampled_from(["float16", "bfloat16", "float32"])
# orders: 2 to 1,024, and multiples of cores; (doublings, core)
SHAPE = st.one_of(
    st.tuples(st.integers(1, 10), st.just(1)),
    st.tuples(st.integers(1, 5), st.sampled_from([12, 20, 28, 36, 40])),
)


@few
@given(SHAPE, st.integers(0, 40), st.booleans(), st.booleans(), DTYPE, st.integers(0, 9))
def test_every_row_is_multiplied(interpreter, shape, m, before, behind, dtype, which):
    case = Rows(m, *shape, before, behind, dtype, which)
    above = interpreter.submit(excess, case, HERE).result()
    assert above <= 1, f"{above:.3g} times what rounding explains: {case}"


@few
@given(SHAPE, st.integers(1, 8), DTYPE, st.integers(0, 9))
def test_sums_of_integers_are_exact(interpreter, shape, m, dtype, which):
    case = Rows(m, *shape, True, True, dtype, which, integers=True)
    assert interpreter.submit(excess, case, HERE).result() == 0


# what stands in the source, what is planted, a case that reaches it
FAULTS = {
    "differences are sums": (
        "tl.join(first + second, first - second)",
        "tl.join(first + second, first + second)",
        Rows(2, 6, 1, True, True, "float16"),
    ),
    "the core is turned": (
        "i[:, None] * CORE + i[None, :]",
        "i[None, :] * CORE + i[:, None]",
        Rows(2, 3, 12, True, True, "float16"),
    ),
    "neighbours inside a core are paired": (
        "PADDED << i",
        "(PADDED << i) // 2",
        Rows(2, 3, 12, False, False, "float16"),
    ),
    "signs behind stand before": (
        "tl.load(behind_ptr",
        "tl.load(before_ptr",
        Rows(2, 6, 1, True, True, "float16"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, interpreter, faulty, tmp_path):
    right, wrong, case = FAULTS[fault]
    changed = shutil.copytree(SOURCE, tmp_path / "qlab_kernels") / "hadamard.py"
    source = changed.read_text(encoding="utf-8")
    assert source.count(right) == 1, right
    changed.write_text(source.replace(right, wrong), encoding="utf-8")
    assert interpreter.submit(excess, case, HERE).result() <= 1
    assert not faulty(tmp_path, excess, case, HERE) <= 10


def problem(n, core=1, cc=(9, 0), dtype="bfloat16"):
    return Problem("hadamard", cc, "", dtype, core, False, n, n, 16)


@pytest.mark.parametrize("n, core", [(2, 1), (256, 1), (4096, 1), (24, 12), (14336, 28), (72, 36)])
def test_candidates_are_legal_and_the_heuristic_is_one_of_them(n, core):
    p = problem(n, core)
    menu = candidates(p)
    assert heuristic(p) in menu and len(set(menu)) == len(menu)
    assert all(legal(p, c) is None for c in menu)
    wrong = [Config("gemm", 1, n), Config("fma", 3, menu[0].bn), Config("fma", 1, menu[0].bn + 1)]
    assert all(legal(p, c) for c in wrong)


def test_what_has_no_kernel_is_refused_by_name():
    assert "no tensor cores in Triton, which a core of 12" in str(
        refusal((7, 5), "float16", 48, 12)
    )
    assert "not bfloat16" in str(refusal((7, 5), "bfloat16", 64, 1))
    assert "does not compile for compute capability 7.0" in str(refusal((7, 0), "float16", 64, 1))
    assert "no kernels for compute capability 6.1" in str(refusal((6, 1), "float16", 64, 1))
    assert refusal((7, 5), "float16", 4096, 1) is refusal((8, 0), "bfloat16", 14336, 28) is None
    assert "float32 and its core" in str(refusal((9, 0), "float32", 14336, 28))
    with pytest.raises(KernelError, match="core of 172 channels has more than 128"):
        candidates(problem(344, 172))
    with pytest.raises(KernelError, match="a row of 65536 channels has more than"):
        candidates(problem(65536))


def test_the_reference_is_the_product_with_the_matrix():
    for case in (Rows(3, 4, 1, True, True, "float32"), Rows(3, 3, 12, True, True, "float32")):
        x, factors = operands(case, HERE)
        H = torch.ones(1, 1)
        for _ in range(factors.doublings):
            H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
        M = H if factors.core is None else torch.kron(H, factors.core.float())
        M = factors.before.double()[:, None] * M.double() * factors.behind.double() * factors.scale
        torch.testing.assert_close(reference.hadamard(x, factors), x.double() @ M)
