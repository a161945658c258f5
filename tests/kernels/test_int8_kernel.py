"""The kernel of int8 codes beside int8 codes, bit for bit, in Triton's interpreter; and the same
check catches faults planted in its source."""

from pathlib import Path

import int8_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qlab_kernels
from qlab_kernels import Config, KernelError, Problem, candidates, heuristic, legal
from qlab_kernels.gates import FITS, Compilation, sentences
from qlab_kernels.static import compiled

SOURCE = Path(qlab_kernels.__file__).parent / "int8_int8_kernel.py"
TILE = ("gemm", 16, 64, 64)
few = settings(max_examples=20)


def check(interpreter, case):
    assert interpreter.submit(int8_cases.right, case).result(), case


@few
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 150),
    k=st.integers(1, 400),
    bm=st.sampled_from([16, 32]),
    bk=st.sampled_from([64, 128]),
    split=st.integers(1, 4),
    zeros=st.booleans(),
    row_zeros=st.booleans(),
    tokens=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_whole_rows(interpreter, m, n, k, bm, bk, split, **case):
    split = min(split, -(-k // bk))
    config = ("gemm" if split == 1 else "split_k", bm, 64, bk, split)
    case["tokens"] |= not m
    check(interpreter, {"m": m, "n": n, "k": k, "config": config, **case})


@few
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 80),
    k=st.sampled_from([64, 100, 128]),
    groups=st.integers(2, 4),
    zeros=st.booleans(),
    row_zeros=st.booleans(),
    bias=st.booleans(),
)
def test_groups(interpreter, **case):
    check(interpreter, {**case, "config": TILE})


@few
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    n=st.integers(1, 80),
    k=st.integers(1, 150),
    groups=st.integers(1, 2),
    zeros=st.booleans(),
    row_zeros=st.booleans(),
    tokens=st.booleans(),
)
def test_experts(interpreter, counts, **case):
    ends = tuple(sum(counts[: i + 1]) for i in range(len(counts)))
    case["tokens"] |= not ends[-1]
    check(interpreter, {**case, "m": ends[-1], "config": TILE, "ends": ends})


def product(m, n, k, config=TILE, **more):
    return {"m": m, "n": n, "k": k, "config": config, **more}


