"""Statistics are monoids, and they move with the inputs they describe."""

from dataclasses import replace
from functools import reduce
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segments import normal, untouched
from torch.utils import _pytree as pytree

from qlab.algebra.statistic import Observation, per_expert
from qlab.algebra.stats import STATS, TILE, Moment, add_gram_, gram, quadratic, sample, transport

EVERY = {**STATS, "sample of 7": sample(7)}
# which every matrix moves
LINEAR = {"second_moment", "drift", "held_out", "received", "stream_drift", "stream_held_out"}
LINEAR |= {"sample", "drift_fitted", "stream_fitted"}
SOURCES = st.tuples(st.integers(2, 24), st.integers(2, 12), st.integers(0, 999))
laws = pytest.mark.parametrize("stat", EVERY.values(), ids=EVERY)


def close(a, b, tolerance=1e-5):
    ours, theirs = pytree.tree_leaves(a), pytree.tree_leaves(b)
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs):
        x, y = torch.as_tensor(x).double(), torch.as_tensor(y).double()
        assert x.shape == y.shape
        # No value is infinite, and no tensor is empty.
        assert torch.equal(x, y) or (x - y).abs().max() <= tolerance * y.abs().max().clamp_min(1)


def observation(n, k, seed):
    order = torch.randperm(10 * n, generator=torch.Generator().manual_seed(seed))[:n]
    x = normal(n, k, seed=seed) + 0.3
    return Observation(
        x,
        order,
        reference_nk=x + 0.1 * normal(n, k, seed=seed + 1),
        received_n=normal(n, seed=seed + 2).square(),
        stream_no=0.1 * normal(n, 3, seed=seed + 3),
    )


def cut(o, *at):
    tensors = (o.x_nk, o.keys, o.reference_nk, o.received_n, o.stream_no)
    parts = (t.tensor_split(at) for t in tensors)
    return [Observation(x, keys, None, *others) for x, keys, *others in zip(*parts)]


def through(o, move):
    return replace(o, x_nk=move(o.x_nk), reference_nk=move(o.reference_nk))


@laws
@given(source=SOURCES, at=st.tuples(st.integers(1, 23), st.integers(1, 23)))
def test_statistics_of_a_whole_are_those_of_its_parts(stat, source, at):
    o = observation(*source)
    parts = [
        stat.lift(part)
        for part in cut(o, *sorted(min(i, source[0] - 1) for i in at))
        if len(part.keys)
    ]
    close(reduce(stat.combine, parts), stat.lift(o))


@laws
@given(source=SOURCES)
def test_combining_is_associative_and_commutative(stat, source):
    a, b, c = (stat.lift(part) for part in cut(observation(source[0] + 3, *source[1:]), 1, 3))
    close(stat.combine(stat.combine(a, b), c), stat.combine(a, stat.combine(b, c)))
    for order in permutations([a, b, c]):
        close(reduce(stat.combine, order), reduce(stat.combine, [a, b, c]))


@pytest.mark.parametrize("name", [name for name in STATS if STATS[name].into])
@given(source=SOURCES)
def test_combining_in_place_gives_the_same_bits(name, source):
    stat, experts = STATS[name], per_expert(STATS[name])
    parts = cut(observation(source[0] + 3, *source[1:]), 2)
    a, b = map(stat.lift, parts)
    close(stat.combine(a, b), stat.into(*map(stat.lift, parts)), tolerance=0)
    # two experts, of which the second sees no token of the first part
    of_parts = [(parts[0], [2, 2]), (parts[1], [1, len(parts[1].keys)])]
    states = lambda: [experts.lift(replace(p, ends=torch.tensor(ends))) for p, ends in of_parts]
    close(experts.combine(*states()).states, experts.into(*states()).states, tolerance=0)


@pytest.mark.parametrize("name", [name for name in STATS if STATS[name].grow])
@given(source=SOURCES)
def test_growing_by_a_batch_gives_the_same_bits(name, source):
    stat, experts = STATS[name], per_expert(STATS[name])
    first, then = cut(observation(source[0] + 3, *source[1:]), 2)
    both = stat.combine(stat.lift(first), stat.lift(then))
    close(both, stat.grow(stat.lift(first), then), tolerance=0)
    first, then = (  # the second expert sees no token of the first part, the first none behind it
        replace(part, ends=torch.tensor([count, len(part.keys)]))
        for part, count in ((first, len(first.keys)), (then, 0))
    )
    both = experts.combine(experts.lift(first), experts.lift(then))
    close(both.states, experts.grow(experts.lift(first), then).states, tolerance=0)


