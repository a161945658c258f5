"""All stages of a recipe on one segment: observe what the next stage needs, and apply it.

Sources of a segment are solved together (`solve`), or one after another in running order, each on
what the quantized ones before it produce (`solve_in_order`).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

from torch import Tensor

from qlab.algebra.block import BLOCK_IO, SAMPLES
from qlab.algebra.crossed import crosses
from qlab.algebra.experts import Rows
from qlab.algebra.graph import Code, ModuleGraph
from qlab.algebra.interpret import Walk
from qlab.algebra.received import next_is_attention, received, received_by
from qlab.algebra.running import keys_of, select
from qlab.algebra.stats import ATTENDING, JOINING, Stats
from qlab.algebra.stream import streams_joined
from qlab.algebra.transform import Stage, Transform
from qlab.algebra.views import Folded, Gauged, OnWires, Uncovered
from qlab.algebra.wires import stops
from qlab.driver.batches import Batches
from qlab.driver.observe import (
    ALONE,
    DRIFT,
    Division,
    Inputs,
    Key,
    Observe,
    Reference,
    drift_of,
    observe_nothing,
)
from qlab.errors import QlabError
from qlab.model.calls import State

# bytes of values that may wait inside a segment while its sources are solved one by one
HELD = 2 << 30
# takes a stage, and the segment before and after it; may refuse what the stage did
Check = Callable[[Stage, ModuleGraph, ModuleGraph], None]


def unchecked(stage: Stage, before: ModuleGraph, after: ModuleGraph) -> None:
    """The check of a block whose program was checked on another block."""


def solve(
    graph: ModuleGraph,
    transform: Transform,
    observe: Observe,
    check: Check = unchecked,
    later: Transform = (),
    division: Division = ALONE,
) -> tuple[ModuleGraph, Stats]:
    """All stages on one segment, and the statistics that are left.

    A statistic is observed right before the first stage that needs it. The drift is the exception:
    it compares channels with the reference's, so it is observed before any stage moves them. later:
    the stages that come behind these, for whom targets are kept.
    """
    drift = {key for stage in transform for key in _needed(stage, graph) if key[1] in DRIFT}
    stats: Stats = observe(graph, drift) if drift else {}
    for i, stage in enumerate(transform):
        missing = _needed(stage, graph) - stats.keys()
        if missing:
            stats = {**stats, **observe(graph, missing)}
        before = graph
        graph, stats = division.apply(stage, graph, stats)
        check(stage, before, graph)
        graph = _let_go(graph, (*transform[i + 1 :], *later))
    return graph, stats


def solve_beside(
    graph: ModuleGraph,
    reference: ModuleGraph,
    transform: Transform,
    observe: Observe,
    check: Check = unchecked,
    later: Transform = (),
    division: Division = ALONE,
) -> tuple[ModuleGraph, ModuleGraph]:
    """A segment, and the reference, behind stages that keep the function: each turns both by the
    statistics of the segment, and so by the same matrices."""
    stats: Stats = {}
    for i, stage in enumerate(transform):
        missing = _needed(stage, graph) - stats.keys()
        if missing:
            stats = {**stats, **observe(graph, missing)}
        before = graph
        reference, _ = division.apply(stage, reference, stats)
        graph, stats = division.apply(stage, graph, stats)
        check(stage, before, graph)
        graph = _let_go(graph, (*transform[i + 1 :], *later))
    return graph, reference


def _let_go(
    graph: ModuleGraph, later: Transform, waiting: Collection[str | None] = ()
) -> ModuleGraph:
    """The graph without the targets of weights that no later stage makes anew: each is as large as
    its weight. waiting: weights whose turn has not come, which have targets from a scan before."""
    makers = [stage for stage in later if not isinstance(stage.view, Folded | Uncovered)]
    sites = {site.weight: site for site in graph.code.sites}
    targets = {
        name: target
        for name, target in graph.targets.items()
        if name in waiting
        or any(stage.touches(graph.where(sites[name]), sites[name]) for stage in makers)
    }
    return replace(graph, targets=targets) if len(targets) < len(graph.targets) else graph


def _needed(stage: Stage, graph: ModuleGraph) -> set[Key]:
    """The statistics that a stage reads of what is selected, and the block's samples."""
    keys = keys_of(stage, graph)
    observed = {key for key in keys if key[1] != BLOCK_IO}
    return observed | ({SAMPLES} if len(observed) < len(keys) else set())


