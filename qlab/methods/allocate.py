"""Bits where they count: one of several roundings for each group of weights, of least total
sensitivity within a budget of bits.

min sum_g s[g, c_g]   such that   sum_g bits[g, c_g] <= bits x weights

s[g, c]: what the loss of the network is expected to rise by when the group g is rounded as c says.
Groups are what engines fuse: the weights that read one input (q, k and v; gate and up), and all
experts of a block. The optimum is exact (`knapsack`).

Sources: the Fisher information as a sensitivity, Kim et al. 2023 (SqueezeLLM, arXiv:2306.07629) and
Dong et al. 2019 (HAWQ, arXiv:1905.03696).

Legend: W_ok a weight, Q_ok the same rounded, F its Fisher information, E [(d nll / d W)^2].
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.bind import bind
from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.leaf import dense
from qlab.algebra.scope import pattern_of
from qlab.algebra.spec import Spec
from qlab.algebra.transform import Transform, apply, at, chain
from qlab.errors import QlabError
from qlab.methods.knapsack import cheapest
from qlab.methods.rtn import rtn

# full name of a weight -> what each option costs; None stands for a weight that stays
Costs = Mapping[str, Sequence[float]]
Sensitivity = Callable[[Any, Sequence[Spec | None]], Costs]


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

    return bind("allocate", measure, then, detail=f"{bits:g} bits of {words}, by {name}")


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
        raise QlabError(
            f"the smallest choices of allocate take {least:.3f} bits per weight and the budget is "
            f"{bits:g}; give more bits, or a smaller choice"
        )
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
        if not all(torch.isfinite(torch.tensor(float(cost))) for cost in costs[name]):
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


def fused(graph: ModuleGraph) -> dict[str, list[Site]]:
    """The weights of a segment that engines fuse, by what they share: an input, or being
    experts."""
    groups: dict[str, list[Site]] = {}
    for site in graph.sites:
        if not site.router:
            groups.setdefault("experts" if site.route else site.source, []).append(site)
    return groups


# ------------------------------------------------------------------ sensitivities
def fisher(model: Any, specs: Sequence[Spec | None]) -> Costs:
    """The expected rise of the loss by the diagonal of the Fisher information.

    s = 1/2 sum_ok F_ok (Q_ok - W_ok)^2, with F the mean over windows of the squared gradient of
    the negative log likelihood, and Q_ok rounded to nearest. One pass forward and one backward.

    Args:
        model: a `qlab.Model`.
        specs: the grids; None stands for a weight that stays.

    Returns:
        Full name of a weight -> its sensitivity for each grid.

    Source:
        Kim et al. 2023 (arXiv:2306.07629).

    Example:
        >>> import qlab
        >>> data = qlab.tokens("demo", "my.jsonl", samples=1, length=16)
        >>> choices = [qlab.rtn("int3-g64"), qlab.rtn("int4-g64")]
        >>> recipe = qlab.allocate(choices, bits=4, sensitivity=qlab.fisher)
        >>> qlab.apply("demo", recipe, data).bits_per_weight <= 4
        True
    """
    costs: dict[str, list[float]] = {}
    errors: dict[str, list[Tensor]] = {}  # of the segment at hand
    at_hand: list[str] = []

    def add(of: Any) -> None:
        graph = of.segment
        if at_hand != [of.path]:
            at_hand[:] = [of.path]
            errors.clear()
            errors.update(_errors(graph, specs))
        for site in _rounded_sites(graph):
            gradient = of.leaves.get(site.weight)
            squared = [0.0] * len(specs)
            if gradient is not None:
                g_ok = gradient.mT if site.layout.endswith("k o") else gradient
                squared = [
                    float((g_ok.square() * e).sum()) / 2 / model.count for e in errors[site.path]
                ]
            name = graph.where(site)
            before = costs.get(name, [0.0] * len(specs))
            costs[name] = [a + b for a, b in zip(before, squared)]

    model.vjp(model.nll, sink=add)
    return costs


def _rounded_sites(graph: ModuleGraph) -> list[Site]:
    return [site for site in graph.sites if not site.router]


def _errors(graph: ModuleGraph, specs: Sequence[Spec | None]) -> dict[str, list[Tensor]]:
    """Site -> the squared error [..., o, k] of every grid."""
    plain = _detached(graph)
    errors: dict[str, list[Tensor]] = {site.path: [] for site in _rounded_sites(graph)}
    for spec in specs:
        rounded = _rounded(plain, spec)
        for site in _rounded_sites(graph):
            difference = dense(rounded.leaf_ok(site), torch.float32) - plain.weight_ok(site)
            errors[site.path].append(difference.square())
    return errors


def _detached(graph: ModuleGraph) -> ModuleGraph:
    leaves = {name: t.detach() for name, t in graph.params.items() if isinstance(t, Tensor)}
    return graph.update(leaves)


def _rounded(graph: ModuleGraph, spec: Spec | None) -> ModuleGraph:
    """The selected weights of a segment rounded to nearest."""
    for stage in rtn(spec) if spec else ():
        graph, _ = apply(stage, graph, {})
    return graph


def kl_of_each(model: Any, specs: Sequence[Spec | None]) -> Costs:
    """The KL divergence from the model to itself with one group of weights rounded to nearest.

    The model runs once for each group and grid. What a group costs stands at its first weight, and
    0 at the others.

    Args:
        model: a `qlab.Model`.
        specs: the grids; None stands for a weight that stays.

    Returns:
        Full name of a weight -> its sensitivity for each grid.

    Example:
        >>> import qlab
        >>> data = qlab.tokens("demo", "my.jsonl", samples=1, length=16)
        >>> choices = [qlab.rtn("int3-g64"), qlab.rtn("int4-g64")]
        >>> recipe = qlab.allocate(choices, bits=4, sensitivity=qlab.kl_of_each)
        >>> qlab.apply("demo", recipe, data).bits_per_weight <= 4
        True
    """
    costs: dict[str, list[float]] = {}
    loss = model.kl_to(model)
    for path in model.segments:
        for sites in fused(model.segment(path)).values():
            of_group = [_kl_with(model, loss, path, sites, spec) for spec in specs]
            names = [f"{path}.{site.path}" for site in sites]
            costs |= {name: [0.0] * len(specs) for name in names} | {names[0]: of_group}
    return costs


def _kl_with(model: Any, loss: Any, path: str, sites: Sequence[Site], spec: Spec | None) -> float:
    """The mean divergence with these weights of one segment rounded."""
    if spec is None:
        return 0.0

    def changed(at_path: str, graph: ModuleGraph) -> ModuleGraph:
        if at_path != path:
            return graph
        rounded = _rounded(graph, spec)
        return graph.update({str(s.weight): rounded.params[str(s.weight)] for s in sites})

    return sum(model.losses(loss, changed=changed)) / model.count
