"""int4 weights times activations of 8 bits: the order of codes, the kernels against float64 in
Triton's interpreter, faults planted in their sources, what is refused, and gates that notice."""

import shutil
from dataclasses import replace
from pathlib import Path

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qlab_kernels
from qlab_kernels import TARGETS, Config, KernelError, Problem, candidates, gates, heuristic, legal
from qlab_kernels import reference_a8 as reference
from qlab_kernels.compilations import int4_a8 as ahead
from qlab_kernels.config import BUCKETS
from qlab_kernels.families.int4_a8 import NUMBERS, shared_bytes
from qlab_kernels.layout8 import FIRST, layout_of, pack8, unpack8
from qlab_kernels.static import compile_variant, compiled, faults

SOURCE = Path(qlab_kernels.__file__).parent
few = settings(max_examples=25)
GROUPS = (32, 64, 128, 256, 10_000)
LAYOUTS = ("mma8-int8", "wgmma8-int8", "mma8-fp8", "wgmma8-fp8")


# ---------------------------------------------------------------- the order of codes
def weight(n, k, group, zeros, lead=(), seed=0):
    rng = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (*lead, n, k), generator=rng, dtype=torch.int8)
    rows = (*lead, n, -(-k // group))
    scales = torch.rand(rows, generator=rng, dtype=torch.float32)
    return q, scales, torch.randint(-8, 8, rows, generator=rng).float() if zeros else None


@few
@given(
    n=st.integers(1, 130),
    k=st.integers(1, 300),
    group=st.sampled_from(GROUPS),
    zeros=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    lead=st.sampled_from([(), (3,)]),
)
def test_what_is_packed_is_unpacked(n, k, group, zeros, layout, lead):
    q, scales, z = weight(n, k, group, zeros, lead)
    packed = pack8(q, scales, z, group, layout, torch.float32)
    assert packed.words.shape == (*lead, -(-n // 64), packed.padded_k // 64, 2048)
    for part, back in zip((q, scales, z), unpack8(packed)):
        assert (part is None and back is None) or torch.equal(part, back)
    wide = [
        None if part is None else part.double().repeat_interleave(group, -1)[..., :k]
        for part in (scales, z)
    ]
    W = (q if z is None else q - wide[1]) * wide[0]
    assert torch.equal(reference.dequantize(packed, torch.float64), W)


def test_a_word_holds_two_registers_of_a_fragment():
    """Nibbles b and 4 + b of a word share byte b; the first word of thread 5 (g = 1, t = 1)."""
    q = torch.zeros(64, 64, dtype=torch.int8)
    q[1, 8:16] = torch.arange(-8, 0)  # r = 0, j = 0, k = t*8 + e
    word = pack8(q, torch.ones(64, 1), None, 64, "mma8-int8", torch.float32).words[0, 0, 80:84]
    assert word.tolist() == [0x40, 0x51, 0x62, 0x73]
    word = pack8(q, torch.ones(64, 1), None, 64, "mma8-fp8", torch.float32).words[0, 0, 80:84]
    assert word.tolist() == [0xBF, 0xAE, 0x9D, 0x8C]
    q = torch.zeros(64, 64, dtype=torch.int8)
    q[1, 4:8], q[9, 4:8] = torch.arange(4), torch.arange(4, 8)  # j = h = 0, r = 0 and 1
    word = pack8(q, torch.ones(64, 1), None, 64, "wgmma8-fp8", torch.float32).words[0, 0, 80:84]
    assert word.tolist() == [0x40, 0x51, 0x62, 0x73]


# ---------------------------------------------------------------- the kernels
def check(interpreter, fields):
    excess = interpreter.submit(cases.a8_excess, fields).result()
    assert excess <= 1, f"{excess:.3g} times what rounding explains: {fields}"


@st.composite
def products(draw, grouped=False):
    """Legal by construction: a k tile lies in a group, or holds two of 32."""
    group = draw(st.sampled_from(GROUPS))
    k = draw(st.integers(1, 300))
    widest = 64 if k <= 64 or group < 128 else 128
    bk = draw(st.sampled_from([64, widest])) if -(-k // 64) % 2 == 0 else 64
    if 128 <= group < k:  # k is padded to whole groups
        bk = draw(st.sampled_from([64, 128]))
    padded = -(-k // max(64, group)) * max(64, group) if group < k else -(-k // 64) * 64
    split = 1 if grouped else draw(st.integers(1, min(3, padded // bk)))
    bn = draw(st.sampled_from([64, 128]))
    counts = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4)) if grouped else []
    ends = tuple(sum(counts[: i + 1]) for i in range(len(counts)))
    fields = {
        "m": ends[-1] if grouped else draw(st.integers(0, 36)),
        "n": bn * draw(st.integers(1, 2)) - draw(st.integers(0, 63)),
        "k": k,
        "group": group,
        "zeros": draw(st.booleans()),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        "scales": draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        "config": ("gemm" if split == 1 else "split_k", draw(st.sampled_from([16, 32])), bn, bk),
        "ends": ends,
        "seed": draw(st.integers(0, 9)),
        "fixed": draw(st.booleans()),
        "bias": not grouped and draw(st.booleans()),
        "exact": draw(st.booleans()),
    }
    fields["config"] += (split, 4, 2)
    return fields


def operator(fields):
    numbers = fields["layout"].partition("-")[2]
    return f"int4_{numbers}_{'grouped_' if fields['ends'] else ''}mm"


@few
@given(fields=products())
def test_products(interpreter, fields):
    cc = (9, 0) if fields["layout"].startswith("wgmma8") else (8, 9)
    form = (fields["dtype"], fields["group"], fields["zeros"])
    p = Problem(operator(fields), cc, "", *form, fields["n"], fields["k"], fields["m"])
    assert legal(p, Config(*fields["config"])) is None
    check(interpreter, fields)


@few
@given(fields=products(grouped=True))
def test_experts(interpreter, fields):
    check(interpreter, fields)


def test_the_largest_sums_of_int8_are_exact(interpreter):
    """Every code -8 times -128 over a k tile of 256 is the last integer that the conversion by a
    magic number holds."""
    assert interpreter.submit(cases.a8_largest).result()


BASE = {
    "m": 5,
    "n": 64,
    "k": 256,
    "group": 128,
    "zeros": True,
    "layout": "mma8-int8",
    "dtype": "float32",
    "config": ("gemm", 16, 64, 64),
}
SPLIT = BASE | {"config": ("split_k", 16, 64, 64, 2)}
# file, what stands there, what is planted, a product that reaches it
FAULTS = {
    "nibbles lose their sign": ("tile8.py", "((words << 4) ^ 0x80)", "(words << 4)", BASE),
    "e4m3 of negative codes is one off": (
        "tile8.py",
        "((words >> 3) & 1) * 0x81",
        "((words >> 3) & 1) * 0x80",
        BASE | {"layout": "wgmma8-fp8"},
    ),
    "a tile takes the scale of another group": (
        "tile8.py",
        "tile // (GROUP // BK)",
        "tile // (2 * GROUP // BK)",
        BASE | {"zeros": False},
    ),
    "the second group of a tile takes the first one's scale": (
        "tile8.py",
        "2 * tile + 1",
        "2 * tile",
        BASE | {"group": 32, "zeros": False},
    ),
    "every tile of a group subtracts its zero points": (
        "tile8.py",
        "opening if GROUP > BK else live",
        "live",
        BASE,
    ),
    "zero points are added": ("tile8.py", "dots -= z", "dots += z", BASE),
    "every part of a split subtracts the zeros of a row": (
        "tile8.py",
        "here = live & (first == 0)",
        "here = live",
        SPLIT | {"group": 10_000},
    ),
    "every part of a split adds the bias": (
        "tile8.py",
        "mask=(rn < N) & (part == 0)",
        "mask=rn < N",
        SPLIT | {"bias": True},
    ),
    "the sums of another token": (
        "device8.py",
        ".mT.contiguous()",
        ".flip(0).mT.contiguous()",
        BASE,
    ),
    "one expert's tokens go to the next": (
        "rows.py",
        "tl.cumsum(tiles, 0) <= tile",
        "tl.cumsum(tiles, 0) < tile",
        BASE | {"m": 20, "ends": (4, 20)},
    ),
    "experts share the first one's scales": (
        "int4_a8_grouped.py",
        "scales_ptr + scale_rows",
        "scales_ptr",
        BASE | {"m": 20, "ends": (4, 20)},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, interpreter, faulty, tmp_path):
    file, right, wrong, fields = FAULTS[fault]
    changed = shutil.copytree(SOURCE, tmp_path / "qlab_kernels") / file
    source = changed.read_text(encoding="utf-8")
    assert source.count(right) == 1, right
    changed.write_text(source.replace(right, wrong), encoding="utf-8")
    check(interpreter, fields)
    assert not faulty(tmp_path, cases.a8_excess, fields) <= 10


# ---------------------------------------------------------------- configurations
def problem(op="int4_int8_mm", cc=(9, 0), m=1, group=128, **changes):
    experts = {"experts": 8} if op.endswith("_grouped_mm") else {}
    p = Problem(op, cc, "", "bfloat16", group, True, 4096, 4096, m, **experts)
    return replace(p, **changes)


def test_where_the_products_run():
    runs = {cc: [n for n in ("int8", "fp8") if cc >= FIRST[n]] for cc in TARGETS}
    assert runs[(7, 5)] == [] and runs[(8, 6)] == ["int8"] and runs[(8, 9)] == ["int8", "fp8"]
    for cc in TARGETS:
        for op, numbers in NUMBERS.items():
            p = problem(op, cc)
            if numbers in runs[cc]:
                assert legal(p, heuristic(p)) is None
                continue
            with pytest.raises(
                KernelError, match=rf"no {numbers} x {numbers} product .* is the first"
            ):
                heuristic(p)


@pytest.mark.parametrize("op", NUMBERS)
@pytest.mark.parametrize("group", GROUPS)
def test_every_shape_has_a_configuration(op, group):
    for cc in ((8, 9), (9, 0), (10, 0)):
        for n, k in ((4096, 4096), (64 * 3, 64 * 5), (1, 1), (130, 1000)):
            for m in BUCKETS:
                p = problem(op, cc, m, group, n=n, k=k)
                found = candidates(p)
                assert all(legal(p, c) is None for c in found) and heuristic(p) == found[0]


@pytest.mark.parametrize(
    "changes, config, sentence",
    [
        ({"cc": "cpu-avx2"}, Config("gemm", 16, 64, 64), "runs on GPUs"),
        ({"cc": (7, 5)}, Config("gemm", 16, 64, 64), "8.0 is the first"),
        ({"group": 48}, Config("gemm", 16, 64, 64), "groups of 32, 64, 128, 256 or whole rows"),
        ({"dtype": "float64"}, Config("gemm", 16, 64, 64), "results are bfloat16"),
        ({}, Config("dequant"), "gemm and split_k, not by dequant"),
        ({}, Config("gemm", 16, 64, 64, scale_on="weight"), "it is on the accumulator"),
        ({}, Config("gemm", 8, 64, 64), "bm is 16..128"),
        ({"op": "int4_fp8_mm"}, Config("gemm", 16, 64, 256), "bk is a power of two in 64..128"),
        ({}, Config("gemm", 16, 64, 64, 2), "gemm has 1"),
        ({}, Config("gemm", 16, 64, 64, 1, 8), "8 warps need bn >= 128"),
        ({"n": 60}, Config("gemm", 16, 128, 64), "would be dropped"),
        ({"group": 64}, Config("gemm", 16, 64, 128), "straddles groups of 64"),
        ({"group": 32}, Config("gemm", 16, 64, 128), "take bk <= 64"),
        ({"cc": (8, 6)}, Config("gemm", 128, 128, 128, 1, 8, 6), "bytes of shared memory"),
        ({}, Config("gemm", 128, 256, 64, 1, 8), "would spill"),
        ({"k": 2**17, "group": 2**17}, Config("gemm", 16, 64, 64), "may not fit in 32 bits"),
    ],
)
def test_what_is_illegal_says_why(changes, config, sentence):
    assert sentence in legal(problem(**changes), config)


def test_operands_that_do_not_fit_are_refused():
    from qlab_kernels.device8 import admit, prepared

    q, scales, _ = weight(64, 64, 64, False)
    packed = pack8(q, scales, None, 64, "mma8-int8", torch.float32)
    p, t = torch.zeros(3, 64, dtype=torch.int8), torch.ones(3, 1)
    for args, sentence in [
        ((p[:, :8], t), r"int8 \[tokens, 64\] for these weights"),
        ((p.float(), t), "not torch.float32"),
        ((p, t[:2]), r"scales of 3 tokens are float32 \[3, 1\] or \[1, 1\]"),
    ]:
        with pytest.raises(KernelError, match=sentence):
            prepared(*args, packed)
    x = prepared(p, t, packed)
    with pytest.raises(KernelError, match="by gemm and split_k, not dequant"):
        admit(x, packed, Config("dequant"))
    with pytest.raises(KernelError, match="run on CUDA devices, not on cpu"):
        admit(x, packed, Config("gemm", 16, 64, 64))
    with pytest.raises(KernelError, match="no layout 'mma2' of 8-bit products"):
        pack8(q, scales, None, 64, "mma2", torch.float32)


# ---------------------------------------------------------------- gates that notice
SMALL = Config("gemm", 16, 64, 128, warps=4, stages=4)
PLANTED = {  # operator, capability, configuration, constants planted, what the gates must say
    "another architecture's order": (
        "int4_int8_mm",
        (9, 0),
        SMALL,
        {"LAYOUT": "mma8"},
        "instructions per weight exceed",
    ),
    "nibbles widened one by one": (
        "int4_int8_mm",
        (8, 0),
        SMALL,
        {"SEQUENCE": "plain"},
        "instructions per weight exceed",
    ),
    "e4m3 widened one by one": (
        "int4_fp8_mm",
        (8, 9),
        SMALL,
        {"SEQUENCE": "plain"},
        "instructions per weight exceed",
    ),
    "no pipeline": ("int4_fp8_mm", (12, 0), SMALL, {"STAGES": 1}, "not copied asynchronously"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_gates_catch(planted):
    op, cc, config, constants, sentence = PLANTED[planted]
    v = ahead.Variant(op, cc, "bfloat16", 128, False, config)
    said = faults(v, compile_variant(v, **constants))
    assert any(sentence in fault for fault in said), said


@pytest.mark.parametrize("cc, numbers", [((8, 0), "int8"), ((8, 9), "fp8"), ((9, 0), "fp8")])
def test_rounding_compiles(cc, numbers):
    from qlab_kernels.round8 import BLOCK, EPSILON, round8_kernel

    pointer = {"int8": "*i8", "fp8": "*fp8e4nv"}[numbers]
    types = {"x_ptr": "*bf16", "perm_ptr": "*i64", "p_ptr": pointer}
    flags = {"FIXED": False, "PERM": True, "SUMS": True, "DIVIDES": False}
    numbers = {"LOWEST": -128.0, "HIGHEST": 127.0, "REACH": 127.5, "EPSILON": EPSILON, "UNIT": 16.0}
    one = gates.Compilation(
        kernel=round8_kernel,
        cc=cc,
        types=types | {"t_ptr": "*fp32", "sums_ptr": "*fp32"},
        constants={**flags, **numbers, "GROUP": 128, "BLOCK": BLOCK},
        aligned=("K", "K_PAD"),
        options={"num_warps": 4},
        weights=0,
    )
    assert not gates.sentences(gates.FITS, one, compiled(one))


def test_shared_memory_is_bounded_from_above():
    for op, cc in (("int4_int8_mm", (8, 0)), ("int4_fp8_mm", (9, 0))):
        p = problem(op, cc)
        v = ahead.Variant(op, cc, "bfloat16", 128, True, SMALL)
        assert compile_variant(v).shared <= shared_bytes(p, SMALL)


def test_the_layout_of_a_capability():
    assert layout_of((9, 0), "fp8") == "wgmma8-fp8" and layout_of((8, 6), "int8") == "mma8-int8"
    with pytest.raises(KernelError, match=r"no kernels for compute capability 6\.1"):
        layout_of((6, 1), "int8")
