"""Every kernel against float64 in Triton's interpreter; and the same checks catch faults planted in
the kernels' sources."""

import shutil
from pathlib import Path

import cases
import pytest
from cases import Case
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import qlab_kernels

SOURCE = Path(qlab_kernels.__file__).parent
few = settings(max_examples=30)
GROUP = st.sampled_from([32, 64, 128, 256, 1000])
DTYPE = st.sampled_from(["float16", "bfloat16"])


def check(interpreter, case):
    assert (excess := interpreter.submit(cases.error, case).result()) <= 1, (
        f"{excess:.3g} times what rounding explains: {case}"
    )


@st.composite
def tensor_core_cases(draw):
    """Legal by construction: sizes that pad to multiples of the tile, and tiles that nest with the
    groups."""
    group, bn = draw(GROUP), draw(st.sampled_from([64, 128]))
    bk, scale_on = draw(
        st.sampled_from(
            [
                (64, "accumulator"),
                (128, "accumulator"),
                (64, "weight"),
                (128, "weight"),
                (256, "weight"),
            ]
        )
    )
    if scale_on == "accumulator" and group % bk and group < 1000:
        bk, scale_on = 64, "accumulator" if group == 64 else "weight"
    n = bn * draw(st.integers(1, 2)) - draw(st.integers(0, 63))
    k = (bk if group == 1000 else max(bk, group)) * draw(
        st.integers(1, 5 if group < 256 else 2)
    ) - draw(st.integers(0, 63))
    tiles = -(-k // bk)
    split = draw(st.integers(1, min(tiles, 5)))
    config = (
        "gemm" if split == 1 else "split_k",
        draw(st.sampled_from([16, 32])),
        bn,
        bk,
        split,
        4,
        2,
        scale_on,
    )
    layout = draw(st.sampled_from(["wgmma", "mma2"]))
    return Case(
        draw(st.integers(0, 40)), n, k, group, draw(st.booleans()), layout, draw(DTYPE), config
    )


@few
@given(case=tensor_core_cases())
def test_tensor_core_kernel(interpreter, case):
    assume(cases.illegal(case) is None)
    check(interpreter, case)


@few
@given(
    m=st.integers(0, 8),
    n=st.integers(1, 130),
    k=st.integers(1, 600),
    group=GROUP,
    zeros=st.booleans(),
    bn=st.sampled_from([8, 16, 64]),
    bk=st.sampled_from([64, 128, 256]),
)
def test_fma_kernel(interpreter, m, n, k, group, zeros, bn, bk):
    case = Case(m, n, k, group, zeros, "rows", "float16", ("fma", 8, bn, bk))
    assume(cases.illegal(case) is None)
    check(interpreter, case)


@few
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    n=st.integers(1, 130),
    k=st.integers(1, 300),
    group=GROUP,
    zeros=st.booleans(),
    layout=st.sampled_from(["wgmma", "mma2"]),
    dtype=DTYPE,
)
def test_grouped_kernel(interpreter, counts, n, k, group, zeros, layout, dtype):
    ends = tuple(sum(counts[: i + 1]) for i in range(len(counts)))
    check(
        interpreter,
        Case(
            ends[-1],
            n,
            k,
            group,
            zeros,
            layout,
            dtype,
            ("gemm", 16, 64, 64, 1, 4, 1, "weight"),
            ends,
        ),
    )


@few
@given(
    n=st.integers(1, 200),
    k=st.integers(1, 500),
    group=GROUP,
    zeros=st.booleans(),
    layout=st.sampled_from(["wgmma", "mma2", "rows"]),
    dtype=DTYPE,
    experts=st.sampled_from([(), (1, 2)]),
)
def test_dequantize_is_exact(interpreter, n, k, group, zeros, layout, dtype, experts):
    case = Case(2, n, k, group, zeros, layout, dtype, ("dequant",), experts)
    assert interpreter.submit(cases.dequantized_exactly, case).result(), case


# file, what stands there, what is planted, a case that reaches it
FAULTS = {
    "a tile that straddles groups takes the first one's scale": (
        "tile.py",
        "BK // GROUP if GROUP > 0 and GROUP < BK else 1",
        "1",
        ("(GROUP // BK)", "1 * BK // GROUP"),
        Case(3, 64, 256, 64, False, "mma2", "float16", ("gemm", 16, 64, 128, 1, 4, 1, "weight")),
    ),
    "the tail of a split is dropped": (
        "tile.py",
        "tl.range(first, K // BK, step",
        "tl.range(first, K // BK // step * step, step",
        None,
        Case(3, 64, 320, 64, False, "mma2", "float16", ("split_k", 16, 64, 64, 2)),
    ),
    "the nibbles of a byte are swapped": (
        "tile.py",
        "tl.join(low, high)",
        "tl.join(high, low)",
        None,
        Case(3, 64, 128, 64, False, "wgmma", "float16", ("gemm", 16, 64, 64)),
    ),
    "the zero point is added": (
        "tile.py",
        "w -= load_halves(zeros_ptr, row, rn",
        "w += load_halves(zeros_ptr, row, rn",
        None,
        Case(3, 64, 128, 64, True, "wgmma", "float16", ("gemm", 16, 64, 64)),
    ),
    "one expert's tokens go to the next": (
        "grouped.py",
        "tl.cumsum(tiles, 0) <= tile",
        "tl.cumsum(tiles, 0) < tile",
        None,
        Case(20, 64, 64, 64, False, "mma2", "float16", ("gemm", 16, 64, 64), (4, 20)),
    ),
    "the last three nibbles of a word lose their power of 16": (
        "fma.py",
        "16 ** (i % 4)",
        "16 ** (i % 5)",
        None,
        Case(3, 64, 128, 64, False, "rows", "float16", ("fma", 4, 16, 64)),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, interpreter, faulty, tmp_path):
    file, right, wrong, also, case = FAULTS[fault]
    changed = shutil.copytree(SOURCE, tmp_path / "qlab_kernels") / file
    source = changed.read_text(encoding="utf-8")
    for old, new in [(right, wrong), *([also] if also else [])]:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    changed.write_text(source, encoding="utf-8")
    check(interpreter, case)
    assert not faulty(tmp_path, cases.error, case) <= 10
