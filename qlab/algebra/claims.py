"""What every step has to keep to, whoever wrote it.

A step returns new values and writes to none that it was given, since other steps, and other recipes
of one comparison, go on with those. It changes leaves, statistics and operations at run time, and
nothing else: equal blocks share their program, and files have no place for other leaves. A step
whose view is one input at a time sees the numbers of that input's weights alone.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.leaf import is_leaf, proper
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Spec, same_grid
from qlab.algebra.stats import Stats, name_of
from qlab.algebra.views import OnWires, View
from qlab.algebra.wires import full_name, nearest, wires
from qlab.errors import QlabError


class Observed(dict):
    """Statistics as a step gets them. A missing one is an error that names it."""

    def __init__(self, stats: Stats, step: str, graph: ModuleGraph):
        super().__init__(stats)
        self.step, self.graph = step, graph

    def __missing__(self, key: Any) -> Any:
        source, need = key if isinstance(key, tuple) and len(key) == 2 else (None, key)
        sites = [self.graph.where(s) for s in self.graph.code.sites if s.source == source]
        if not isinstance(source, str):
            raise KeyError(key)
        asks = f"the stage {self.step!r} asks for the statistic {name_of(need)!r} of"
        there = wires(self.graph.code)
        if not sites and source not in there:
            raise QlabError(
                f"{asks} {source!r}, which is no wire of {self.graph.path}; "
                f"{nearest(source, there)}"
            )
        raise QlabError(
            f"{asks} {', '.join(sites) or full_name(self.graph.path, source)}, which was not "
            "observed for it; name it in `needs`, and ask for the sites of `graph.sites` alone"
        )


# ------------------------------------------------------------------ nothing is written to
class Seal:
    """The leaves, statistics and online operations that a step is given, as they were before it."""

    def __init__(self, graph: ModuleGraph, stats: Stats):
        self.values = dict(_values(graph, stats))
        self.marks = {name: _marks(value) for name, value in self.values.items()}

    def broken(self, graph: ModuleGraph, stats: Stats) -> str | None:
        """The name of the first value that was replaced or written to, or None."""
        now = dict(_values(graph, stats))
        for name in {**self.values, **now}:
            kept = name in self.values and now.get(name) is self.values[name]
            if not kept or _marks(now[name]) != self.marks[name]:
                return name
        return None


def _values(graph: ModuleGraph, stats: Stats) -> Iterator[tuple[str, Any]]:
    for name, leaf in graph.params.items():
        yield f"{graph.path}.{name}", leaf
    for name, target in graph.targets.items():
        yield f"the target of {graph.path}.{name}", target
    for name, support in graph.supports.items():
        yield f"the support of {graph.path}.{name}", support
    for path, ops in graph.online.items():
        for i, op in enumerate(ops):
            for part, value in getattr(op, "__dict__", {}).items():
                yield f"{part} of operation {i} at the input of {graph.path}.{path}", value
    for wire, ops in {**graph.online_outputs, **graph.online_values}.items():
        for i, op in enumerate(ops):
            for part, value in getattr(op, "__dict__", {}).items():
                yield f"{part} of operation {i} at {graph.path}.{wire}", value
    sites = {site.source: graph.where(site) for site in reversed(graph.code.sites)}
    for (source, need), state in stats.items():
        yield f"the statistic {name_of(need)!r} of {sites.get(source, source)}", state


def _marks(value: Any) -> list[tuple[int, int]]:
    """Numbers that change when a tensor is written to. Tensors that are hidden from a step have
    none."""
    return [(_version(t), _sum_of_bits(t)) for t in _tensors(value) if not t.is_meta]


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _sum_of_bits(t: Tensor) -> int:
    """A number that also changes when a tensor is written to through `.data` or `.numpy()`, of
    which its version knows nothing. It is computed as fast as memory is read."""
    raw = t.detach().contiguous().flatten().view(torch.uint8)
    first = -raw.storage_offset() % 8
    last = first + (len(raw) - first) // 8 * 8
    if last <= first:
        return int(raw.sum())
    whole = int(raw[first:last].view(torch.int64).sum())
    return whole + int(raw[:first].sum()) + int(raw[last:].sum())


# ------------------------------------------------------------------ nothing else is changed
def shown(graph: ModuleGraph, upstream: bool) -> ModuleGraph:
    """The graph as a step site by site sees it: weights of other sites are hidden, as meta tensors.

    upstream: weights that run before the selected sites stay visible, for a step that scales the
    rows of those.
    """
    visible = {site.weight for site in graph.sites}
    hidden = {site.weight for site in graph.code.sites if site.weight} - visible
    if upstream:
        places = [i for i, site in enumerate(graph.code.sites) if site.weight in visible]
        behind = graph.code.sites[max(places, default=-1) + 1 :]
        hidden &= {site.weight for site in behind}
    return hiding(graph, hidden)


def hiding(graph: ModuleGraph, hidden: Collection[str | None]) -> ModuleGraph:
    """The graph in which these weights are meta tensors."""
    if not hidden:
        return graph
    leaves = {name: _on_meta(graph.params[name]) for name in sorted(filter(None, hidden))}
    return replace(
        graph,
        params={**graph.params, **leaves},
        targets=_without(graph.targets, hidden),
        supports=_without(graph.supports, hidden),
    )


def hides(graph: ModuleGraph) -> bool:
    """Whether weights of the graph are hidden."""
    leaves = pytree.tree_leaves([graph.params[s.weight] for s in graph.code.sites if s.weight])
    return any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves)


def _without(by_name: Mapping[str, Tensor], hidden: Collection[str | None]) -> Mapping[str, Tensor]:
    return {name: t for name, t in by_name.items() if name not in hidden}


def _on_meta(leaf: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), leaf)


def restored(new: ModuleGraph, seen: ModuleGraph, graph: ModuleGraph) -> ModuleGraph:
    """What a step made of `seen`, with the leaves of `graph` where it left them alone."""
    if seen is graph:
        return new
    left_alone = [name for name, leaf in new.params.items() if leaf is seen.params[name]]
    return replace(
        new,
        params={**new.params, **{name: graph.params[name] for name in left_alone}},
        targets={**new.targets, **_without(graph.targets, seen.targets)},
        supports={**new.supports, **_without(graph.supports, seen.supports)},
    )


def with_targets(new: ModuleGraph, before: ModuleGraph) -> ModuleGraph:
    """A new graph whose step replaced leaves and said nothing of their targets, with those that
    `ModuleGraph.update` gives them."""
    if new.targets is not before.targets:
        return new
    changed = {name: leaf for name, leaf in new.params.items() if leaf is not before.params[name]}
    return replace(new, targets=before.update(changed).targets) if changed else new


def refuse_others(
    step: str, spec: Spec | None, view: View, graph: ModuleGraph, new: ModuleGraph
) -> None:
    """Refuse a new graph that differs from the graph in more than the step may change. The error
    names the leaf or site."""
    if not isinstance(new, ModuleGraph):
        raise QlabError(
            f"the stage {step!r} returned a {type(new).__name__}; return (graph, stats)"
        )
    _refuse_structure(step, graph, new)
    sites = {site.weight: site for site in graph.code.sites}
    changed = [name for name, leaf in new.params.items() if leaf is not graph.params[name]]
    for name in changed:
        reason = _misfit(new.params[name], graph.params[name], sites.get(name), spec)
        if reason:
            raise QlabError(f"the stage {step!r} made {graph.path}.{name} {reason}")
    _refuse_cells(step, graph, new)
    if spec:
        _refuse_unrounded(step, spec, graph, new)
    if view.site_by_site:
        _refuse_elsewhere(step, view, changed, graph, new)


def _refuse_structure(step: str, graph: ModuleGraph, new: ModuleGraph) -> None:
    """Refuse another program, other leaves, and operations on what is no site."""
    if new.code is not graph.code:
        raise QlabError(
            f"the stage {step!r} changes the program of {graph.path}, which equal "
            "blocks share; change leaves, or put operations on inputs (graph.online)"
        )
    other_leaves = sorted(new.params.keys() ^ graph.params.keys())
    if other_leaves:
        verb = "adds" if other_leaves[0] in new.params else "drops"
        raise QlabError(
            f"the stage {step!r} {verb} the leaf {graph.path}.{other_leaves[0]}; files hold "
            "the leaves of a block's program, no more and no fewer"
        )
    paths = [site.path for site in graph.code.sites]
    elsewhere = sorted({*new.online, *new.online_outputs} - {*paths})
    if elsewhere:
        raise QlabError(
            f"the stage {step!r} puts an operation on {elsewhere[0]!r}, which is no site "
            f"of {graph.path}; its sites are {', '.join(paths)}"
        )
    no_wire = sorted(new.online_values.keys() - wires(graph.code).keys())
    if no_wire:
        raise QlabError(
            f"the stage {step!r} puts an operation on {no_wire[0]!r}, which is no wire of "
            f"{graph.path}; {nearest(no_wire[0], wires(graph.code))}"
        )


def _refuse_cells(step: str, graph: ModuleGraph, new: ModuleGraph) -> None:
    """Refuse a target or a support of what is no site."""
    known = {site.weight for site in graph.code.sites}
    for what, by_name in (("target", new.targets), ("support", new.supports)):
        unknown = sorted(by_name.keys() - known)
        if unknown:
            raise QlabError(
                f"the stage {step!r} gives a {what} to {graph.path}.{unknown[0]}, which is the "
                "weight of no site; give one to weights of `graph.sites` alone"
            )


def _refuse_unrounded(step: str, spec: Spec, graph: ModuleGraph, new: ModuleGraph) -> None:
    """Refuse selected sites that are still dense after a step that rounds."""
    for site in graph.sites:
        if not isinstance(proper(new.params[site.weight or ""]), QTensor):
            raise QlabError(
                f"the stage {step!r} left {graph.where(site)} as it was and is to round it "
                f"to {spec}, which is what was planned; round it, or narrow the stage by at()"
            )


def _misfit(leaf: Any, before: Any, site: Site | None, spec: Spec | None) -> str | None:
    """Why a leaf cannot take the place of the one before, or None. spec: of the step."""
    if not is_leaf(leaf):
        return f"a {type(leaf).__name__}, which no file holds; make it a tensor or a QTensor"
    shape = before.shape
    newly_rounded = isinstance(leaf, Tensor) != isinstance(before, Tensor)
    if site is not None and site.layout.endswith("k o") and newly_rounded:
        # every leaf but a tensor is [o, k] in every layout
        shape = torch.Size([*shape[:-2], shape[-1], shape[-2]])
    if leaf.shape != shape:
        return f"{tuple(leaf.shape)}, and its program has {tuple(shape)}; keep its shape"
    if isinstance(leaf, Tensor):
        return None
    codes, codes_before = proper(leaf), proper(before)
    what = codes.spec if isinstance(codes, QTensor) else f"a {type(leaf).__name__}"
    if site is None:
        return f"{what}, and readers look for codes in linears alone; leave it dense"
    if not isinstance(codes, QTensor):
        return None
    planned = codes_before.spec if isinstance(codes_before, QTensor) else spec
    if planned and same_grid(codes.spec, planned):
        return None
    plan = f"to round to {planned}" if planned else "to round nothing"
    return f"{codes.spec} and was {plan}; give the stage that spec, for plans to ask about"


def _refuse_elsewhere(
    step: str, view: View, changed: list[str], graph: ModuleGraph, new: ModuleGraph
) -> None:
    """Refuse a step site by site that changed or read other sites than its own. changed: the leaves
    that it replaced."""
    weights = () if isinstance(view, OnWires) else graph.sites
    allowed = {name for site in weights for name in (site.weight, site.bias) if name}
    paths = {site.path for site in graph.sites}
    elsewhere = [name for name in changed if name not in allowed]
    operations = (
        (graph.online, new.online),
        (graph.online_outputs, new.online_outputs),
    )
    for before, after in operations:
        others = [path for path in {**before, **after} if path not in paths]
        elsewhere += [path for path in others if before.get(path) != after.get(path)]
    values, open_to_it = (graph.online_values, new.online_values), graph.selected_wires or ()
    others = [name for name in {**values[0], **values[1]} if name not in open_to_it]
    elsewhere += [name for name in others if values[0].get(name) != values[1].get(name)]
    if elsewhere:
        sites = ", ".join(map(graph.where, graph.sites))
        raise QlabError(
            f"the stage {step!r} is sitewise and changes {graph.path}.{elsewhere[0]} "
            f"beside {sites}; change those of `graph.sites` alone, or give it a view of the "
            "whole segment"
        )
    # A leaf that was computed from hidden weights is a meta tensor as well.
    unknown = [name for name in changed if any(t.is_meta for t in _tensors(new.params[name]))]
    if unknown:
        raise QlabError(reads_elsewhere(step, f"{graph.path}.{unknown[0]}"))


def reads_elsewhere(step: str, where: str) -> str:
    """The error of a step site by site that reads weights which are hidden from it."""
    return (
        f"the stage {step!r} is sitewise and makes {where} depend on weights of other sites; "
        "read those of `graph.sites` alone, or give it a view of the whole segment"
    )
