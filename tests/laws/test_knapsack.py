"""The exact choice of one option for each group within a budget."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.methods.knapsack import cheapest

COSTS = st.one_of(st.integers(0, 3).map(float), st.floats(0, 1e3, allow_subnormal=False))
OPTIONS = st.lists(st.tuples(st.integers(0, 20), COSTS), min_size=1, max_size=4)
PROBLEMS = st.tuples(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 70))


def total(groups, chosen, what):
    return sum(options[i][what] for options, i in zip(groups, chosen, strict=True))


@settings(max_examples=150)
@given(PROBLEMS)
def test_the_choice_is_that_of_brute_force(problem):
    groups, budget = problem
    every = itertools.product(*(range(len(options)) for options in groups))
    fitting = [chosen for chosen in every if total(groups, chosen, 0) <= budget]
    chosen = cheapest(groups, budget)
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        least = min(total(groups, each, 1) for each in fitting)
        assert total(groups, chosen, 0) <= budget
        assert total(groups, chosen, 1) <= least + 1e-9 * (1 + least)


def test_many_groups_fill_a_budget_that_no_greedy_choice_does():
    groups = [[(2, 9.0), (5, 4.0)], [(3, 8.0), (7, 0.0)], *[[(1, 0.0)]] * 50]
    assert cheapest(groups, 50 + 9) == [0, 1, *[0] * 50]
    assert cheapest(groups, 50 + 8) == [1, 0, *[0] * 50]
