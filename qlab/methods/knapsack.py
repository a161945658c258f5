"""One option for each group, of least total cost within a budget, exactly: the multiple-choice
knapsack problem (Sinha and Zoltners, Operations Research 1979).

min sum_g cost[g, c_g]   such that   sum_g size[g, c_g] <= budget

Groups are joined one by one (Nemhauser and Ullmann, Management Science 1969): of all choices for
the groups so far those are kept that no other beats in both size and cost. A choice is dropped when
the Lagrangian bound on what it can still become lies above a solution that is known.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Options = Sequence[tuple[int, float]]  # of one group: the size and the cost of each option
SLACK = 1e-9  # relative, for sums of costs in another order


def cheapest(groups: Sequence[Options], budget: int) -> list[int] | None:
    """The option of each group; None where even the smallest options are above the budget.

    Args:
        groups: the options of every group. Sizes are whole numbers, and costs finite.
        budget: the largest total size.
    """
    if sum(min(size for size, _ in options) for options in groups) > budget:
        return None
    price = _price(groups, budget)
    known = _filled(groups, _priced(groups, price), budget)
    upper = _cost(groups, known)
    upper += SLACK * (abs(upper) + price * budget)
    # what the groups from g on cost at least, with their sizes at their price
    rest = [0.0]
    for options in reversed(groups):
        rest.append(rest[-1] + min(cost + price * size for size, cost in options))
    sizes, costs = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[Tensor, Tensor]] = []
    for g, options in enumerate(groups):
        count = len(options)
        more = torch.tensor([size for size, _ in options], dtype=torch.int64)
        dearer = torch.tensor([cost for _, cost in options], dtype=torch.float64)
        all_sizes = (sizes[:, None] + more).flatten()
        all_costs = (costs[:, None] + dearer).flatten()
        bound = all_costs + price * (all_sizes - budget).double() + rest[len(groups) - g - 1]
        open_ones = ((all_sizes <= budget) & (bound <= upper)).nonzero().flatten()
        kept = open_ones[_undominated(all_sizes[open_ones], all_costs[open_ones])]
        sizes, costs = all_sizes[kept], all_costs[kept]
        steps.append((kept // count, kept % count))
    return _traced(steps, int(costs.argmin()))


def _traced(steps: Sequence[tuple[Tensor, Tensor]], last: int) -> list[int]:
    """The options that led to a choice, from the last group back to the first."""
    options: list[int] = []
    for parents, taken in reversed(steps):
        options.append(int(taken[last]))
        last = int(parents[last])
    return options[::-1]


def _undominated(sizes: Tensor, costs: Tensor) -> Tensor:
    """The places of those choices that cost less than every smaller one, by size."""
    order = torch.argsort(costs, stable=True)
    order = order[torch.argsort(sizes[order], stable=True)]
    least = costs[order].cummin(0).values
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = least[1:] < least[:-1]
    return order[first]


def _priced(groups: Sequence[Options], price: float) -> list[int]:
    """The options of least cost at a price per size, and of those the smallest."""
    return [
        min(range(len(options)), key=lambda i: (options[i][1] + price * options[i][0], options[i]))
        for options in groups
    ]


def _price(groups: Sequence[Options], budget: int) -> float:
    """About the lowest price per size at which the options fit into the budget."""
    if _size(groups, _priced(groups, 0.0)) <= budget:
        return 0.0
    low, high = 0.0, 1e-30
    while _size(groups, _priced(groups, high)) > budget:
        high *= 16
    for _ in range(60):
        middle = (low + high) / 2
        if _size(groups, _priced(groups, middle)) > budget:
            low = middle
        else:
            high = middle
    return high


def _filled(groups: Sequence[Options], chosen: list[int], budget: int) -> list[int]:
    """The options after what is left of the budget was spent where it saves most."""
    chosen = list(chosen)
    while True:
        left = budget - _size(groups, chosen)
        changes = [
            (options[i][1] - options[chosen[g]][1], g, i)
            for g, options in enumerate(groups)
            for i in range(len(options))
            if options[i][0] - options[chosen[g]][0] <= left
        ]
        gain, g, i = min(changes)
        if gain >= 0:
            return chosen
        chosen[g] = i


def _size(groups: Sequence[Options], chosen: Sequence[int]) -> int:
    return sum(options[i][0] for options, i in zip(groups, chosen))


def _cost(groups: Sequence[Options], chosen: Sequence[int]) -> float:
    return sum(options[i][1] for options, i in zip(groups, chosen))
