"""Every shipped configuration, and what runs where nothing is shipped, compiles for its capability
and passes the gates.

The normal run compiles every configuration of the shipped tables and of the heuristic's choices, of
every family, each for one of its kinds of weights in turn, and for one capability in turn of those
that have one row in TARGETS; every kernel is compiled for every capability that it runs on.
`-m static_full` compiles every candidate of every kind of weights for every capability.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from qlab_kernels import TARGETS, Capability, Config, candidates, heuristic
from qlab_kernels.compilations import COMPILED
from qlab_kernels.compilations.ahead import AheadOfTime
from qlab_kernels.modelled import shipped_variants
from qlab_kernels.static import Facts, Variant, compile_variant, faults

MOST = 120  # of a family
FAMILIES = {family.name: family for family in COMPILED}


def runs_on(family: AheadOfTime) -> list[Capability]:
    return [cc for cc in TARGETS if any(True for _ in family.chosen(cc))]


PLACES = [(name, cc) for name, family in FAMILIES.items() for cc in runs_on(family)]
BY_TRITON = [cc for cc, row in TARGETS.items() if row.path != "dequantize"]


def chosen(family: AheadOfTime) -> list[Any]:
    """What the heuristic takes and what is shipped."""
    problems = [p for cc in TARGETS for p in family.chosen(cc)]
    shipped = sorted((v for v in shipped_variants() if isinstance(v, family.variant)), key=repr)
    return shipped + [v for p in problems for v in family.variants(p, heuristic(p))]


def normal(family: AheadOfTime) -> list[Any]:
    """Of the variants of one configuration, which differ in the kind of weights and among equal
    capabilities alone, one: the next one every time, of the capability that the kernel has met
    least often. Then one for each capability that a kernel has not met at all."""
    alike: dict[tuple, list[Any]] = {}
    distinct = list(dict.fromkeys(chosen(family)))
    for v in distinct:
        alike.setdefault((TARGETS[v.cc], v.op, v.config), []).append(v)
    met: Counter = Counter()
    taken = []
    for i, variants in enumerate(alike.values()):
        begin = i % len(variants)
        in_turn = variants[begin:] + variants[:begin]
        taken.append(min(in_turn, key=lambda v: met[kernel_of(v)]))
        met[kernel_of(taken[-1])] += 1
    left = {kernel_of(v): v for v in distinct if not met[kernel_of(v)]}
    return taken + list(left.values())


def kernel_of(v: Any) -> tuple:
    return v.cc, v.op, v.config.kind


def everything(family: AheadOfTime, cc: Capability) -> list[Any]:
    pairs = [(p, c) for p in family.every(cc) for c in candidates(p)]
    return [v for p, c in pairs for v in family.variants(p, c)]


def attempt(v: Any, **constants) -> Facts | str:
    try:
        return compile_variant(v, **constants)
    except Exception as error:  # any failure of the compiler is a fault of the variant
        return f"{type(error).__name__}: {error}"


def failures(compilers, variants: Iterable[Any]) -> list[str]:
    distinct = list(dict.fromkeys(variants))
    assert distinct
    compiled = compilers.map(attempt, distinct, chunksize=4)
    wrong = {v: [f] if isinstance(f, str) else faults(v, f) for v, f in zip(distinct, compiled)}
    return [f"{v}: {sentences}" for v, sentences in wrong.items() if sentences]


@pytest.mark.parametrize("name, cc", PLACES)
def test_shipped_and_chosen_variants_pass_the_gates(compilers, name, cc):
    assert not failures(compilers, [v for v in normal(FAMILIES[name]) if v.cc == cc])


@pytest.mark.parametrize("cc", BY_TRITON)
def test_dequantization_compiles(compilers, cc):
    kinds = [(0, True), (32, True), (128, False)]
    dtypes = [str(d).removeprefix("torch.") for d in TARGETS[cc].dtypes]
    assert not failures(
        compilers,
        [Variant("dequantize", cc, d, *kind, Config("dequant")) for d in dtypes for kind in kinds],
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_normal_run_stays_small_and_covers_every_capability(name):
    family = FAMILIES[name]
    variants, all_of_them = normal(family), chosen(family)
    assert len(variants) <= MOST
    assert {(TARGETS[v.cc], v.op, v.config) for v in variants} == {
        (TARGETS[v.cc], v.op, v.config) for v in all_of_them
    }
    assert set(map(kernel_of, variants)) == set(map(kernel_of, all_of_them))
    assert {v.cc for v in variants} == set(runs_on(family)) != set()
    without = [replace(v, cc=(0, 0), op="", config=Config("gemm")) for v in variants]
    assert set(without) == {
        replace(v, cc=(0, 0), op="", config=Config("gemm")) for v in all_of_them
    }


@pytest.mark.static_full
@pytest.mark.parametrize("name, cc", PLACES)
def test_every_candidate_passes_the_gates(compilers, name, cc, request):
    if "static_full" not in request.config.option.markexpr:
        pytest.skip("compiles for many minutes: ask for it with -m static_full")
    assert not failures(compilers, everything(FAMILIES[name], cc))


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
