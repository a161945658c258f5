"""One block that several ranks observe and solve together.

Each rank observes its own batches. The sums over parts of the batches go to one owner of each input
(or wire), which adds them in the order of the parts and gives the total to the ranks that own sites
there. Each site is solved by its one owner, and each routed expert by one too; what a step changed
is told to all. A step that sees more than one weight is run by rank 0.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from qlab.algebra.block import SAMPLES
from qlab.algebra.claims import hiding
from qlab.algebra.graph import ModuleGraph
from qlab.algebra.qtensor import QTensor
from qlab.algebra.running import apply, keys_of, select
from qlab.algebra.statistic import PerExpert, here
from qlab.algebra.stats import Stats
from qlab.algebra.transform import Stage, Transform, unchanged
from qlab.algebra.views import Gauged, Uncovered, WholeBlock
from qlab.driver.away import Away
from qlab.driver.changes import changed, made_by, named
from qlab.driver.learning import Leading
from qlab.driver.observe import Division, Get, Key, Totals, where
from qlab.driver.owners import BY_EXPERT, expert_owner, is_divided, owners_of, read_by, turns
from qlab.driver.parts import Parts
from qlab.driver.ranks import Ranks
from qlab.driver.sharded import gathered, shape_of
from qlab.driver.sharing import Sharing, learners, see_reference
from qlab.errors import QlabError


@dataclass(frozen=True)
class At:
    """A statistic that some ranks have. ranks: their numbers, or BY_EXPERT alone. state: where this
    is one of them, in memory or in a file; of experts, with None for those of others."""

    ranks: frozenset[int]
    state: Any = None


class Divided(Division):
    """A block among ranks.

    Args:
        ranks: All of them.
        stages: The steps, which say where statistics are read.
        graph: The block.
        tokens: Of each batch.
        one_by_one: Whether its inputs are solved one after another, so that only sites of one input
            are solved at a time.
        offload: See `Division`.
        is_sharded: Whether each rank has some rows of the weights alone.
        ready: Makes the batches that enter it, where they are not there yet.
    """

    def __init__(
        self,
        ranks: Ranks,
        stages: Transform,
        graph: ModuleGraph,
        tokens: Sequence[int],
        one_by_one: bool,
        offload: str | Path | None = None,
        is_sharded: bool = False,
        ready: Callable[[], None] = lambda: None,
    ):
        self.ready = ready
        self.parts, self.is_sharded = Parts(len(tokens)), is_sharded
        super().__init__(self.parts.size, offload)
        self.ranks, self.stages, self.tokens = ranks, stages, tokens
        shapes = {site: shape_of(graph, site) for site in graph.code.sites}
        self.owners = owners_of(graph.code, shapes, ranks.world, one_by_one, _fused(stages))

    # -------------------------------------------------------------- statistics
    def totals(self, graph: ModuleGraph, keys: set[Key], experts: slice | None = None) -> Totals:
        self.ready()
        return _Totals(self, graph, keys, experts)

    def batches(self, count: int) -> Sequence[int]:
        return self.parts.numbers(self.ranks.rank, self.ranks.world)

    def taken(self, graph: ModuleGraph, key: Key, get: Get) -> At | None:
        readers = read_by(self.stages, key, graph, self.owners)
        by_expert, rank = readers == [BY_EXPERT], self.ranks.rank
        reads = by_expert or rank in readers
        state = get(lambda e: not by_expert or self.expert_of(e) == rank) if reads else None
        if not all(self.ranks.all_told(not reads or state is not None)):
            return None
        if isinstance(state, PerExpert) and by_expert:
            return self.by_expert(key, state.states)
        return At(frozenset(readers), state)

    def keep(self, statistic: At, put: Callable[[Any], object]) -> None:
        if BY_EXPERT not in statistic.ranks:
            if self.ranks.rank == min(statistic.ranks):
                put(statistic.state)
            return
        states = _OneByOne(self, statistic.state.states)
        if self.ranks.is_first:
            put(PerExpert(states))
        else:
            deque(states, maxlen=0)

    def by_expert(self, key: Key, states: Sequence[Any]) -> At:
        return At(frozenset({BY_EXPERT}), PerExpert(states, self._each))

    def of_experts(self, statistic: At) -> Sequence[Any]:
        return statistic.state.states

    def expert_of(self, expert: int) -> int:
        """The rank that owns an expert."""
        return expert_owner(expert, self.ranks.world)

    def _each(
        self, given: Callable[[int], Any], run: Callable[[int, Any], Any], count: int
    ) -> list[Any]:
        """As `qlab.algebra.statistic.in_turn`, each expert by its owner."""
        own: dict[int, Any] = {}
        for e in range(count):
            known = given(e)  # every rank takes part where it is observed only now
            if self.expert_of(e) == self.ranks.rank:
                own[e] = run(e, known)
            del known
        solved = dict[int, Any]()
        for rank in range(self.ranks.world):
            solved |= self.ranks.told(own, by=rank)
        return [solved[e] for e in range(count)]

    def at(self, statistic: At, rank: int) -> At:
        """The statistic where `rank` has it, too."""
        if rank in statistic.ranks:
            return statistic
        if rank == BY_EXPERT:
            return self._scattered(statistic)
        if BY_EXPERT in statistic.ranks:
            return self._gathered(statistic, rank)
        source = min(statistic.ranks)
        own = here(statistic.state) if self.ranks.rank == source else None
        state = self.ranks.sent(own, source, rank)
        kept = state if self.ranks.rank == rank else statistic.state
        return At(statistic.ranks | {rank}, kept)

    def _scattered(self, statistic: At) -> At:
        holder = min(statistic.ranks)
        states = statistic.state.states if holder == self.ranks.rank else ()
        count = self.ranks.told(len(states), by=holder)
        own = [
            self.ranks.sent(states[e] if states else None, holder, self.expert_of(e))
            for e in range(count)
        ]
        return At(frozenset({BY_EXPERT}), PerExpert(own, self._each))

    def _gathered(self, statistic: At, rank: int) -> At:
        states = statistic.state.states
        whole = [self.ranks.sent(s, self.expert_of(e), rank) for e, s in enumerate(states)]
        return At(frozenset({rank}), PerExpert(tuple(whole)) if rank == self.ranks.rank else None)

    # -------------------------------------------------------------- steps
    def apply(self, stage: Stage, graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        if stage.apply is unchanged or isinstance(stage.view, Uncovered):
            return apply(stage, graph, {})[0], stats
        turns_of = self._turns(stage, graph)
        given = dict(stats)
        for at, selected in sorted(turns_of.items()):
            needed = _read_by(stage, replace(graph, selected=selected), given)
            for key in sorted(needed, key=named):
                if isinstance(given[key], At):
                    given[key] = self.at(given[key], at)
        # what others have alone is theirs to move
        own = {
            key: s.state if isinstance(s, At) else s
            for key, s in given.items()
            if not isinstance(s, At) or s.ranks & {self.ranks.rank, BY_EXPERT}
        }
        if BY_EXPERT in turns_of:  # together, expert by expert
            chosen = replace(graph, selected=turns_of.pop(BY_EXPERT))
            after, _ = apply(stage, chosen, own)
            graph = replace(after, selected=graph.selected)
        made: tuple[Any, Any, Any] | None = None
        kept: Mapping[Key, Any] = {}
        leading = self._leading(stage, graph, given)
        own = own if leading is None else {**own, SAMPLES: leading}
        dense = gathered(graph, turns_of, self.ranks.rank)
        if self.ranks.rank in turns_of:
            before = replace(self._seen(stage, dense), selected=turns_of[self.ranks.rank])
            after, kept = apply(stage, before, own)
            made = made_by(before, after, own, kept)
            if leading is not None:
                leading.done()
        elif leading is not None:
            leading.follow()
        del dense
        for rank in sorted(turns_of):
            changes, moved, gone = self.ranks.told(made, by=rank)  # type: ignore[misc]
            graph = changed(graph, changes)
            keys = {named(key): key for key in given}
            for name in moved:
                key = keys[name]
                state = kept[key] if rank == self.ranks.rank else None
                given[key] = At(frozenset({rank}), state)
            for name in gone:
                del given[keys[name]]
        return graph, given

    def _seen(self, stage: Stage, graph: ModuleGraph) -> ModuleGraph:
        """The graph as a step sees it here: where ranks turn inputs at one time, weights behind
        those of others are hidden."""
        if not isinstance(stage.view, Gauged) or not is_divided(stage):
            return graph
        turned = self.owners.turns
        return hiding(graph, {s.weight for s in graph.sites if turned[s.path] != self.ranks.rank})

    def _turns(self, stage: Stage, graph: ModuleGraph) -> dict[int, frozenset[str] | None]:
        """Rank -> the sites that it runs a step on."""
        if not (isinstance(stage.view, WholeBlock) and self.is_sharded):
            return turns(stage, graph, self.owners)
        sites = [site for site in select(stage, graph).sites if not site.router]
        if stage.spec is None:  # it learns weights that are rounded, and refuses if there is none
            sites = [s for s in sites if isinstance(graph.params[s.weight or ""], QTensor)] or sites
        shapes = {site: shape_of(graph, site) for site in sites}
        found = learners(shapes, self.ranks.world, _fused(self.stages))
        return {rank: frozenset(site.path for site in own) for rank, own in found.items()}

    def _leading(self, stage: Stage, graph: ModuleGraph, stats: Stats) -> Leading | Sharing | None:
        """The samples of a step that sees the whole block, as ranks share them."""
        if not isinstance(stage.view, WholeBlock) or SAMPLES not in stats:
            return None
        self.ready()
        chosen, samples = select(stage, graph), stats[SAMPLES]
        if self.is_sharded:
            see_reference(samples, self.ranks)
            return Sharing(samples, self.ranks, chosen)
        return Leading(samples, self.ranks, chosen)


class _OneByOne(Sequence):
    """The states of all experts on rank 0, each of which is sent when all ranks ask for it."""

    def __init__(self, division: Divided, states: Sequence[Any]):
        self.division, self.states = division, states

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, expert: Any) -> Any:
        return self.division.ranks.sent(self.states[expert], self.division.expert_of(expert), 0)


class _Totals(Totals):
    """The statistics of all ranks' batches: this one adds its own, and after each of its parts all
    of them hand theirs to the owners."""

    def __init__(
        self, division: Divided, graph: ModuleGraph, keys: set[Key], experts: slice | None
    ):
        super().__init__(graph, keys, experts, division.size, division.offload)
        self.division, self.ranks, self.parts = division, division.ranks, division.parts
        self.part = {}  # one batch too goes to its owner before it is added
        if division.offload is not None:
            self.totals = Away(division.offload)
        self.own = self.parts.numbers(self.ranks.rank, self.ranks.world)
        asked = sorted(keys, key=named)
        _refuse_alike(asked)
        self.readers = {key: read_by(division.stages, key, graph, division.owners) for key in asked}
        self.rounds = 0
        self.rates: dict[str, set[Fraction]] = {source: set() for source, _ in keys}

    @property
    def stats(self) -> dict[Key, Any]:
        while self.rounds * self.ranks.world < self.parts.count:
            self._end_part()
        self._refuse_uneven()
        found = {key: self._given_out(key, at) for key, at in self.readers.items()}
        return {key: at for key, at in found.items() if at is not None}

    def add(self, *of_batch: Any) -> None:
        super().add(*of_batch)
        last = self.batches == len(self.own)
        if last and self.batches % self.size:
            self._end_part()

    def _end_part(self) -> None:
        first = self.rounds * self.ranks.world
        self.rounds += 1
        for key, readers in self.readers.items():
            for part in range(first, min(first + self.ranks.world, self.parts.count)):
                source = part % self.ranks.world
                state = self.part.get(key) if source == self.ranks.rank else None
                if readers == [BY_EXPERT]:
                    self._to_experts(key, state, source)
                    continue
                state = self.ranks.sent(state, source, readers[0])
                if state is not None:
                    self._combine(self.totals, key, state)
        self.part = {}

    def _to_experts(self, key: Key, state: PerExpert | None, source: int) -> None:
        """The states of experts to those that own them."""
        first = 0 if self.experts is None else self.experts.start
        for rank in range(self.ranks.world):
            theirs = None
            if state is not None:
                owned = [
                    s if self.division.expert_of(first + e) == rank else None
                    for e, s in enumerate(state.states)
                ]
                theirs = tuple(owned)
            theirs = self.ranks.sent(theirs, source, rank)
            if theirs is not None:
                self._combine(self.totals, key, PerExpert(theirs))

    def _given_out(self, key: Key, readers: list[int]) -> At | None:
        """The total where it is read."""
        if readers == [BY_EXPERT]:
            own = self._total(key)
            return self.division.by_expert(key, own.states if own is not None else ())
        first, *others = readers
        if not self.ranks.told(key in self.totals, by=first):
            return None
        for rank in others:
            own = self.totals[key] if self.ranks.rank == first else None
            sent = self.ranks.sent(own, first, rank)
            if self.ranks.rank == rank:
                self.totals[key] = sent
            del own, sent
        return At(frozenset(readers), self._total(key))

    def _total(self, key: Key) -> Any:
        """The total, as it lies where it is offloaded; None where this rank has none."""
        if key not in self.totals:
            return None
        return self.totals.lying(key) if isinstance(self.totals, Away) else self.totals[key]

    # -------------------------------------------------------------- numbers of tokens
    def _before(self, source: str, count: int) -> int:
        batch = self.own[self.batches]
        rate = Fraction(count, self.division.tokens[batch])
        self.rates[source].add(rate)
        return int(rate * sum(self.division.tokens[:batch]))

    def _refuse_uneven(self) -> None:
        """Refuse an input whose rows are not in one proportion to the tokens of its batch: other
        ranks' rows cannot be numbered then."""
        rates = {source: sorted(map(str, rates)) for source, rates in self.rates.items()}
        for other in self.ranks.all_told(rates):
            for source, of_source in other.items():
                rates[source] = sorted({*rates[source], *of_source})
        uneven = next((source for source, of_source in rates.items() if len(of_source) > 1), None)
        if uneven is not None:
            shares = " and ".join(rates[uneven])
            raise QlabError(
                f"the rows that reach {where(self.graph, uneven)} are {shares} of the tokens of a "
                "batch, and ranks number them by one share; run it in one process"
            )


# ------------------------------------------------------------------ who owns which site
def _read_by(stage: Stage, graph: ModuleGraph, given: Stats) -> set[Key]:
    """The statistics that a step reads of what is selected, and those that it moves."""
    keys = keys_of(stage, graph)
    if isinstance(stage.view, Gauged):
        sources = {site.source for site in select(stage, graph).sites}
        keys |= {key for key in given if key[0] in sources}
    return keys & given.keys()


def _fused(stages: Transform) -> bool:
    return any(stage.spec is not None and stage.spec.outer for stage in stages)


def _refuse_alike(keys: Sequence[Key]) -> None:
    """Refuse two statistics of one input that ranks could not tell apart."""
    names = [named(key) for key in keys]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise QlabError(
            f"two statistics of {twice[0]} have the name {twice[1]!r}, by which ranks tell them "
            "apart; give each a name of its own"
        )
