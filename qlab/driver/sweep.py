"""Quantizing is a scan over segments: load one, observe what the next stage needs, apply the stage,
push the carry on."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from qlab.algebra.experts import Rows, reaching
from qlab.algebra.graph import Code, ModuleGraph, Site, by_source
from qlab.algebra.interpret import Walk, inputs_of, outputs_of
from qlab.algebra.stats import STATS, Observation, PerExpert, Stats, stat_of
from qlab.algebra.transform import Stage, Transform, apply, select
from qlab.data.calibration import Data
from qlab.errors import QlabError
from qlab.model.recording import Call, State
from qlab.model.skeleton import Skeleton

BATCH_TOKENS = 2048
DRIFT = {"drift"}  # statistics that compare with the reference
HELD = (
    2 << 30
)  # bytes of values that may wait inside a segment while its sources are solved one by one
Batch = tuple[
    Call, State
]  # what a block is called with, and what other blocks made of it: its hidden states first
Inputs = Literal["quantized", "reference"]  # what a block sees while it is calibrated
Batches = Callable[[], Iterator[Batch]]
Check = Callable[
    [Stage, ModuleGraph, ModuleGraph], None
]  # a stage, and the segment before and after it


def inputs_named(text: str) -> Inputs:
    """One of the two; anything else is refused."""
    if text not in get_args(Inputs):
        raise QlabError(
            f"inputs {text!r} are unknown; choose {' or '.join(map(repr, get_args(Inputs)))}"
        )
    return cast(Inputs, text)


def in_batches(data: Data | None, batch_tokens: int = BATCH_TOKENS) -> list[Mapping[str, Tensor]]:
    """What the model is called with, about `batch_tokens` tokens at a time; without data, a few
    tokens that show the form."""
    return (
        data.batches(batch_tokens)
        if data is not None
        else [{"input_ids": torch.zeros(2, 8, dtype=torch.long)}]
    )


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


@dataclass(frozen=True)
class Reference:
    """The unquantized segment, and what it is called with in the unquantized model, batch by batch
    beside the quantized one's."""

    graph: ModuleGraph
    batches: Batches


def observe(
    graph: ModuleGraph,
    wanted: set[tuple[str, str]],
    batches: Iterator[Batch],
    calibrate_all_experts: bool = False,
    reference: Reference | None = None,
) -> Stats:
    """The statistics `wanted` {(source, name)} of a segment's inputs over all batches; experts' are
    of their own tokens, or, with `calibrate_all_experts`, of all tokens. reference: where the drift
    is measured from (None: there is none).

    Refuses NaN and Inf in activations, naming the sites they reach.
    """
    sources, drifting = (
        sorted({source for source, need in wanted if need in names}) for names in (STATS, DRIFT)
    )
    seen = _Seen(graph, wanted)
    others = reference.batches() if reference and drifting else repeat(None)
    for (call, state), other in zip(batches, others):
        pairs = (
            inputs_of(reference.graph, drifting, *other[0].inputs(other[1]))
            if reference and other
            else {}
        )
        seen.add(inputs_of(graph, sources, *call.inputs(state), calibrate_all_experts), pairs)
    return seen.stats


class _Seen:
    """Statistics as they grow, batch by batch; of experts, those of all or of some."""

    def __init__(
        self, graph: ModuleGraph, wanted: set[tuple[str, str]], experts: slice | None = None
    ):
        self.graph, self.wanted, self.experts = graph, wanted, experts
        self.tokens = dict.fromkeys((source for source, _ in wanted), 0)
        self.stats: dict[tuple[str, str], Any] = {}

    def add(self, inputs: Mapping[str, Rows], reference: Mapping[str, Rows] = {}) -> None:
        """One batch: source -> what reaches its sites, and what does in the reference where that is
        another model."""
        for source, rows in inputs.items():
            before = self.tokens[source]
            self.tokens[source] += (
                rows.x[..., 0].numel() if rows.tokens is None else int(rows.tokens.max()) + 1
            )
            rows = rows if self.experts is None else reaching(rows, self.experts)
            x_nk = rows.x.flatten(0, -2)
            if (
                not x_nk.sum().isfinite() and not torch.isfinite(x_nk).all()
            ):  # the sum is the cheaper question
                _refuse_nonfinite(self.graph, source, x_nk.dtype)
            numbers = (
                torch.arange(len(x_nk), device=x_nk.device) if rows.tokens is None else rows.tokens
            )
            pair = reference[source].x.flatten(0, -2) if source in reference else None
            observation = Observation(x_nk, numbers + before, rows.ends, pair)
            for name in sorted(n for s, n in self.wanted if s == source):
                stat, key = stat_of(name, rows.ends is not None), (source, name)
                state = stat.lift(observation)
                self.stats[key] = (
                    stat.combine(self.stats[key], state) if key in self.stats else state
                )


def _refuse_nonfinite(graph: ModuleGraph, source: str, dtype: torch.dtype) -> None:
    """Name what is to blame: the segment's own leaves where they hold NaN or Inf, else the sites
    that NaN or Inf reaches."""
    if bad := [
        n
        for n, leaf in graph.params.items()
        if isinstance(leaf, Tensor) and not torch.isfinite(leaf).all()
    ]:
        raise QlabError(
            f"{', '.join(f'{graph.path}.{n}' for n in bad)} holds NaN or Inf; repair the checkpoint"
        )
    at = ", ".join(graph.where(s) for s in graph.code.sites if s.source == source)
    raise QlabError(
        f"the activations that reach {at} hold NaN or Inf; check the model in this dtype ({dtype})"
    )


def push(graph: ModuleGraph, batches: Iterator[Batch]) -> Iterator[State]:
    """The states that leave the segment, batch by batch."""
    for call, state in batches:
        yield call.leaving(state, outputs_of(graph, *call.inputs(state)))


def runs_reference(recipes: Iterable[Transform], inputs: Inputs) -> bool:
    """Whether the reference runs beside the quantized model, since a recipe asks how far inputs are
    from its own."""
    return inputs == "quantized" and any(
        DRIFT & stage.needs for recipe in recipes for stage in recipe
    )


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
    seen, held = _Seen(graphs[0], wanted, experts), 0
    for arrived in zip(*(stream.to(graph, source) for stream, graph in zip(streams, graphs))):
        seen.add(*({source: rows} for _, rows in arrived))
        for walk, _ in arrived:
            held += walk.nbytes()
            if held > HELD:
                held -= walk.nbytes()
                walk.forget()
    return seen.stats


def record(
    skeleton: Skeleton, batches: Sequence[Mapping[str, Tensor]]
) -> tuple[list[State], list[dict[str, Call]]]:
    """The state that enters the first block, which is hidden states alone, and every block's calls,
    for each batch.

    Calls of later batches share the tensors that equal those of the first one (rotary tables,
    masks).
    """
    states: list[State] = []
    calls: list[dict[str, Call]] = []
    for batch in batches:
        h, call = skeleton.record(
            batch["input_ids"], {name: t for name, t in batch.items() if name != "input_ids"}
        )
        states.append((h,))
        calls.append(
            {path: _shared(c, calls[0][path] if calls else None) for path, c in call.items()}
        )
    return states, calls


def _shared(call: Call, earlier: Call | None) -> Call:
    if earlier is None or len(earlier.leaves) != len(call.leaves):
        return call
    leaves = tuple(
        old
        if isinstance(new, Tensor)
        and isinstance(old, Tensor)
        and new.shape == old.shape
        and torch.equal(new, old)
        else new
        for new, old in zip(call.leaves, earlier.leaves)
    )
    return replace(call, leaves=leaves)
