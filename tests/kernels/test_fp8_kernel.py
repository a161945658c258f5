"""The kernel of 8-bit floats beside 8-bit floats in Triton's interpreter, bit for bit where sums
are exact; and the same check catches faults planted in its source."""

from pathlib import Path

import fp8_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qlab_kernels
from qlab_kernels import Config, KernelError, Problem, candidates, heuristic, legal
from qlab_kernels.gates import FITS, Compilation, sentences
from qlab_kernels.static import compiled

SOURCE = Path(qlab_kernels.__file__).parent / "fp8_fp8_kernel.py"
TILE = ("gemm", 16, 64, 64)
few = settings(max_examples=15)


def check(interpreter, case):
    assert interpreter.submit(fp8_cases.off, case).result() <= 1, case


@few
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    bm=st.sampled_from([16, 32]),
    bk=st.sampled_from([64, 128]),
    split=st.integers(1, 4),
    blocks=st.booleans(),
    tokens=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    padding=st.integers(0, 20),
    exact=st.booleans(),
)
def test_rows_and_blocks(interpreter, m, n, k, bm, bk, split, **case):
    split = min(split, -(-k // bk))
    config = ("gemm" if split == 1 else "split_k", bm, 64, bk, split)
    case["tokens"] |= not m
    check(interpreter, {"m": m, "n": n, "k": k, "config": config, **case})


@few
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    blocks=st.booleans(),
    tokens=st.booleans(),
    padding=st.integers(0, 20),
    exact=st.booleans(),
)
def test_experts(interpreter, counts, **case):
    ends = tuple(sum(counts[: i + 1]) for i in range(len(counts)))
    case["tokens"] |= not ends[-1]
    check(interpreter, {**case, "m": ends[-1], "config": TILE, "ends": ends})


def product(m, n, k, config=TILE, **more):
    return {"m": m, "n": n, "k": k, "config": config, **more}


BLOCKS = product(19, 150, 300, blocks=True)
FAULTS = {
    "the last channels are dropped": (
        "tl.cdiv(K, BK), step",
        "K // BK, step",
        product(3, 70, 200),
    ),
    "a block has the scale of the next": (
        "block = tile // (BLOCK // BK)",
        "block = (tile + 1) // (BLOCK // BK)",
        BLOCKS,
    ),
    "all blocks of rows have the first one's scales": (
        "scales_ptr += (block_n * BN // BLOCK) * C",
        "scales_ptr += 0",
        BLOCKS,
    ),
    "every token has the first one's scale": (
        "row_scales_ptr + (rm if TOKENS else rm * 0)",
        "row_scales_ptr + rm * 0",
        product(19, 70, 200),
    ),
    "a part of a split is left out": (
        "for part in range(SPLIT)",
        "for part in range(SPLIT - 1)",
        product(3, 64, 256, ("split_k", 16, 64, 64, 3)),
    ),
    "experts share the first one's scales of blocks": (
        "scales_ptr += expert * tl.cdiv(N, BLOCK) * C",
        "scales_ptr += 0",
        product(20, 64, 128, ends=(4, 20), blocks=True),
    ),
    "padding of W counts between experts": (
        "expert.to(tl.int64) * W_ROWS * W_STRIDE",
        "expert.to(tl.int64) * N * W_STRIDE",
        product(20, 60, 64, ends=(4, 20), padding=4),
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
    assert not interpreter.submit(fp8_cases.off, case, str(planted)).result() <= 10


@pytest.mark.parametrize("cc", [(8, 9), (12, 0)])
def test_the_kernel_that_rounds_compiles_without_spills(cc):
    from qlab_kernels.round_fp8 import BLOCK, round_fp8_kernel

    types = {"x_ptr": "*bf16", "p_ptr": "*u8", "scales_ptr": "*fp32"}
    c = Compilation(
        kernel=round_fp8_kernel,
        cc=cc,
        types=types,
        constants={"FIXED": False, "BLOCK": BLOCK},
        aligned=("K", "CHANNELS"),
        options={"num_warps": 4},
        weights=0,
    )
    assert not sentences(FITS, c, compiled(c))


def problem(cc, m=1, op="fp8_fp8_mm", group=4096, experts=1):
    return Problem(op, cc, "", "bfloat16", group, False, 4096, 4096, m, experts)


@pytest.mark.parametrize("cc", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_candidate_is_legal_and_one_is_taken(cc):
    for m in (1, 16, 17, 300, 5000):
        for op, group, experts in (
            ("fp8_fp8_mm", 4096, 1),
            ("fp8_fp8_mm", 128, 1),
            ("fp8_fp8_grouped_mm", 4096, 8),
            ("fp8_fp8_grouped_mm", 128, 8),
        ):
            p = problem(cc, m, op, group, experts=experts)
            menu = candidates(p)
            assert len(menu) == len(set(menu)) and not any(legal(p, c) for c in menu)
            assert heuristic(p).kind in ("gemm", "split_k")
            in_library = experts == 1 and (group == 4096 or cc == (9, 0))
            assert ("library" in {c.kind for c in menu}) == in_library


def test_what_has_no_kernel_is_refused_by_name():
    with pytest.raises(KernelError, match=r"capability 8\.6 multiplies no 8-bit floats; 8\.9 is"):
        candidates(problem((8, 6)))
    p = problem((9, 0), group=128)
    for c, why in {
        Config("gemm", 16, 256, 64): "straddle blocks of 128",
        Config("gemm", 16, 64, 256): "straddle blocks of 128",
        Config("dequant"): "the kinds gemm, split_k and library, not dequant",
        Config("gemm", 256, 128, 128, 1, 8, 6): "bytes of shared memory",
    }.items():
        assert why in legal(p, c)
    assert "not of groups of 64" in legal(problem((9, 0), group=64), Config("gemm", 16, 64, 64))
    assert "for capability 9.0 alone" in legal(problem((12, 0), group=128), Config("library"))


def test_operands_that_do_not_fit_are_refused():
    from qlab_kernels.fp8_fp8 import Fp8Rows, Fp8Weight, fp8_fp8, fp8_fp8_grouped

    words = torch.zeros(128, 256, dtype=torch.float32).to(torch.float8_e4m3fn)
    ones = lambda *shape: torch.ones(shape, dtype=torch.float32)
    blocks, gemm = Fp8Weight(words, ones(1, 2), 128), Config("gemm", 16, 64, 64)
    p, half = words[:3], torch.float16
    with pytest.raises(
        KernelError, match=r"has scales \(1, 2\) and \(3, 2\), not \(1, 2\) and \(3, 1\)"
    ):
        fp8_fp8(Fp8Rows(p, ones(3, 1)), blocks, None, half, gemm)
    with pytest.raises(KernelError, match="tiles of 64x256 straddle blocks of 128"):
        fp8_fp8(Fp8Rows(p, ones(3, 2)), blocks, None, half, Config("gemm", 16, 64, 256))
    narrow = Fp8Weight(words[:, :128], ones(128), 128)
    with pytest.raises(KernelError, match="do not fit weights padded to 128x128"):
        fp8_fp8(Fp8Rows(p, ones(3, 1)), narrow, None, half, gemm)
    with pytest.raises(KernelError, match="by gemm or split_k, not by library"):
        fp8_fp8(Fp8Rows(p, ones(3, 1)), narrow, None, half, Config("library"))
    ends = torch.tensor([3], dtype=torch.int32)
    with pytest.raises(KernelError, match=r"one end per expert, not \(128, 256\) and \(1,\)"):
        fp8_fp8_grouped(Fp8Rows(p, ones(3, 2)), blocks, ends, half, gemm)
