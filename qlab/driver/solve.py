"""Quantizing is a scan over segments: load one, observe what the next stage needs, apply the stage,
push the carry on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from qlab.algebra.experts import Rows
from qlab.algebra.graph import Code, ModuleGraph, Site, by_source
from qlab.algebra.interpret import Walk
from qlab.algebra.stats import PerExpert, Stats
from qlab.algebra.transform import Stage, Transform, apply, select
from qlab.driver.batches import Batches
from qlab.driver.observe import DRIFT, Inputs, Reference, Seen
from qlab.errors import QlabError
from qlab.model.calls import State

HELD = (
    2 << 30
)  # bytes of values that may wait inside a segment while its sources are solved one by one
Check = Callable[
    [Stage, ModuleGraph, ModuleGraph], None
]  # a stage, and the segment before and after it


def unchecked(stage: Stage, before: ModuleGraph, after: ModuleGraph) -> None:
    """What is said of a stage's work where its claims were checked on another block of the same
    program."""


def solve(
    graph: ModuleGraph,
    transform: Transform,
    observe: Callable[[ModuleGraph, set], Stats],
    check: Check = unchecked,
) -> tuple[ModuleGraph, Stats]:
    """All stages on one segment; statistics that a stage needs and nobody has yet are observed just
    before it, but the drift from the reference before all of them, while channels are still the
    reference's. check: sees every stage's work, and may refuse it."""

    def wants(stage: Stage) -> set[tuple[str, str]]:
        return {(s.source, need) for s in select(stage, graph).sites for need in stage.wants(s)}

    drift = {
        (source, need) for stage in transform for source, need in wants(stage) if need in DRIFT
    }
    stats: Stats = observe(graph, drift) if drift else {}
    for stage in transform:
        if missing := wants(stage) - stats.keys():
            stats = {**stats, **observe(graph, missing)}
        before = graph
        graph, stats = apply(stage, graph, stats)
        check(stage, before, graph)
    return graph, stats


def solve_alone(weight: ModuleGraph, transform: Transform) -> ModuleGraph:
    """All stages on a weight by itself (`lone_weight`), without data.

    Refused if anything is left to happen at run time: of weights outside a block's program only
    codes are written.
    """
    solved, _ = solve(weight, transform, lambda graph, wanted: {})
    if {**solved.online, **solved.online_outputs}:
        raise QlabError(
            f"{weight.code.sites[0].path} still needs an operation at run time, and of a weight "
            "that is rounded by itself only codes are written; leave quantize_inputs and the "
            "like away there"
        )
    return solved


def in_order(
    code: Code, transform: Transform, inputs: Inputs, calibrate_all_experts: bool = False
) -> bool:
    """Whether a recipe can be solved source after source, each on what the quantized ones before it
    produce.

    A reparametrization needs all sources of its channels at once, which mixtures have several of.
    Sending every token to every expert (`calibrate_all_experts`) is no part of the model's own
    forward pass.
    """
    lone = all(site.source == site.origin for site in code.sites)
    fit = all(
        (stage.lossless and not stage.needs)
        or (stage.sitewise and (lone or not stage.reparametrizes))
        for stage in transform
    )
    return inputs == "quantized" and not calibrate_all_experts and fit


def solve_in_order(
    graph: ModuleGraph,
    transform: Transform,
    batches: Batches,
    experts_at_once: int | None = None,
    reference: Reference | None = None,
    check: Check = unchecked,
) -> tuple[ModuleGraph, list[Iterator[State]]]:
    """All stages, source after source in running order, each on inputs that the quantized sources
    before it produced; with the hidden states that leave the solved segment, batch by batch, and
    after them those that leave the reference.

    One forward pass: it waits at each source until that is solved. Where the values of waiting
    batches are more than HELD bytes, the others are let go and computed again. Stages are sitewise,
    or lossless: those come when all sources are solved, since what waits was computed with the
    leaves as they were. experts_at_once: of how many experts statistics are held at a time (None:
    of all); nothing that comes out depends on it.
    """
    streams = [_Stream(graph.code, batches)] + (
        [_Stream(graph.code, reference.batches)] if reference else []
    )
    for source, sites in by_source(graph.code.sites).items():
        graph = replace(graph, selected=frozenset(site.path for site in sites))
        wanted = {
            (source, need)
            for stage in transform
            if select(stage, graph).sites
            for need in stage.wants(sites[0])
        }
        graphs = [graph, reference.graph] if reference and (source, "drift") in wanted else [graph]
        stats: Stats = {}
        if wanted and sites[0].route and experts_at_once:
            look = partial(_at, source, graphs, streams=streams)
            stats = {
                key: PerExpert(_InParts(key, look, _experts(graph, sites[0]), experts_at_once))
                for key in wanted
            }
        elif wanted:
            stats = _at(source, graphs, wanted, streams)
        for stage in transform:
            if stage.sitewise:
                before = graph
                graph, stats = apply(stage, graph, stats)
                check(stage, before, graph)
    graph = walked = replace(graph, selected=None)
    for stage in transform:
        if not stage.sitewise:
            before = graph
            graph, _ = apply(stage, graph, {})
            check(stage, before, graph)
    graphs = [walked, reference.graph] if reference else [walked]
    return graph, [stream.end(g) for stream, g in zip(streams, graphs)]


class _Stream:
    """The walks of all batches through a segment, side by side."""

    def __init__(self, code: Code, batches: Batches):
        self.batches = batches
        self.walks = [Walk(code) for _ in batches()]

    def to(self, graph: ModuleGraph, source: str) -> Iterator[tuple[Walk, Rows]]:
        """Every batch's walk, waiting at a source, and what reaches that."""
        for walk, (call, state) in zip(self.walks, self.batches()):
            yield walk, walk.to(graph, source, *call.inputs(state))

    def end(self, graph: ModuleGraph) -> Iterator[State]:
        """The states that leave the segment."""
        for walk, (call, state) in zip(self.walks, self.batches()):
            yield call.leaving(state, walk.end(graph, *call.inputs(state)))


def _experts(graph: ModuleGraph, site: Site) -> int:
    return graph.params[site.weight or ""].shape[0]


class _InParts(Sequence):
    """One statistic of every expert, observed when it is asked for: of `size` neighbours at a time,
    of which the last are held."""

    def __init__(self, key: tuple[str, str], look: Callable[..., Stats], experts: int, size: int):
        self.key, self.look, self.experts, self.size = key, look, experts, size
        self.first, self.held = 0, ()

    def __len__(self) -> int:
        return self.experts

    def __getitem__(self, expert: Any) -> Any:
        if not 0 <= expert < self.experts:
            raise IndexError(expert)
        if not self.held or not self.first <= expert < self.first + self.size:
            self.first, self.held = expert - expert % self.size, ()
            part = slice(self.first, min(self.first + self.size, self.experts))
            self.held = self.look(wanted={self.key}, experts=part)[self.key].states
        return self.held[expert - self.first]


def _at(
    source: str,
    graphs: Sequence[ModuleGraph],
    wanted: set,
    streams: Sequence[_Stream],
    experts: slice | None = None,
) -> Stats:
    """The statistics `wanted` of one source, with every walk waiting there; of experts, those of
    all or of some. graphs: the segment, and the reference's where that is looked at too."""
    seen, held = Seen(graphs[0], wanted, experts), 0
    for arrived in zip(*(stream.to(graph, source) for stream, graph in zip(streams, graphs))):
        seen.add(*({source: rows} for _, rows in arrived))
        for walk, _ in arrived:
            held += walk.nbytes()
            if held > HELD:
                held -= walk.nbytes()
                walk.forget()
    return seen.stats
