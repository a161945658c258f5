"""Bits where they count: one of several roundings for each group of weights, of least total
sensitivity within a budget of bits.

min sum_g s[g, c_g]   such that   sum_g bits[g, c_g] <= bits x weights

s[g, c]: what the loss of the network is expected to rise by when the group g is rounded as c says.
Groups are what engines fuse: the weights that read one input (q, k and v; gate and up), and all
experts of a block. The optimum is exact (`knapsack`).

Sources: the Fisher information as a sensitivity, Kim et al. 2023 (SqueezeLLM, arXiv:2306.07629) and
Dong et al. 2019 (HAWQ, arXiv:1905.03696).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlab.algebra.bind import Bind, Foreseen, Outline, bind, over_budget
from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.scope import pattern_of
from qlab.algebra.spec import Spec
from qlab.algebra.transform import Transform, at, chain
from qlab.errors import QlabError
from qlab.methods.knapsack import cheapest
from qlab.methods.sensitivity import Costs, Sensitivity, fisher, foreseen, fused, kl_of_each

NAME = "allocate"


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Which choice each weight gets.

    chosen: weight -> the number of its choice. costs: weight -> the sensitivity of every choice.
    groups: the weights that are chosen together. bits: bits per weight of the whole. loss: the
    total sensitivity.
    """

    chosen: Mapping[str, int]
    costs: Costs
    groups: Sequence[Sequence[str]]
    bits: float
    loss: float


def allocate(
    choices: Sequence[Transform], bits: float, sensitivity: Sensitivity | None = None
) -> Transform:
    """One of several roundings for each weight, so that the whole costs least within a budget.

    It is a `qlab.bind`: the sensitivities are measured on the model that the steps in front make,
    and the choice is the exact optimum of their sum. Weights that engines fuse are chosen together:
    those that read one input, and all experts of a block.

    Args:
        choices: recipes that round once, such as rtn("int2-g64") and gptq("int4-g64"); keep() is
            one too.
        bits: the budget, in bits per weight over the weights that are chosen for, with scales and
            zero points.
        sensitivity: what rounding a weight costs: `qlab.fisher` (the default), `qlab.kl_of_each`,
            or a function of your own, (model, specs) -> full name of a weight -> a number for each
            spec. A spec is None where a choice rounds nothing.

    Returns:
        A transform of one stage. It needs calibration data.

    Raises:
        QlabError: a choice that rounds to several grids, or a budget below that of the smallest
            choices.

    Source:
        Kim et al. 2023 (arXiv:2306.07629); Dong et al. 2019 (arXiv:1905.03696).

    Example:
        >>> import qlab
        >>> data = qlab.tokens("demo", "my.jsonl", samples=2, length=16)
        >>> recipe = qlab.allocate([qlab.rtn("int2-g64"), qlab.rtn("int8-g64")], bits=5)
        >>> quantized = qlab.apply("demo", recipe, data)
        >>> 2.25 < quantized.bits_per_weight <= 5
        True
    """
    specs = [_spec(choice) for choice in choices]
    measure_costs = sensitivity or fisher
    name = getattr(measure_costs, "__name__", type(measure_costs).__name__)
    words = ", ".join(str(spec) if spec else "kept" for spec in specs)

    def measure(model: Any) -> Allocation:
        return allocated(model, specs, bits, measure_costs(model, specs))

    def then(value: Allocation) -> Transform:
        return chain(*_parts(choices, value.chosen))

    def foresee(outline: Outline) -> Foreseen | None:
        return foreseen(measure_costs, sum(spec is not None for spec in specs), outline)

    detail = f"{bits:g} bits of {words}, by {name}"
    divided = measure_costs in (fisher, kl_of_each)  # what one's own notes of windows is not known
    (stage,) = bind(NAME, measure, then, detail, foresee, divided=divided)
    assert isinstance(stage, Bind)
    return (replace(stage, among=tuple(choices), budget=bits),)


def _parts(choices: Sequence[Transform], chosen: Mapping[str, int]) -> Iterator[Transform]:
    for number, choice in enumerate(choices):
        names = [name for name, i in chosen.items() if i == number]
        if names:
            yield at(pattern_of(names), choice)


def _spec(choice: Transform) -> Spec | None:
    """The grid of a choice; None where it rounds nothing."""
    specs = [stage.spec for stage in choice if stage.spec is not None]
    if len(set(specs)) > 1:
        raise QlabError(
            f"a choice of allocate rounds to {', '.join(map(str, specs))}; give recipes that round "
            "to one grid each"
        )
    return specs[0] if specs else None


# ------------------------------------------------------------------ choosing
def allocated(model: Any, specs: Sequence[Spec | None], bits: float, costs: Costs) -> Allocation:
    """The choice of least total cost within a budget of bits per weight."""
    sizes, groups, count = _sizes(model, specs)
    _refuse_costs(costs, sizes, len(specs))
    options = [
        [
            (sum(sizes[name][c] for name in group), sum(float(costs[name][c]) for name in group))
            for c in range(len(specs))
        ]
        for group in groups
    ]
    taken = cheapest(options, int(bits * count))
    if taken is None:
        least = sum(min(size for size, _ in group) for group in options) / count
        raise over_budget(NAME, least, bits)
    return Allocation(
        chosen={name: c for group, c in zip(groups, taken) for name in group},
        costs={name: [float(cost) for cost in costs[name]] for name in sizes},
        groups=groups,
        bits=sum(group[c][0] for group, c in zip(options, taken)) / count,
        loss=sum(group[c][1] for group, c in zip(options, taken)),
    )


def _refuse_costs(costs: Costs, names: Mapping[str, Any], choices: int) -> None:
    for name in names:
        if name not in costs or len(costs[name]) != choices:
            raise QlabError(
                f"the sensitivity gives no {choices} numbers for {name}; return one for each "
                "choice of each weight"
            )
        if not all(math.isfinite(float(cost)) for cost in costs[name]):
            raise QlabError(
                f"the sensitivity of {name} is {list(map(float, costs[name]))}; return finite "
                "numbers"
            )


def _sizes(
    model: Any, specs: Sequence[Spec | None]
) -> tuple[dict[str, list[int]], list[list[str]], int]:
    """Weight -> the bits of each choice; the groups; and the number of weights."""
    sizes: dict[str, list[int]] = {}
    groups: list[list[str]] = []
    count = 0

    def of_segment(_: None, path: str, graph: ModuleGraph) -> None:
        nonlocal count
        for sites in fused(graph).values():
            groups.append([graph.where(site) for site in sites])
            for site in sites:
                shape = graph.params[site.weight or ""].shape
                count += shape.numel()
                sizes[graph.where(site)] = [_bits(graph, site, spec) for spec in specs]

    model.fold(of_segment, None)
    return sizes, groups, count


def _bits(graph: ModuleGraph, site: Site, spec: Spec | None) -> int:
    shape = graph.params[site.weight or ""].shape
    if site.layout.endswith("k o"):
        shape = torch.Size((*shape[:-2], shape[-1], shape[-2]))
    dense_bits = 8 * graph.stored_dtype(site.weight or "").itemsize
    each = spec.bits_per_weight(shape, graph.dtype) if spec else dense_bits
    return round(each * shape.numel())
