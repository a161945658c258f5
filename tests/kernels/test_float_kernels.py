"""Products of weights of 4- and 8-bit floats: the order of their codes, every kernel in Triton's
interpreter against float64, faults planted in the kernels' sources, and gates on machine code."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_static import attempt

import qlab_kernels
from qlab_kernels import Config, KernelError, Problem, candidates, heuristic
from qlab_kernels.compilations.floats import Variant
from qlab_kernels.config import legal
from qlab_kernels.float_layout import E2M1, FINE, LAYOUTS, pack, refusal_of_scales, unpack
from qlab_kernels.static import faults

SOURCE = Path(qlab_kernels.__file__).parent
E4M3 = torch.float8_e4m3fn
few = settings(max_examples=25)
GROUPS = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32, "fp8-blocks": 128, "fp8-rows": 10_000}
GROUPS["fp4-g64"] = 64


def excess(product):
    """In the process of the interpreter: how far a product is off, over what rounding explains."""
    from qlab_kernels.acceptance import floats

    return floats.excess(floats.Product(**product), torch.device("cpu"))


# ---------------------------------------------------------------- the order of codes
def random_codes(bits, shape, rng):
    if bits == 4:
        values = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float32)
        return values[torch.randint(0, 16, shape, generator=rng)].to(E4M3)
    octets = torch.randint(0, 256, shape, generator=rng)
    return torch.where(octets & 127 == 127, 5, octets).to(torch.uint8).view(E4M3)


@given(
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([16, 32, 64, 128, 1000]),
    layout=st.sampled_from(LAYOUTS),
    experts=st.sampled_from([(), (2,)]),
    seed=st.integers(0, 9),
)
@few
def test_packing_loses_nothing(n, k, bits, group, layout, experts, seed):
    rng = torch.Generator().manual_seed(seed)
    codes = random_codes(bits, (*experts, n, k), rng)
    groups = (*experts, n, -(-k // group))
    signs = torch.randint(-1, 2, groups, generator=rng)  # zeros among them
    mantissas = 1 + torch.randint(0, 8, groups, generator=rng) / 8
    scales = signs * mantissas * 2.0 ** torch.randint(-12, 12, groups, generator=rng)
    factors = torch.rand(*experts, n, generator=rng, dtype=torch.float32)
    q, s, f = unpack(pack(codes, scales, factors, group, bits, layout))
    each = s.repeat_interleave(min(group, k), -1)[..., :k] * f[..., None]
    right = scales.double().repeat_interleave(group, -1)[..., :k] * factors.double()[..., None]
    # the factor of a row is rounded where it takes the scale into itself
    exact = torch.equal if group < k else lambda a, b: torch.allclose(a, b, rtol=1e-7, atol=0)
    assert exact(q * each, codes.double() * right)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"codes": torch.full((8, 64), 1.25).to(E4M3)}, "e2m1 has no 1.25: its numbers are 0, 0.5"),
        ({"scales": torch.full((8, 4), 1.07)}, "more than 3 bits of mantissa"),
        ({"scales": torch.tensor([1.0, 1, 1, 2.0**-29]).expand(8, 4)}, "span more than 2"),
        ({"scales": torch.ones(8, 3)}, r"need scales \(8, 4\), not \(8, 3\)"),
        ({"factors": torch.ones(7)}, r"need factors \(8,\), not \(7,\)"),
        ({"group": 48, "scales": torch.ones(8, 2)}, "not in groups of 48: quantize with one"),
        ({"bits": 6}, "floats of 4 and 8 bits, not of 6"),
        ({"layout": "rows"}, "layouts wgmma and mma2, not 'rows'"),
        ({"codes": torch.zeros(8, 64)}, "codes are torch.float8_e4m3fn"),
    ],
)
def test_what_no_kernel_reads_is_refused(change, sentence):
    right = {
        "codes": torch.zeros(8, 64).to(E4M3),
        "scales": torch.ones(8, 4),
        "factors": torch.ones(8),
        "group": 16,
        "bits": 4,
        "layout": "mma2",
    }
    pack(**right)
    with pytest.raises(KernelError, match=sentence):
        pack(**{**right, **change})


def test_rows_of_scales_may_lie_far_apart():
    """Each row has exponents of its own, so that only scales of one row are held together."""
    scales = 2.0 ** torch.tensor([[-100.0, -110.0], [100.0, 90.0]])
    assert refusal_of_scales(scales) is None
    codes = random_codes(4, (2, 64), torch.Generator().manual_seed(0))
    _, s, f = unpack(pack(codes, scales, torch.ones(2), 32, 4, "wgmma"))
    assert torch.equal(s * f[:, None], scales.double())


# ---------------------------------------------------------------- products
@st.composite
def products(draw):
    """Legal by construction but for tiles that no longer divide: those are left out."""
    format = draw(st.sampled_from(list(GROUPS)))
    group, bn = GROUPS[format], draw(st.sampled_from([64, 128]))
    bk = draw(st.sampled_from([64, 128]))
    n = bn * draw(st.integers(1, 2)) - draw(st.integers(0, 63))
    k = max(bk, group if group < 1000 else 0) * draw(st.integers(1, 4)) - draw(st.integers(0, 15))
    split = draw(st.integers(1, min(-(-k // bk), 5)))
    scale_on = "weight" if group in FINE else "accumulator"
    kind = "gemm" if split == 1 else "split_k"
    return {
        "m": draw(st.integers(0, 40)),
        "n": n,
        "k": k,
        "format": format,
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": draw(st.sampled_from(["float16", "bfloat16"])),
        "config": (kind, draw(st.sampled_from([16, 32])), bn, bk, split, 4, 2, scale_on),
        "exact": draw(st.booleans()),
        "seed": draw(st.integers(0, 9)),
    }


def problem(product, op="mm"):
    bits = 8 if "8" in product["format"] else 4
    cc = {"wgmma": (9, 0), "mma2": (8, 0)}[product["layout"]]
    sizes = product["n"], product["k"], product["m"]
    group = GROUPS[product["format"]]
    return Problem(f"float{bits}_{op}", cc, "", product["dtype"], group, False, *sizes)


@few
@given(product=products())
def test_products(interpreter, product):
    assume(legal(problem(product), Config(*product["config"])) is None)
    assert (off := interpreter.submit(excess, product).result()) <= 1, off


@few
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    n=st.integers(1, 130),
    k=st.integers(1, 300),
    format=st.sampled_from(list(GROUPS)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(["float16", "bfloat16"]),
)
def test_products_of_experts(interpreter, counts, n, k, format, layout, dtype):
    ends = tuple(sum(counts[: i + 1]) for i in range(len(counts)))
    product = {"m": ends[-1], "n": n, "k": k, "format": format, "layout": layout, "dtype": dtype}
    c = heuristic(problem(product, "grouped_mm"))
    config = (c.kind, c.bm, c.bn, c.bk, c.split, c.warps, c.stages, c.scale_on)
    product |= {"ends": ends, "config": config}
    assert (off := interpreter.submit(excess, product).result()) <= 1, off


def one(format="mxfp4", bk=64, **others):
    on = "weight" if GROUPS[format] in FINE else "accumulator"
    product = {"m": 3, "n": 64, "k": 256, "format": format, "layout": "mma2", "dtype": "float16"}
    return {**product, "config": ("gemm", 16, 64, bk, 1, 4, 2, on), **others}


# file, what stands there, what is planted, a product that reaches it
FAULTS = {
    "a scale is read from the next byte": (
        "float_tile.py",
        "tile * GROUPS & 3)",
        "tile * GROUPS + 1 & 3)",
        one(),
    ),
    "the exponent of the fourth value loses a bit": (
        "float_tile.py",
        "(lane & 0x2000) >> 2",
        "(lane & 0x2000) >> 3",
        one("fp4-g64"),
    ),
    "the bytes of a lane are swapped": (
        "float_tile.py",
        "trans(0, 1, 3, 2).reshape(R, C)",
        "reshape(R, C)",
        one("mxfp8"),
    ),
    "bf16's exponents are taken for fp16's": (
        "float_tile.py",
        "w = (w * LIFT).to(COMPUTE)",
        "w = w",
        one("fp8-rows", dtype="bfloat16"),
    ),
    "a block takes the first one's scale": (
        "float_tile.py",
        "(tile // (GROUP // BK)) * N_PAD",
        "0 * N_PAD",
        one("fp8-blocks"),
    ),
    "experts share the scales of the first": (
        "float_mm.py",
        "scales_ptr + one * rows * N_PAD",
        "scales_ptr",
        one("nvfp4", m=20, ends=(4, 20)),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, interpreter, faulty, tmp_path):
    file, right, wrong, product = FAULTS[fault]
    changed = shutil.copytree(SOURCE, tmp_path / "qlab_kernels") / file
    source = changed.read_text(encoding="utf-8")
    assert source.count(right) == 1, right
    changed.write_text(source.replace(right, wrong), encoding="utf-8")
    assert interpreter.submit(excess, product).result() <= 1
    assert not faulty(tmp_path, excess, product) <= 10


# ---------------------------------------------------------------- configurations
@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"cc": (7, 5), "dtype": "float16"}, "Triton compiles no tensor-core product for compute"),
        ({"cc": (6, 1)}, r"no kernels for compute capability 6\.1"),
        ({"cc": "cpu-avx2"}, "runs on GPUs, not on cpu-avx2"),
        ({"dtype": "float32"}, "float16 and bfloat16 activations, not with float32"),
        ({"group": 48}, "not in groups of 48"),
        ({"zeros": True}, "floats have no zero points"),
    ],
)
def test_products_without_kernels_are_refused(change, sentence):
    right = {"op": "float4_mm", "cc": (8, 0), "device": "", "dtype": "bfloat16", "group": 16}
    right |= {"zeros": False, "n": 128, "k": 256, "m": 1}
    assert candidates(Problem(**right))
    with pytest.raises(KernelError, match=sentence):
        candidates(Problem(**{**right, **change}))


@given(
    n=st.integers(1, 5000),
    k=st.integers(1, 5000),
    m=st.sampled_from([1, 7, 100, 3000]),
    format=st.sampled_from(list(GROUPS)),
    cc=st.sampled_from([(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)]),
    op=st.sampled_from(["mm", "grouped_mm"]),
)
@few
def test_any_shape_has_a_configuration(n, k, m, format, cc, op):
    bits = 8 if "8" in format else 4
    p = Problem(f"float{bits}_{op}", cc, "", "bfloat16", GROUPS[format], False, n, k, m)
    menu = candidates(p)
    assert heuristic(p) in menu and all(legal(p, c) is None for c in menu)
    assert len(set(menu)) == len(menu)


# ---------------------------------------------------------------- machine code
SMALL = Config("gemm", 16, 64, 128, warps=4, stages=4, scale_on="weight")
PLANTED = {  # a variant, the constants planted in it, what the gates must say
    "codes put together without assembly": (
        Variant("float4_mm", (8, 0), "bfloat16", 32, SMALL),
        {"SEQUENCE": "plain"},
        "instructions per weight exceed",
    ),
    "another architecture's layout": (
        Variant("float8_mm", (9, 0), "bfloat16", 32, SMALL),
        {"LAYOUT": "mma2"},
        "SHFL in the loop",
    ),
    "too few warps for the bytes": (
        Variant(
            "float8_mm", (8, 0), "bfloat16", 32, Config("gemm", 64, 128, 64, 1, 4, 3, "weight")
        ),
        {},
        "spills",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_gates_catch(compilers, planted):
    v, constants, sentence = PLANTED[planted]
    facts = compilers.submit(attempt, v, **constants).result()
    assert not isinstance(facts, str), facts
    assert any(sentence in fault for fault in faults(v, facts)), faults(v, facts)