def test_growing_gives_the_same_bits_where_a_matrix_has_several_tiles():
    x = normal(40, 2 * TILE + 13, seed=0)
    a, b = gram(x[:11]), gram(x[11:])
    assert torch.equal(a + b, add_gram_(a, x[11:]))


@pytest.mark.parametrize("name", [name for name in STATS if STATS[name].sums])
@given(source=SOURCES)
def test_sums_are_combined_number_by_number(name, source):
    a, b = map(STATS[name].lift, cut(observation(source[0] + 3, *source[1:]), 2))
    added = pytree.tree_map(lambda x, y: x + y, a, b)
    close(added, STATS[name].combine(a, b), tolerance=0)


@laws
@given(source=SOURCES)
def test_transport_by_a_diagonal_is_observing_again(stat, source):
    o, m = observation(*source), normal(source[1], seed=source[2] + 1)  # of both signs
    close(stat.transport(stat.lift(o), m), stat.lift(through(o, lambda x: x * m)))


@laws
@given(source=SOURCES)
def test_transport_by_a_matrix_is_observing_again_or_dropped(stat, source):
    o, M = observation(*source), normal(source[1], source[1], seed=source[2] + 1)
    moved = stat.transport(stat.lift(o), M)
    linear = any(stat is EVERY[name] for name in (*LINEAR, "sample of 7"))
    assert (moved is not None) == linear
    if linear:
        close(moved, stat.lift(through(o, lambda x: x @ M)))


@laws
@given(source=SOURCES)
def test_statistics_write_to_none_of_their_inputs(stat, source):
    o = observation(*source)
    a, b = map(stat.lift, cut(o, 1))
    with untouched(
        list(a) if isinstance(a, tuple) else a,
        list(b) if isinstance(b, tuple) else b,
        o.x_nk,
        o.keys,
    ):
        stat.combine(a, b)
        stat.transport(a, normal(source[1], seed=1))
        stat.transport(a, normal(source[1], source[1], seed=1))
        stat.lift(o)


