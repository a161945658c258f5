"""The statistics of what enters the sites of a segment, and of its other wires, over all batches.

Everything that observes is a function of the segment as it is now and of the statistics that are
wanted of it (`Observe`).
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from qlab.algebra.block import BLOCK_IO, SAMPLES, Samples
from qlab.algebra.called import called
from qlab.algebra.experts import Rows, reaching
from qlab.algebra.graph import ModuleGraph
from qlab.algebra.interpret import inputs_of, values_at
from qlab.algebra.received import received
from qlab.algebra.running import apply
from qlab.algebra.statistic import Observation, PerExpert
from qlab.algebra.stats import ATTENDING, COMPARING, JOINING, Need, Stats, name_of, stat_of
from qlab.algebra.stream import streams_joined
from qlab.algebra.transform import Stage, Transform
from qlab.algebra.wires import full_name
from qlab.driver.away import Away
from qlab.driver.batches import Batches
from qlab.errors import QlabError

DRIFT = COMPARING  # statistics that compare with the reference
Inputs = Literal["quantized", "reference"]  # what a block sees while it is calibrated
Key = tuple[str, Need]  # a source or the name of a wire, and a statistic
Observe = Callable[[ModuleGraph, set[Key]], Stats]
# reads the state of a statistic, of experts those that it is asked for
Get = Callable[[Callable[[int], bool]], Any]


def inputs_named(text: str) -> Inputs:
    """The mode of calibration of that name; refuses others."""
    if text not in get_args(Inputs):
        raise QlabError(
            f"inputs {text!r} are unknown; choose {' or '.join(map(repr, get_args(Inputs)))}"
        )
    return cast(Inputs, text)


def runs_reference(recipes: Iterable[Transform], inputs: Inputs) -> bool:
    """Whether the reference runs beside the quantized model, since a recipe asks how far inputs are
    from its own, or what leaves its blocks."""
    beside = DRIFT | {BLOCK_IO}
    return inputs == "quantized" and any(
        beside & stage.needs for recipe in recipes for stage in recipe
    )


@dataclass(frozen=True)
class Reference:
    """The unquantized segment, and the batches that enter it in the unquantized model.

    Its batches are those of the quantized model, in the same order.
    """

    graph: ModuleGraph
    batches: Batches


@dataclass(frozen=True)
class Division:
    """How a block is observed and solved: by this process alone, which sees all batches.

    size: how many batches a part has, over which statistics are summed (`Totals`). offload: the
    folder in which totals lie meanwhile; None for memory.
    """

    size: int = 1
    offload: str | Path | None = None

    def totals(self, graph: ModuleGraph, keys: set[Key], experts: slice | None = None) -> "Totals":
        """The statistics of a segment over no batches yet."""
        return Totals(graph, keys, experts, self.size, self.offload)

    def batches(self, count: int) -> Sequence[int]:
        """The numbers of the batches, of so many, that this process sees."""
        return range(count)

    def apply(self, stage: Stage, graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        """See `qlab.algebra.running.apply`."""
        return apply(stage, graph, stats)

    def taken(self, graph: ModuleGraph, key: Key, get: Get) -> Any:
        """A statistic of a segment that is kept somewhere, or None. get: reads it, or gives
        None."""
        return get(lambda expert: True)

    def keep(self, statistic: Any, put: Callable[[Any], object]) -> None:
        """Keep a statistic somewhere. put: writes its state."""
        put(statistic)

    def by_expert(self, key: Key, states: Sequence[Any]) -> Any:
        """The statistic of a source whose states of all experts are given."""
        return PerExpert(states)

    def of_experts(self, statistic: Any) -> Sequence[Any]:
        """The states of such a statistic."""
        return statistic.states


ALONE = Division()


def observe(
    graph: ModuleGraph,
    keys: set[Key],
    batches: Batches,
    calibrate_all_experts: bool = False,
    reference: Reference | None = None,
    division: Division = ALONE,
) -> Stats:
    """The statistics of a segment's inputs and other wires over all batches.

    Statistics of an expert are of the tokens that are routed to it, or, with
    `calibrate_all_experts`, of all tokens. The drift is measured from `reference` (None: the
    segment sees the reference's inputs, and there is no drift). Refuses NaN and Inf in activations
    by the names of the sites that they reach.
    """
    sources = sorted({source for source, _ in keys})
    drifting = sorted({source for source, need in keys if need in DRIFT})
    attending = sorted({source for source, need in keys if need in ATTENDING})
    totals = division.totals(graph, keys)
    reference_batches = reference.batches() if reference and drifting else repeat(None)
    joined = streams_joined(graph.code)
    joining = sorted({s for s, need in keys if need in JOINING and s in joined})
    ends = [(joined[source], None) for source in joining]
    for (call, state), reference_batch in zip(batches(), reference_batches):
        reference_rows: Mapping[str, Rows] = {}
        streams: Mapping[str, Tensor] = {}
        arguments = call.inputs(state)
        if reference and reference_batch:
            reference_call, reference_state = reference_batch
            others = reference_call.inputs(reference_state)
            reference_rows = inputs_of(reference.graph, drifting, *others)
            ours, theirs = (
                values_at(graph, ends, *arguments),
                values_at(reference.graph, ends, *others),
            )
            streams = {s: drift_of(r, other) for s, r, other in zip(joining, ours, theirs)}
        rows = inputs_of(graph, sources, *arguments, calibrate_all_experts)
        totals.add(rows, reference_rows, received(graph, attending, *arguments), streams)
    return totals.stats


def with_samples(observe: Observe, samples: Samples) -> Observe:
    """`observe`, which also hands out the samples of the block where they are asked for."""

    def observe_all(graph: ModuleGraph, keys: set[Key]) -> Stats:
        others = keys - {SAMPLES}
        stats = observe(graph, others) if others else {}
        return {**stats, SAMPLES: samples} if SAMPLES in keys else stats

    return observe_all


def observe_nothing(graph: ModuleGraph, keys: set[Key]) -> Stats:
    """What observes where there are no samples."""
    return {}


def remembering(graph: ModuleGraph, observe: Observe) -> Observe:
    """`observe`, which keeps what it saw of `graph` itself, so that several recipes share it."""
    seen: dict[Key, Any] = {}

    def observe_once(now: ModuleGraph, keys: set[Key]) -> Stats:
        if now.params is not graph.params or now.inserts != graph.inserts:
            return observe(now, keys)
        unseen = keys - seen.keys()
        if unseen:
            seen.update(observe(graph, unseen))
        return {key: seen[key] for key in keys}

    return observe_once


def drift_of(ours: Tensor, theirs: Tensor) -> Tensor:
    """The drift [n, o] of a value, the reference's less ours."""
    return theirs.flatten(0, -2).float() - ours.flatten(0, -2).float()


class Totals:
    """The statistics of a segment over the batches so far: sums over parts of them, each of which
    is summed from nothing, added in their order.

    Args:
        graph: The segment, which names sites and wires in errors.
        keys: The statistics.
        experts: The experts of which statistics are kept (None: all).
        size: How many batches a part has.
        offload: The folder in which totals lie when they are whole, and while parts of several
            batches are summed.
    """

    def __init__(
        self,
        graph: ModuleGraph,
        keys: set[Key],
        experts: slice | None = None,
        size: int = 1,
        offload: str | Path | None = None,
    ):
        self.graph, self.keys, self.experts, self.size = graph, keys, experts, size
        self.tokens = dict.fromkeys((source for source, _ in keys), 0)
        self.batches, self.offload = 0, offload
        self.totals: MutableMapping[Key, Any] = {}
        if offload is not None and size > 1:
            self.totals = Away(offload)
        # what is of one batch goes into the total as it is made
        self.part: MutableMapping[Key, Any] = {} if size > 1 else self.totals

    def add(
        self,
        inputs: Mapping[str, Rows],
        reference: Mapping[str, Rows],
        received: Mapping[str, Tensor],
        streams: Mapping[str, Tensor],
    ) -> None:
        """One batch: source or wire -> the rows that reach it, those that do in the reference, of
        the sources whose drift is measured, what attention they receive, and the drift of what
        their outputs are added to, where these are asked for."""
        for source, rows in inputs.items():
            observation = self._observation(source, rows, reference.get(source))
            received_n = received.get(source)
            if received_n is not None and len(received_n) == len(observation.x_nk):
                observation = replace(observation, received_n=received_n)
            stream_no = streams.get(source)
            if stream_no is not None and len(stream_no) == len(observation.x_nk):
                observation = replace(observation, stream_no=stream_no)
            needs = [need for of_source, need in self.keys if of_source == source]
            for need in sorted(needs, key=name_of):
                self._add((source, need), observation)
        self.batches += 1
        if self.batches % self.size == 0:
            self._end_part()

    @property
    def stats(self) -> dict[Key, Any]:
        """The statistics of all batches."""
        if self.batches % self.size:
            self._end_part()
        if self.offload is None:
            return dict(self.totals)
        away = self.totals
        if not isinstance(away, Away):
            away = Away(self.offload)
            away.update(self.totals)
        return {key: away.lying(key) for key in away}

    def _end_part(self) -> None:
        """Add the part to those before it."""
        while self.part is not self.totals and self.part:
            key, state = self.part.popitem()
            self._combine(self.totals, key, state)

    def _add(self, key: Key, observation: Observation) -> None:
        """Add a statistic of one batch to the part."""
        stat, what = stat_of(key[1], observation.ends is not None), self._what(key)
        if stat.grow is not None and key in self.part:
            self.part[key] = called(what, stat.grow, self.part[key], observation)
        else:
            # under no name here: a part may end while it would be held
            self._combine(self.part, key, called(what, stat.lift, observation))

    def _combine(self, states: MutableMapping[Key, Any], key: Key, state: Any) -> None:
        """Add a state to what is there, which is nobody else's."""
        stat, what = stat_of(key[1], isinstance(state, PerExpert)), f"{self._what(key)}, combined,"
        if stat.sums and isinstance(states, Away) and key in states:
            states.add(key, state)
            return
        earlier = states.get(key)
        if earlier is not None:
            state = called(what, stat.into or stat.combine, earlier, state)
        states[key] = state

    def _what(self, key: Key) -> str:
        """A statistic, as errors call it."""
        return f"{where(self.graph, key[0])}: the statistic {name_of(key[1])}"

    def _before(self, source: str, count: int) -> int:
        """How many tokens reached a source in the batches before one of `count` tokens."""
        before = self.tokens[source]
        self.tokens[source] += count
        return before

    def _observation(self, source: str, rows: Rows, reference: Rows | None) -> Observation:
        """The rows of one batch, with tokens numbered behind those of the batches before."""
        count = rows.x[..., 0].numel() if rows.tokens is None else int(rows.tokens.max()) + 1
        before = self._before(source, count)
        rows = rows if self.experts is None else reaching(rows, self.experts)
        x_nk = rows.x.flatten(0, -2)
        # the sum is the cheaper question
        if not x_nk.sum().isfinite() and not torch.isfinite(x_nk).all():
            _refuse_nonfinite(self.graph, source, x_nk.dtype)
        numbers = rows.tokens
        if numbers is None:
            numbers = torch.arange(len(x_nk), device=x_nk.device)
        reference_nk = None if reference is None else reference.x.flatten(0, -2)
        keys, segment = numbers + before, self.graph.path
        return Observation(x_nk, keys, rows.ends, reference_nk, segment=segment)


def _refuse_nonfinite(graph: ModuleGraph, source: str, dtype: torch.dtype) -> None:
    """Refuse NaN and Inf by the segment's leaves that hold them, or by the sites that they
    reach."""
    broken = [
        f"{graph.path}.{name}"
        for name, leaf in graph.params.items()
        if isinstance(leaf, Tensor) and not torch.isfinite(leaf).all()
    ]
    if broken:
        raise QlabError(f"{', '.join(broken)} holds NaN or Inf; repair the checkpoint")
    at = where(graph, source)
    raise QlabError(
        f"the activations that reach {at} hold NaN or Inf; check the model in this dtype ({dtype})"
    )


def where(graph: ModuleGraph, source: str) -> str:
    """The sites that a source feeds, or the wire of that name, in the model."""
    sites = [graph.where(s) for s in graph.code.sites if s.source == source]
    return ", ".join(sites) or full_name(graph.path, source)
