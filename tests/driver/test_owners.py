"""Every rank chooses the same owners, and no rank has much more than its share."""

import itertools
import random

import pytest

from qlab.driver.owners import owners, solving_cost


def slowest(costs: dict[str, float], owner: dict[str, int], ranks: int) -> float:
    return max(sum(costs[key] for key in costs if owner[key] == r) for r in range(ranks))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_slowest_rank_has_at_most_four_thirds_of_the_least_possible(ranks: int) -> None:
    draw = random.Random(ranks)
    for _ in range(20):
        costs = {str(i): draw.uniform(1, 100) for i in range(6)}
        choices = itertools.product(range(ranks), repeat=len(costs))
        least = min(slowest(costs, dict(zip(costs, choice)), ranks) for choice in choices)
        assert slowest(costs, owners(costs, ranks), ranks) <= 4 / 3 * least + 1e-9


def test_equal_costs_go_round_the_ranks_in_their_order() -> None:
    assert owners(dict.fromkeys("abcd", 1.0), 2) == {"a": 0, "b": 1, "c": 0, "d": 1}


def test_one_rank_owns_everything_and_more_ranks_than_weights_leave_some_without() -> None:
    assert set(owners({"a": 3.0, "b": 1.0}, 1).values()) == {0}
    assert owners({"a": 3.0, "b": 1.0}, 8) == {"a": 0, "b": 1}


def test_a_wide_input_costs_more_than_many_outputs() -> None:
    assert solving_cost(2, 4) == 4**3 + 2 * 4**2 < solving_cost(4, 8)