def test_transport_moves_one_source_and_drops_what_cannot_move():
    o = observation(9, 4, 0)
    stats = {(source, name): STATS[name].lift(o) for source in ("a", "b") for name in STATS}
    moved = transport(stats, "a", normal(4, 4, seed=1))
    assert {name for source, name in moved if source == "a"} == LINEAR
    assert all(moved["b", name] is stats["b", name] for name in STATS)
    assert all(moved["a", name] is not stats["a", name] for name in LINEAR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_sums_exact_products_in_fp32(dtype):
    """At a size that goes to the matrix units where there are any: nothing of the inputs is rounded
    away."""
    x = normal(1024, 512, seed=0).to(dtype)
    exact = x.double().T @ x.double()
    assert (gram(x) - exact).abs().max() < 2e-5 * exact.abs().max()


@pytest.mark.parametrize("k", [1, 5, 384, 385, 800])
def test_gram_is_the_full_product_and_exactly_symmetric(k):
    x = normal(40, k, seed=k)
    H = gram(x)
    close(H, x.double().T @ x.double())
    assert torch.equal(H, H.T)


@given(SOURCES)
def test_the_mean_second_moment_counts_every_token_once(source):
    o = observation(*source)
    stat = STATS["second_moment"]
    whole = reduce(stat.combine, map(stat.lift, cut(o, 1)))
    close(whole.mean_kk, o.x_nk.double().T @ o.x_nk.double() / len(o.keys))


def test_statistics_accumulate_in_fp32_whatever_the_dtype():
    o = Observation(torch.full((3000, 2), 3.0, dtype=torch.bfloat16), torch.arange(3000))
    assert STATS["second_moment"].lift(o).sum_kk.tolist() == [[27000.0] * 2] * 2
    assert STATS["absmean"].lift(o)[0].tolist() == [9000.0] * 2


def test_a_sample_is_not_the_first_rows_and_keeps_each_row_with_its_key():
    o = Observation(torch.arange(4000.0).repeat(3, 1).T.contiguous(), torch.arange(4000))
    kept = sample(100).lift(o)
    rows = kept.x_nk[:, 0]
    assert len(rows.unique()) == 100 and 1500 < rows.mean() < 2500
    assert torch.equal(kept.order, kept.order.sort().values)


@pytest.mark.parametrize("k", [1, 7, 191, 192, 193, 500])
def test_quadratic_is_the_output_error(k):
    x, D = normal(40, k, seed=k), normal(3, k, seed=5)
    torch.testing.assert_close(
        quadratic(D, gram(x)).double(),
        (x.double() @ D.double().T).square().sum(0),
        rtol=1e-4,
        atol=1e-6,
    )


@given(SOURCES)
def test_the_drift_is_the_cross_moment_with_the_reference_less_the_second_moment(source):
    o = observation(*source)
    drift, x = STATS["drift"].lift(o), o.x_nk.double()
    close(drift.sum_kk, o.reference_nk.double().T @ x - x.T @ x, 1e-4)
    assert (
        drift.tokens == len(o.keys)
        and not STATS["drift"].lift(replace(o, reference_nk=None)).sum_kk.any()
    )


@given(SOURCES)
def test_tokens_are_fitted_to_or_held_out(source):
    o = observation(*source)
    o = replace(o, keys=8 * o.keys)  # of several stretches
    of = lambda name: STATS[name].lift(o)
    for name, held in (("drift", of("held_out").drift), ("stream", of("stream_held_out"))):
        whole, fitted = of("drift" if name == "drift" else "stream_drift"), of(f"{name}_fitted")
        assert fitted.tokens + held.tokens == whole.tokens == len(o.keys)
        close(fitted.sum_kk + held.sum_kk, whole.sum_kk, 1e-4)


def test_the_mean_of_nothing_weighs_every_direction_the_same():
    assert torch.equal(Moment(torch.zeros(2, 2), 0).mean_kk, torch.eye(2))


@laws
@given(source=SOURCES)
def test_nothing_is_the_identity_and_stays_nothing(stat, source):
    state, nothing = stat.lift(observation(*source)), stat.nothing(source[1])
    close(stat.combine(state, nothing), state)
    close(stat.combine(nothing, state), state)
    m = normal(source[1], seed=1)
    close(stat.combine(stat.transport(nothing, m), state), state)


@laws
@given(source=SOURCES, split=st.lists(st.integers(0, 24), min_size=1, max_size=4))
def test_an_experts_statistic_is_that_of_the_tokens_routed_to_it(stat, source, split):
    o = observation(*source)
    ends = torch.tensor([*sorted(min(i, source[0]) for i in split), source[0]])
    seen = per_expert(stat).lift(replace(o, ends=ends)).states
    starts = [0, *ends.tolist()]
    assert len(seen) == len(ends)
    for state, start, stop in zip(seen, starts, ends.tolist()):
        alone = replace(
            o,
            x_nk=o.x_nk[start:stop],
            keys=o.keys[start:stop],
            reference_nk=o.reference_nk[start:stop],
            received_n=None if o.received_n is None else o.received_n[start:stop],
            stream_no=None if o.stream_no is None else o.stream_no[start:stop],
        )
        close(state, stat.lift(alone) if stop > start else stat.nothing(source[1]))


@laws
@given(source=SOURCES)
def test_experts_combine_and_move_one_by_one(stat, source):
    n, k, seed = source
    experts = per_expert(stat)
    a, b = (observation(n, k, seed + i) for i in range(2))
    ends = torch.tensor([n // 2, n // 2, n])  # the second expert sees nothing
    both = experts.combine(*(experts.lift(replace(o, ends=ends)) for o in (a, b)))
    alone = [
        stat.combine(*(stat.lift(part) for part in parts))
        for parts in zip(cut(a, n // 2), cut(b, n // 2))
    ]
    close(both.states[0], alone[0])
    close(both.states[2], alone[1])
    m_e1k = normal(3, 1, k, seed=seed)
    for e in (0, 2):
        close(experts.transport(both, m_e1k).states[e], stat.transport(both.states[e], m_e1k[e, 0]))
        close(
            experts.transport(both, m_e1k[1, 0]).states[e],
            stat.transport(both.states[e], m_e1k[1, 0]),
        )


def test_what_cannot_move_for_one_expert_is_dropped_for_all():
    o = observation(9, 4, 0)
    stats = {
        ("a", name): per_expert(STATS[name]).lift(Observation(o.x_nk, o.keys, torch.tensor([4, 9])))
        for name in STATS
    }
    assert {name for _, name in transport(stats, "a", normal(4, 4, seed=1))} == LINEAR