ZEROS = product(19, 70, 200, zeros=True, row_zeros=True)
FAULTS = {
    "the last channels are dropped": ("tl.cdiv(K, BK), step", "K // BK, step", ZEROS),
    "zero points of weights are added": ("exact -= z[:, None]", "exact += z[:, None]", ZEROS),
    "zero points of rows are dropped": (
        "exact -= total[:, None] * y",
        "exact -= 0 * total[:, None] * y",
        ZEROS,
    ),
    "every row has the first one's scale": (
        "row_scales_ptr + (rm if TOKENS else rm * 0)",
        "row_scales_ptr + rm * 0",
        ZEROS,
    ),
    "a part of a split is left out": (
        "for part in range(SPLIT)",
        "for part in range(SPLIT - 1)",
        product(3, 64, 256, ("split_k", 16, 64, 64, 3)),
    ),
    "groups share the first one's scale": (
        "columns + group * N + rn",
        "columns + rn",
        product(3, 64, 64, groups=3),
    ),
    "experts share the first one's scales": (
        "columns = expert * C * N",
        "columns = expert * 0",
        product(20, 64, 64, ends=(4, 20)),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, interpreter, tmp_path):
    right, wrong, case = FAULTS[fault]
    source = SOURCE.read_text(encoding="utf-8")
    assert source.count(right) == 1, right
    planted = tmp_path / "planted.py"
    planted.write_text(source.replace(right, wrong), encoding="utf-8")
    check(interpreter, case)
    assert not interpreter.submit(int8_cases.right, case, str(planted)).result()


@pytest.mark.parametrize("cc", [(8, 0), (9, 0), (12, 0)])
def test_the_kernel_that_rounds_compiles_without_spills(cc):
    from qlab_kernels.round_int8 import BLOCK, round_int8_kernel

    constants = {"QMIN": -128, "QMAX": 127, "ZEROS": True, "FIXED": False, "BLOCK": BLOCK}
    types = {"x_ptr": "*bf16", "p_ptr": "*i8", "scales_ptr": "*fp32", "zeros_ptr": "*i8"}
    c = Compilation(
        kernel=round_int8_kernel,
        cc=cc,
        types=types,
        constants=constants,
        aligned=("K",),
        options={"num_warps": 4},
        weights=0,
    )
    assert not sentences(FITS, c, compiled(c))


def problem(cc, m=1, op="int8_int8_mm", group=4096, k=4096, experts=1):
    return Problem(op, cc, "", "bfloat16", group, False, 4096, k, m, experts)


@pytest.mark.parametrize("cc", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_candidate_is_legal_and_one_is_taken(cc):
    for m in (1, 16, 17, 300, 5000):
        for op, group, experts in (
            ("int8_int8_mm", 4096, 1),
            ("int8_int8_mm", 1024, 1),
            ("int8_int8_grouped_mm", 4096, 8),
        ):
            p = problem(cc, m, op, group, experts=experts)
            menu = candidates(p)
            assert len(menu) == len(set(menu)) and not any(legal(p, c) for c in menu)
            assert heuristic(p).kind in ("gemm", "split_k")
            assert ("library" in {c.kind for c in menu}) == (experts == 1)


def test_what_has_no_kernel_is_refused_by_name():
    assert heuristic(problem((7, 5))).kind == "library"
    assert "no int8 tensor-core product for capability 7.5" in legal(
        problem((7, 5)), Config("gemm", 16, 64, 64)
    )
    with pytest.raises(KernelError, match=r"capability 7\.0 multiplies no int8 codes; 7\.5 is"):
        candidates(problem((7, 0)))
    with pytest.raises(KernelError, match=r"no kernels for compute capability 6\.1"):
        candidates(problem((6, 1)))
    for c, why in {
        Config("gemm", 8, 64, 64): "bm is a power of two in 16..256",
        Config("gemm", 16, 64, 32): "bk is 64, 128 or 256",
        Config("gemm", 256, 256, 256, 1, 8, 6): "bytes of shared memory",
        Config("gemm", 128, 256, 64, 1, 8, 2): "sums per thread",
        Config("split_k", 16, 64, 64, 1): "split 1 does not suit split_k",
        Config("dequant"): "the kinds gemm, split_k and library, not dequant",
    }.items():
        assert why in legal(problem((8, 0)), c)
    assert "k is split only of whole rows" in legal(
        problem((8, 0), group=1024), Config("split_k", 16, 64, 64, 2)
    )


def test_operands_that_do_not_fit_are_refused():
    from qlab_kernels.int8_int8 import Int8Rows, Int8Weight, int8_int8, int8_int8_grouped

    words, scales = torch.zeros(2, 8, 64, dtype=torch.int8), torch.ones(2, 8, dtype=torch.float32)
    rows = Int8Rows(
        torch.zeros(3, 64, dtype=torch.int8), torch.ones(3, 1, dtype=torch.float32), None
    )
    weight, gemm = Int8Weight(words, scales, None, None), Config("gemm", 16, 64, 64)
    with pytest.raises(KernelError, match=r"codes are \[tokens, 128\] for these weights, not 3x64"):
        int8_int8(rows, weight, None, torch.float16, gemm)
    with pytest.raises(KernelError, match="in 2 groups is multiplied by gemm, not by split_k"):
        int8_int8(rows, weight, None, torch.float16, Config("split_k", 16, 64, 64, 2))
    ends = torch.tensor([3], dtype=torch.int32)
    with pytest.raises(KernelError, match=r"one end per expert, not \(2, 8, 64\) and \(1,\)"):
        int8_int8_grouped(rows, weight, ends, torch.float16, gemm)
    with pytest.raises(KernelError, match="by the one kind gemm, not library"):
        int8_int8_grouped(rows, weight, ends, torch.float16, Config("library"))