def solve_alone(weight: ModuleGraph, transform: Transform) -> ModuleGraph:
    """All stages on a weight by itself (`lone_weight`), without data.

    Refused if anything is left to happen at run time: of weights outside a block's program only
    codes are written.
    """
    solved, _ = solve(weight, transform, observe_nothing)
    if solved.inserts:
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

    A reparametrization needs all sources of its channels at once, and in a mixture these are
    several. What stands on a value that it folds across comes behind it, and in running order the
    value comes first. Sending every token to every expert (`calibrate_all_experts`) is no part of
    the model's own forward pass.
    """
    if inputs != "quantized" or calibrate_all_experts:
        return False
    return all(in_turn(stage, code, transform) for stage in transform)


def in_turn(stage: Stage, code: Code, transform: Transform) -> bool:
    """Whether a stage of a recipe can be solved source after source; see `in_order`."""
    if isinstance(stage.view, Folded):
        return not stage.needs
    if not isinstance(stage.view, Gauged) or not stage.view.site_by_site:
        return stage.view.site_by_site
    lone = all(site.source == site.origin for site in code.sites)
    on_values = [other.view.pattern for other in transform if isinstance(other.view, OnWires)]
    return lone and not any(crosses(code, pattern) for pattern in on_values)


def solve_in_order(
    graph: ModuleGraph,
    transform: Transform,
    batches: Batches,
    experts_at_once: int | None = None,
    reference: Reference | None = None,
    check: Check = unchecked,
    later: Transform = (),
    division: Division = ALONE,
) -> tuple[ModuleGraph, list[Iterator[State]]]:
    """All stages, source after source and wire after wire in running order, each on what the
    quantized sources before it produced; with the states that leave the solved segment, batch by
    batch, and after them those that leave the reference.

    One forward pass: it waits at each source until that is solved. Batches whose values would take
    more than HELD bytes together are not kept waiting, but run again from the start of the segment.
    Stages are site by site, or fold: those that fold come when all sources are solved, since what
    waits was computed with the leaves as they were. experts_at_once: of how many experts statistics
    are held at a time (None: of all); nothing that comes out depends on it. later: as of `solve`.
    """
    streams = [_Stream(graph.code, batches)]
    if reference:
        streams.append(_Stream(graph.code, reference.batches))
    inserting = [stage for stage in transform if stage.view.wires is not None]
    values = set().union(*(select(stage, graph).selected_wires or () for stage in inserting))
    waiting = {site.weight for site in graph.code.sites}
    for source, sites, open_to_all in stops(graph.code, values):
        waiting -= {site.weight for site in sites}
        stats: Stats = {}  # lets go of the source before
        # the site of an output too, which is none of those that are solved here
        selected = frozenset(wire.rpartition(":")[0] for wire in open_to_all)
        graph = replace(graph, selected=selected, selected_wires=open_to_all)
        here = transform if sites else inserting
        keys = set().union(*(_needed(stage, graph) for stage in here))
        observe = partial(
            _observe_waiting, source, streams=streams, reference=reference, division=division
        )
        if sites and sites[0].route and experts_at_once:
            experts = graph.params[sites[0].weight or ""].shape[0]
            stats = _in_parts(graph, keys, observe, experts, experts_at_once, division)
        else:
            stats = observe(graph, keys)
        for i, stage in enumerate(transform):
            if not sites and stage.view.wires is None:
                continue
            if stage.view.site_by_site:
                before = graph
                graph, stats = division.apply(stage, graph, stats)
                check(stage, before, graph)
                graph = _let_go(graph, (*transform[i + 1 :], *later), waiting)
    graph = walked = replace(graph, selected=None, selected_wires=None)
    for stage in transform:
        if not stage.view.site_by_site:
            before = graph
            graph, _ = division.apply(stage, graph, {})
            check(stage, before, graph)
    graphs = [walked, reference.graph] if reference else [walked]
    return graph, [stream.end(g) for stream, g in zip(streams, graphs)]


class _Stream:
    """The walks of all batches through a segment, side by side."""

    def __init__(self, code: Code, batches: Batches):
        self.batches = batches
        self.walks = [Walk(code) for _ in batches()]

    def to(self, graph: ModuleGraph, source: str) -> Iterator[tuple[Walk, Rows]]:
        """Every batch's walk, waiting at a source, and the rows that reach the source."""
        for walk, (call, state) in zip(self.walks, self.batches()):
            yield walk, walk.to(graph, source, *call.inputs(state))

    def end(self, graph: ModuleGraph) -> Iterator[State]:
        """The states that leave the segment."""
        for walk, (call, state) in zip(self.walks, self.batches()):
            yield call.leaving(state, walk.end(graph, *call.inputs(state)))


