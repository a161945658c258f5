"""What is demanded of every step, whoever wrote it.

A step returns new values and writes to none that it was given: other steps, and other recipes of
one comparison, go on with those. It changes leaves, statistics and what happens to inputs at run
time, and nothing else: equal blocks share their program, and files have no place for other leaves.
A site-wise step sees the numbers of its own weights alone.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.qtensor import Leaf, QTensor
from qlab.algebra.spec import Spec, same_grid
from qlab.algebra.stats import Stats
from qlab.errors import QlabError


class Observed(dict):
    """Statistics as a step is given them; a missing one is an error by its name."""

    def __init__(self, stats: Stats, step: str, graph: ModuleGraph):
        super().__init__(stats)
        self.step, self.graph = step, graph

    def __missing__(self, key: Any) -> Any:
        source, need = key if isinstance(key, tuple) and len(key) == 2 else (None, key)
        sites = [self.graph.where(s) for s in self.graph.code.sites if s.source == source]
        if not sites:
            raise KeyError(key)
        raise QlabError(
            f"the stage {self.step!r} asks for the statistic {need!r} of "
            f"{', '.join(sites)}, which was not observed for it; name it in `needs`, "
            "and ask for the sites of `graph.sites` alone"
        )


# ------------------------------------------------------------------ nothing is written to
class Seal:
    """The leaves, statistics and online operations that a step is given, as they were."""

    def __init__(self, graph: ModuleGraph, stats: Stats):
        self.values = dict(_values(graph, stats))
        self.marks = {name: _marks(value) for name, value in self.values.items()}

    def broken(self, graph: ModuleGraph, stats: Stats) -> str | None:
        """The first of them that is another by now, or None."""
        now = dict(_values(graph, stats))
        for name in {**self.values, **now}:
            kept = name in self.values and now.get(name) is self.values[name]
            if not kept or _marks(now[name]) != self.marks[name]:
                return name
        return None


def _values(graph: ModuleGraph, stats: Stats) -> Iterator[tuple[str, Any]]:
    for name, leaf in graph.params.items():
        yield f"{graph.path}.{name}", leaf
    for path, ops in graph.online.items():
        for i, op in enumerate(ops):
            for part, value in getattr(op, "__dict__", {}).items():
                yield f"{part} of operation {i} at the input of {graph.path}.{path}", value
    sites = {site.source: graph.where(site) for site in reversed(graph.code.sites)}
    for (source, need), state in stats.items():
        yield f"the statistic {need!r} of {sites.get(source, source)}", state


def _marks(value: Any) -> list[tuple[int, int]]:
    """What shows that tensors were written to. Those that a step was not shown have no numbers."""
    return [(_version(t), _sum_of_bits(t)) for t in _tensors(value) if not t.is_meta]


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _sum_of_bits(t: Tensor) -> int:
    """Changes when a tensor is written to behind autograd's back (`.data`, `.numpy()`), which its
    version does not show. As fast as memory."""
    raw = t.detach().contiguous().flatten().view(torch.uint8)
    first = -raw.storage_offset() % 8
    last = first + (len(raw) - first) // 8 * 8
    if last <= first:
        return int(raw.sum())
    whole = int(raw[first:last].view(torch.int64).sum())
    return whole + int(raw[:first].sum()) + int(raw[last:].sum())


# ------------------------------------------------------------------ nothing else is changed
def shown(graph: ModuleGraph, upstream: bool) -> ModuleGraph:
    """The graph as a site-wise step sees it: without the numbers of other sites' weights.

    upstream: those that run before its own are shown, as to a step that scales their rows.
    """
    own = {site.weight for site in graph.sites}
    hidden = {site.weight for site in graph.code.sites if site.weight} - own
    if upstream:
        last = max((i for i, s in enumerate(graph.code.sites) if s.weight in own), default=-1)
        hidden &= {site.weight for site in graph.code.sites[last + 1 :]}
    if not hidden:
        return graph
    return graph.update({weight: _on_meta(graph.params[weight]) for weight in sorted(hidden)})


def _on_meta(leaf: Leaf) -> Leaf:
    return pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), leaf)


def restored(new: ModuleGraph, seen: ModuleGraph, graph: ModuleGraph) -> ModuleGraph:
    """What a step made of `seen`, with the numbers of `graph` for what it was not shown."""
    if new.params is seen.params:
        return replace(new, params=graph.params)
    left_alone = [name for name, leaf in new.params.items() if leaf is seen.params[name]]
    return new.update({name: graph.params[name] for name in left_alone})


def refuse_others(
    step: str, spec: Spec | None, sitewise: bool, graph: ModuleGraph, new: ModuleGraph
) -> None:
    """Refuse what a step may not have made of the graph, by the name of the leaf or site."""
    if not isinstance(new, ModuleGraph):
        found = type(new).__name__
        raise QlabError(f"the stage {step!r} returned a {found}; return (graph, stats)")
    if new.code is not graph.code:
        raise QlabError(
            f"the stage {step!r} changes the program of {graph.path}, which equal "
            "blocks share; change leaves, or put operations on inputs (graph.online)"
        )
    if foreign := sorted(new.params.keys() ^ graph.params.keys()):
        done = "adds" if foreign[0] in new.params else "drops"
        raise QlabError(
            f"the stage {step!r} {done} the leaf {graph.path}.{foreign[0]}; files hold "
            "the leaves of a block's program, no more and no fewer"
        )
    paths = [site.path for site in graph.code.sites]
    if foreign := sorted({*new.online, *new.online_outputs} - {*paths}):
        raise QlabError(
            f"the stage {step!r} puts an operation on {foreign[0]!r}, which is no site "
            f"of {graph.path}; its sites are {', '.join(paths)}"
        )
    sites = {site.weight: site for site in graph.code.sites}
    changed = [name for name, leaf in new.params.items() if leaf is not graph.params[name]]
    for name in changed:
        reason = _misfit(new.params[name], graph.params[name], sites.get(name), spec)
        if reason:
            raise QlabError(f"the stage {step!r} made {graph.path}.{name} {reason}")
    left = [s for s in graph.sites if spec and not isinstance(new.params[s.weight or ""], QTensor)]
    if left:
        raise QlabError(
            f"the stage {step!r} left {graph.where(left[0])} as it was and is to round it "
            f"to {spec}, which is what was planned; round it, or narrow the stage by at()"
        )
    if sitewise:
        _refuse_elsewhere(step, changed, graph, new)


def _misfit(leaf: Any, before: Leaf, site: Site | None, spec: Spec | None) -> str | None:
    """Why a leaf cannot take the place of the one before, or None."""
    if not isinstance(leaf, Tensor | QTensor):
        return f"a {type(leaf).__name__}, which no file holds; make it a tensor or a QTensor"
    wanted, planned = before.shape, before.spec if isinstance(before, QTensor) else spec
    rounded_here = isinstance(leaf, QTensor) != isinstance(before, QTensor)
    if site is not None and site.layout.endswith("k o") and rounded_here:
        wanted = torch.Size([*wanted[:-2], wanted[-1], wanted[-2]])  # codes are always [o, k]
    if leaf.shape != wanted:
        return f"{tuple(leaf.shape)}, and its program has {tuple(wanted)}; keep its shape"
    if not isinstance(leaf, QTensor):
        return None
    if site is None:
        return f"{leaf.spec}, and readers look for codes in linears alone; leave it dense"
    if planned and same_grid(leaf.spec, planned):
        return None
    said = f"to round to {planned}" if planned else "to round nothing"
    return f"{leaf.spec} and was {said}; give the stage that spec, for plans to ask about"


def _refuse_elsewhere(step: str, changed: list[str], graph: ModuleGraph, new: ModuleGraph) -> None:
    """Refuse what a site-wise step did outside the sites that it was given."""
    own = {name for site in graph.sites for name in (site.weight, site.bias) if name}
    paths = {site.path for site in graph.sites}
    moved = [name for name in changed if name not in own]
    held = ((graph.online, new.online), (graph.online_outputs, new.online_outputs))
    for before, after in held:
        others = [path for path in {**before, **after} if path not in paths]
        moved += [path for path in others if before.get(path) != after.get(path)]
    if moved:
        sites = ", ".join(map(graph.where, graph.sites))
        raise QlabError(
            f"the stage {step!r} is sitewise and changes {graph.path}.{moved[0]} "
            f"beside {sites}; change those of `graph.sites` alone, or do not call it "
            "sitewise"
        )
    blind = [name for name in changed if any(t.is_meta for t in _tensors(new.params[name]))]
    if blind:
        raise QlabError(reads_elsewhere(step, f"{graph.path}.{blind[0]}"))


def reads_elsewhere(step: str, where: str) -> str:
    """What is said of a site-wise step that reads numbers that it is not shown."""
    return (
        f"the stage {step!r} is sitewise and makes {where} depend on weights of other sites; "
        "read those of `graph.sites` alone, or do not call it sitewise"
    )
