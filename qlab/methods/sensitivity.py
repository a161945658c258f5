"""What rounding a weight is expected to cost the network, for each of several grids.

Legend: W_ok a weight, Q_ok the same rounded, F its Fisher information, E [(d nll / d W)^2].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.bind import Foreseen, Outline
from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.leaf import dense
from qlab.algebra.running import apply
from qlab.algebra.spec import Spec
from qlab.methods.rtn import rtn

# full name of a weight -> what each grid costs; None stands for a weight that stays
Costs = Mapping[str, Sequence[float]]
Sensitivity = Callable[[Any, Sequence[Spec | None]], Costs]


def fused(graph: ModuleGraph) -> dict[str, list[Site]]:
    """The weights of a segment that engines fuse, by what they share: an input, or being
    experts."""
    groups: dict[str, list[Site]] = {}
    for site in graph.sites:
        if not site.router:
            groups.setdefault("experts" if site.route else site.source, []).append(site)
    return groups


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
    noted: dict[str, list[dict[str, list[float]]]] = {path: [] for path in model.segments}
    errors: dict[str, list[Tensor]] = {}  # of the segment at hand
    at_hand: list[str] = []

    def note(of: Any) -> None:
        graph = of.segment
        if at_hand != [of.path]:
            at_hand[:] = [of.path]
            errors.clear()
            errors.update(_errors(graph, specs))
        of_window = dict[str, list[float]]()
        for site in _rounded_sites(graph):
            gradient = of.leaves.get(site.weight)
            squared = [0.0] * len(specs)
            if gradient is not None:
                g_ok = gradient.mT if site.layout.endswith("k o") else gradient
                squared = [
                    float((g_ok.square() * e).sum()) / 2 / model.count for e in errors[site.path]
                ]
            of_window[graph.where(site)] = squared
        noted[of.path].append(of_window)

    model.vjp(model.nll, sink=note)
    costs: dict[str, list[float]] = {}
    for of_segment in noted.values():
        for of_window in model.of_all_windows(of_segment):
            for name, squared in of_window.items():
                before = costs.get(name, [0.0] * len(specs))
                costs[name] = [a + b for a, b in zip(before, squared)]
    return costs


def foreseen(sensitivity: Sensitivity, choices: int, outline: Outline) -> Foreseen | None:
    """What measuring a sensitivity will run; None of one's own. choices: the grids that round."""
    windows = outline.windows
    if sensitivity is fisher:
        return Foreseen(backward=windows, at_once=windows, in_a_pass=windows, copies=3 + choices)
    if sensitivity is kl_of_each:
        groups = sum(len(fused(graph)) for graph in outline.segments)
        return Foreseen(forward=windows * (1 + groups * choices), at_once=windows, kept=windows)
    return None


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
