"""Every shipped configuration, and what runs where nothing is shipped, compiles for its capability
and passes the gates.

The normal run compiles every configuration of the shipped tables and of the heuristic's choices for
every capability, each for one of its kinds of weights in turn; `-m static_full` compiles every
candidate of every kind of weights.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from qlab_kernels import TARGETS, Config, Problem, candidates, heuristic
from qlab_kernels.modelled import shipped_variants
from qlab_kernels.static import Facts, Variant, compile_variant, faults, variant

MOST = 120
COMPILED = [cc for cc, row in TARGETS.items() if row.path != "dequantize"]
KINDS = [
    (dtype, group, zeros)
    for dtype in ("bfloat16", "float16")
    for group in (32, 64, 128, 256, 8192)
    for zeros in (False, True)
]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def problem(
    cc, dtype="bfloat16", group=128, zeros=False, m=1, op="int4_mm", n=8192, k=8192, experts=1
):
    return Problem(op, cc, "", dtype, group, zeros, n, k, m, experts)


def dtypes(cc):
    return [str(d).removeprefix("torch.") for d in TARGETS[cc].dtypes]


def chosen() -> Iterable[Variant | None]:
    for cc in COMPILED:
        for dtype in dtypes(cc):
            for p in [problem(cc, dtype, m=m) for m in TOKENS] + [
                problem(cc, dtype, op="int4_grouped_mm", m=64, experts=32)
            ]:
                if TARGETS[cc].path == "fused" or p.op == "int4_mm":
                    yield variant(p, heuristic(p))


def normal() -> list[Variant]:
    """Of the variants of one configuration, which differ in the kind of weights alone, one: the
    next kind every time."""
    alike: dict[tuple, list[Variant]] = {}
    for v in dict.fromkeys(v for v in (*sorted(shipped_variants(), key=repr), *chosen()) if v):
        alike.setdefault((v.cc, v.op, v.config), []).append(v)
    return [variants[i % len(variants)] for i, variants in enumerate(alike.values())]


def everything() -> Iterable[Variant | None]:
    for cc in COMPILED:
        for dtype, group, zeros in KINDS:
            for m in TOKENS if dtype in dtypes(cc) else ():
                p = problem(cc, dtype, group, zeros, m)
                yield from (variant(p, c) for c in candidates(p))
            if dtype in dtypes(cc) and TARGETS[cc].path == "fused":
                p = problem(cc, dtype, group, zeros, 64, "int4_grouped_mm", experts=32)
                yield from (variant(p, c) for c in candidates(p))


def quiet(cache_directory):
    os.environ["TRITON_CACHE_DIR"] = cache_directory
    os.environ.pop("TRITON_INTERPRET", None)


def attempt(v: Variant, **constants) -> Facts | str:
    try:
        return compile_variant(v, **constants)
    except Exception as error:  # any failure of the compiler is a fault of the variant
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    workers = len(os.sched_getaffinity(0))
    directory = str(tmp_path_factory.mktemp("triton"))
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=quiet, initargs=(directory,)
    ) as pool:
        yield pool


def failures(compilers, variants: Iterable[Variant | None]) -> list[str]:
    distinct = list(dict.fromkeys(v for v in variants if v))
    assert distinct
    compiled = compilers.map(attempt, distinct, chunksize=4)
    wrong = {v: [f] if isinstance(f, str) else faults(v, f) for v, f in zip(distinct, compiled)}
    return [f"{v}: {sentences}" for v, sentences in wrong.items() if sentences]


@pytest.mark.parametrize("cc", COMPILED)
def test_shipped_and_chosen_variants_pass_the_gates(compilers, cc):
    assert not failures(compilers, [v for v in normal() if v.cc == cc])


@pytest.mark.parametrize("cc", COMPILED)
def test_dequantization_compiles(compilers, cc):
    kinds = [(0, True), (32, True), (128, False)]
    assert not failures(
        compilers,
        [
            Variant("dequantize", cc, d, *kind, Config("dequant"))
            for d in dtypes(cc)
            for kind in kinds
        ],
    )


def test_the_normal_run_stays_small_and_covers_every_capability():
    variants, shipped = normal(), [v for v in (*shipped_variants(), *chosen()) if v]
    assert len(variants) <= MOST
    assert {(v.cc, v.op, v.config) for v in variants} == {(v.cc, v.op, v.config) for v in shipped}
    assert {v.cc for v in variants} == set(COMPILED)
    assert {(v.dtype, v.group, v.zeros) for v in variants} == {
        (v.dtype, v.group, v.zeros) for v in shipped
    }


@pytest.mark.static_full
@pytest.mark.parametrize("cc", COMPILED)
def test_every_candidate_passes_the_gates(compilers, cc, request):
    if "static_full" not in request.config.option.markexpr:
        pytest.skip("compiles for many minutes: ask for it with -m static_full")
    assert not failures(compilers, [v for v in everything() if v and v.cc == cc])


SMALL = Config("gemm", 16, 64, 128, warps=4, stages=4)
LARGE = Config("gemm", 128, 256, 64, warps=8, stages=3, scale_on="weight")
PLANTED = {  # a variant, the constants planted in it, what the gates must say
    "integers converted one by one": ((8, 6), SMALL, {"SEQUENCE": "plain"}, "I2F in the loop"),
    "too many instructions": (
        (8, 0),
        SMALL,
        {"SEQUENCE": "plain"},
        "instructions per weight exceed",
    ),
    "another architecture's layout": (
        (9, 0),
        SMALL,
        {"LAYOUT": "mma2"},
        "weights are exchanged between threads",
    ),
    "too many accumulators": ((8, 0), LARGE, {}, "spills"),
    "too deep a pipeline": (
        (8, 6),
        Config("gemm", 32, 128, 128, stages=8),
        {},
        "bytes of shared memory exceed",
    ),
    "no pipeline": ((8, 0), SMALL, {"STAGES": 1}, "not copied asynchronously"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_gates_catch(compilers, planted):
    cc, config, constants, sentence = PLANTED[planted]
    v = Variant("int4_mm", cc, "bfloat16", 128, False, config)
    facts = compilers.submit(attempt, v, **constants).result()
    assert not isinstance(facts, str), facts
    assert any(sentence in fault for fault in faults(v, facts)), faults(v, facts)
