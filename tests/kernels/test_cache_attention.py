"""Attention over a quantized cache against float64 in Triton's interpreter and on a GPU; faults
planted in its source are caught."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qlab_kernels
from qlab_kernels import KernelError, Problem, candidates, heuristic, legal
from qlab_kernels.acceptance.cache_attention import Attention, excess
from qlab_kernels.cached import Cached, numbers, pack_nibbles, unpack_nibbles
from qlab_kernels.families.cache_attention import refusal

HERE = torch.device("cpu")
SOURCE = Path(qlab_kernels.__file__).parent
FORMAT = st.sampled_from(["int8", "fp8", "int4"])
few = settings(max_examples=25)


@st.composite
def attentions(draw):
    """Heads of any size, one scale for a head or for groups that divide it."""
    d, dv = draw(st.sampled_from([(64, 64), (80, 80), (96, 96), (24, 40), (7, 5), (128, 16)]))
    lengths = draw(st.lists(st.integers(0, 90), min_size=1, max_size=2))
    return Attention(
        tuple(lengths),
        heads=draw(st.integers(1, 2)),
        rows=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        channels=(d, dv),
        formats=(draw(FORMAT), draw(FORMAT)),
        dtype=draw(st.sampled_from(["float16", "bfloat16"])),
        scope=draw(st.sampled_from(["token", "all", "head", "tensor"])),
        groups=draw(st.sampled_from([(1, 1), (1, 1), (2, 4)])) if d % 8 == dv % 8 == 0 else (1, 1),
        zeros=draw(st.booleans()),
        cap=draw(st.sampled_from([None, 5.0])),
        window=draw(st.sampled_from([None, 1, 20])),
        started=draw(st.booleans()),
        page=draw(st.sampled_from([0, 0, 16])),
        tile=(draw(st.integers(1, 3)), draw(st.sampled_from([16, 32])), 16),
        seed=draw(st.integers(0, 9)),
    )


@few
@given(attentions())
def test_every_head_is_attended(interpreter, case):
    above = interpreter.submit(excess, case, HERE).result()
    assert above <= 1, f"{above:.3g} times what rounding explains: {case}"


PLAIN = Attention((70, 41), 2, (2, 2), (64, 64), ("int4", "int4"), "float16")
# what stands in the source, what is planted, a case that reaches it
FAULTS = {
    "a token sees those behind it": ("n[None, :] <= own", "n[None, :] <= 2 + own", PLAIN),
    "the offset of codes stays in scores": (
        "s -= q_total[:, None]",
        "s -= 0 * q_total[:, None]",
        PLAIN,
    ),
    "the offset of codes stays in values": (
        "y_high = (acc_high - moved[:, None])",
        "y_high = (acc_high - 0 * moved[:, None])",
        PLAIN,
    ),
    "scales of values are left out": ("p *= step[None, :]", "p *= 1.0", PLAIN),
    "parts do not fade": ("acc *= fading[:, None]", "acc *= 1.0", PLAIN),
    "the window is one position wider": (
        "n[None, :] > own[:, None] - window",
        "n[None, :] >= own[:, None] - window",
        replace(PLAIN, window=3),
    ),
    "parts are added without their weights": (
        "weight = tl.exp2(tl.load(tops_ptr + at) - top)",
        "weight = 1.0",
        PLAIN,
    ),
    "pages are read in their order in memory": (
        "block = tl.load(page_ptrs, mask=there, other=0)",
        "block = b * PAGES_STRIDE + n // PAGE",
        replace(PLAIN, page=16),
    ),
    "every group has the scale of the first": (
        "at + channel // GROUP",
        "at + channel // (2 * GROUP)",
        replace(PLAIN, groups=(4, 4)),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, interpreter, faulty, tmp_path):
    right, wrong, case = FAULTS[fault]
    changed = shutil.copytree(SOURCE, tmp_path / "qlab_kernels") / "cache_attention.py"
    source = changed.read_text(encoding="utf-8")
    assert source.count(right) == 1, right
    changed.write_text(source.replace(right, wrong), encoding="utf-8")
    assert interpreter.submit(excess, case, HERE).result() <= 1
    assert not faulty(tmp_path, excess, case, HERE) <= 2


@given(st.integers(1, 9), st.integers(0, 99))
def test_nibbles_come_back(d, seed):
    codes = torch.randint(-8, 8, (3, d), generator=torch.Generator().manual_seed(seed))
    packed = pack_nibbles(codes)
    assert packed.shape == (3, -(-d // 2))
    assert torch.equal(unpack_nibbles(packed, d), codes.to(torch.int8))


def problem(op="int4_attention", cc=(9, 0), dtype="bfloat16", n=4096, k=128, group=128, m=4):
    return Problem(op, cc, "", dtype, group, False, n, k, m, 64)


@pytest.mark.parametrize("op", ["int8_attention", "fp8_attention", "int4_attention"])
@pytest.mark.parametrize("cc", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_candidates_are_legal_and_the_heuristic_is_one_of_them(op, cc):
    for k, group, m in ((64, 64, 1), (80, 80, 9), (256, 256, 40), (128, 32, 4)):
        p = problem(op, cc, k=k, group=group, m=m)
        menu = candidates(p)
        assert heuristic(p) in menu and len(set(menu)) == len(menu)
        assert all(legal(p, c) is None for c in menu)
        assert all(legal(p, replace(c, kind="gemm")) for c in menu)


def test_what_has_no_kernel_or_does_not_fit_is_refused_by_name():
    assert "7.5 has no tensor cores in Triton" in str(refusal((7, 5), "float16", 64))
    assert "not float32" in str(refusal((9, 0), "float32", 64))
    assert "heads of 576 channels" in str(refusal((9, 0), "bfloat16", 576))
    with pytest.raises(KernelError, match="no tensor cores"):
        candidates(problem(cc=(7, 5), dtype="float16"))
    codes, scales = torch.zeros(1, 2, 3, 8, dtype=torch.int8), torch.ones(1, 2, 3, 1)
    parts = {"codes": codes, "scales": scales, "zeros": None, "channels": 8, "format": "int8"}
    assert numbers(Cached(**parts), torch.float32).shape == (1, 2, 3, 8)
    for wrong, said in (
        ({"format": "int4"}, r"torch.uint8 \[b, h, n, 4\]"),
        ({"scales": scales[:, :1]}, "expand them"),
        ({"scales": torch.ones(1, 2, 3, 3)}, "3 scales do not divide 8 channels"),
        ({"zeros": torch.zeros(1, 2, 3, 2)}, "another shape"),
    ):
        with pytest.raises(KernelError, match=said):
            Cached(**(parts | wrong))
