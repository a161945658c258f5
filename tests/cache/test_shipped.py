"""The shipped tables: one for every capability, legal, said to be modelled, small, and of few
distinct kernels."""

from collections import Counter
from functools import partial

import pytest

from qlab_kernels import cache, modelled
from qlab_kernels.capability import TARGETS, target
from qlab_kernels.config import BUCKETS, GROUPED_BUCKETS, Config, Problem, legal
from qlab_kernels.cost import microseconds, rank
from qlab_kernels.entries import key_of, parse
from qlab_kernels.static import Variant

FUSED = [cc for cc, row in TARGETS.items() if row.path == "fused"]
capabilities = pytest.mark.parametrize("cc", TARGETS, ids=str)


@pytest.fixture(scope="module")
def shipped():
    return modelled.shipped()


def test_every_capability_has_a_file_and_no_other(shipped):
    expected = {("int4_mm", cc) for cc in TARGETS} | {("int4_grouped_mm", cc) for cc in FUSED}
    assert {(p.op, p.cc) for p, _ in shipped} == expected and len(
        list(cache.SHIPPED.iterdir())
    ) == len(expected)


def test_every_entry_is_legal_modelled_and_of_no_device_that_was_timed(shipped):
    for p, entry in shipped:
        assert legal(p, entry.config) is None, (p, entry)
        assert (entry.source, entry.trials, entry.triton) == ("modelled", 0, None) and entry.us > 0


def test_few_distinct_kernels_and_small_files():
    per_capability = Counter(v.cc for v in modelled.shipped_variants())
    assert sum(per_capability.values()) <= 280 and max(per_capability.values()) <= 46
    assert all(path.stat().st_size < 50_000 for path in cache.SHIPPED.iterdir())


@capabilities
def test_common_shapes_and_every_bucket_are_there(cc):
    for dtype in target(cc).dtypes:
        for n, k in modelled.SHAPES:
            for m in BUCKETS:
                p = Problem(
                    "int4_mm",
                    cc,
                    "a device nobody knows",
                    str(dtype).removeprefix("torch."),
                    128,
                    False,
                    n,
                    k,
                    m,
                )
                assert cache.lookup(p).source == "shipped-capability"


@pytest.mark.parametrize("cc", FUSED, ids=str)
def test_common_mixtures_are_there_and_others_find_a_near_one(cc):
    p = partial(Problem, "int4_grouped_mm", cc, "a device nobody knows", "bfloat16", 128, False)
    for m in GROUPED_BUCKETS:
        assert {cache.lookup(p(n, k, m, e)).source for e, n, k in modelled.EXPERT_SHAPES} == {
            "shipped-capability"
        }
        assert cache.lookup(p(2816, 2048, m, 64)).source == "nearest"


@capabilities
def test_other_shapes_and_kinds_find_a_near_one(cc):
    for group, zeros in (128, True), (64, False), (32, False):
        for m in BUCKETS:
            looked_up = cache.lookup(
                Problem("int4_mm", cc, "any", "float16", group, zeros, 5120, 13824, m)
            )
            assert looked_up.source == "nearest"


@capabilities
def test_they_are_near_the_models_best(cc, shipped):
    """A quarter is what few variants and the gates may cost at worst, by the model itself."""
    for p, entry in shipped:
        if p.cc == cc:
            assert microseconds(p, entry.config) <= 1.25 * rank(p)[0][0], (p, entry)


def test_the_three_regimes_are_shipped(shipped):
    kinds = {
        m: {e.config.kind for p, e in shipped if p.m == m and p.cc in FUSED and p.op == "int4_mm"}
        for m in BUCKETS
    }
    assert "split_k" in kinds[1] and "gemm" in kinds[128] and kinds[4096] == {"dequant"}
    assert {e.config.kind for p, e in shipped if p.cc == (7, 5)} == {"fma", "dequant"}
    assert {e.config.kind for p, e in shipped if p.cc == (7, 0)} == {"dequant"}


def test_what_fails_the_gate_is_not_written():
    gated: list[Variant] = []

    def gate(variants):
        """Refuses every wide tile."""
        gated.extend(new := list(variants))
        return [["no"] if v.config.bn > 64 else [] for v in new]

    table = modelled.table("int4_mm", (9, 0), gate)
    left = {entry.config for entry in table.entries.values()}
    assert Config("dequant") in left and {c.bn for c in left if c.kind != "dequant"} == {64}
    assert len(gated) == len(set(gated)) and any(v.config.bn > 64 for v in gated)
    assert parse(table.json()) == table


def test_keys_name_their_problems(shipped):
    for p, _ in shipped[::50]:
        assert modelled.problem_of(p.op, p.cc, key_of(p, "model")) == p