def _observe_waiting(
    source: str,
    graph: ModuleGraph,
    keys: set[Key],
    streams: Sequence[_Stream],
    reference: Reference | None,
    division: Division,
    experts: slice | None = None,
) -> Stats:
    """The statistics of one source, at which every walk waits then.

    streams: the segment's, and the reference's behind it, which is walked where the drift is asked
    for. experts: of which statistics are observed (None: of all).
    """
    if not keys:
        return {}
    totals, waiting = division.totals(graph, keys, experts), 0
    graphs = [graph]
    if reference and any(name in DRIFT for _, name in keys):
        graphs.append(reference.graph)
    arriving = [stream.to(g, source) for stream, g in zip(streams, graphs)]
    attending = any(name in ATTENDING for _, name in keys)
    joins = any(name in JOINING for _, name in keys)
    joined = streams_joined(graph.code).get(source) if joins else None
    # leaves of the reference stay, so that its walk may go on to the attention
    last, of_last = graphs[-1], streams[len(graphs) - 1]
    calls = of_last.batches() if attending else repeat(None)
    for of_batch, batch in zip(zip(*arriving), calls):
        rows, *reference_rows = [rows for _, rows in of_batch]
        of_reference = {source: reference_rows[0]} if reference_rows else {}
        joined_no: Mapping[str, Tensor] = {}
        if joined is not None and len(of_batch) > 1:
            ours, theirs = (walk.value(joined) for walk, _ in of_batch)
            joined_no = {source: drift_of(ours, theirs)}
        received_n: Mapping[str, Tensor] = {}
        if batch is not None:
            call, state = batch
            walk = of_batch[-1][0] if len(of_batch) > 1 else None
            received_n = _received(last, source, walk, *call.inputs(state))
        totals.add({source: rows}, of_reference, received_n, joined_no)
        for walk, _ in of_batch:
            waiting += walk.nbytes()
            if waiting > HELD:
                waiting -= walk.nbytes()
                walk.forget()
    return totals.stats


def _received(
    graph: ModuleGraph, source: str, walk: Walk | None, args: tuple, kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """What attention the tokens of a source receive. walk: one that waits there, and may go on."""
    if walk is None or not next_is_attention(graph.code, source):
        return received(graph, [source], args, kwargs)
    return received_by(graph.code, [source], lambda ends: walk.ahead(graph, ends, args, kwargs))


def _in_parts(
    graph: ModuleGraph,
    keys: set[Key],
    observe: Callable[..., Stats],
    experts: int,
    size: int,
    division: Division,
) -> Stats:
    """The statistics of all experts, of which `size` are held at a time."""

    def states(key: Key) -> Sequence[Any]:
        def part(experts: slice) -> Sequence[Any]:
            return division.of_experts(observe(graph, {key}, experts=experts)[key])

        return _InParts(part, experts, size)

    return {key: division.by_expert(key, states(key)) for key in keys}


class _InParts(Sequence):
    """One statistic of every expert, observed when it is asked for.

    Experts are observed `size` neighbours at a time, and the states of the last part are kept.
    """

    def __init__(self, observe: Callable[[slice], Sequence[Any]], experts: int, size: int):
        self.observe, self.experts, self.size = observe, experts, size
        self.first: int = 0
        self.states: Sequence[Any] = ()

    def __len__(self) -> int:
        return self.experts

    def __getitem__(self, expert: Any) -> Any:
        if not 0 <= expert < self.experts:
            raise IndexError(expert)
        if not self.first <= expert < self.first + len(self.states):
            self.states = ()  # lets go of the part before
            self.first = expert - expert % self.size
            part = slice(self.first, min(self.first + self.size, self.experts))
            self.states = self.observe(part)
        return self.states[expert - self.first]
