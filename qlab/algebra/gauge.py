"""A gauge: what acts on a wire and is undone by its neighbours, so that the function stays.

    x W^T = (x M) (W M^-T)^T

M belongs to the wire's group (`qlab.algebra.groups`). The readers take M^-1 with their weights. The
producer takes M with its own, or M stays at the input as an operation at run time. AWQ's and
SmoothQuant's scales, and the rotations R2 and R4, are gauges.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.absorb import absorb
from qlab.algebra.called import called
from qlab.algebra.crossed import standing_between
from qlab.algebra.folds import Fold
from qlab.algebra.graph import ModuleGraph, Site, by_origin, by_source
from qlab.algebra.groups import Diagonal, General, Group, Nothing, groups, writers
from qlab.algebra.online import MatMul
from qlab.algebra.reparametrize import is_scale, reparametrize
from qlab.algebra.rounding import Copies
from qlab.algebra.scores import Scores, scores
from qlab.algebra.statistic import PerExpert
from qlab.algebra.stats import Need, Stats, name_of, named
from qlab.algebra.transform import Stage, Transform, at, chain
from qlab.algebra.views import Gauged
from qlab.algebra.wires import full_name
from qlab.errors import QlabError

INPUT, EVERY, SCORES = ":in", "*", ":(query|key)"
MADE = (":value", ":out")  # names of what inputs are made of


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input of a turn: the weights [o, k] in fp32 that it meets, and its statistics by name,
    as copies."""

    weights: Sequence[Tensor]
    stats: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A wire that is to be turned.

    name: the wire's full name, that of its first reader's input, or of the keys. group: what its
    producer takes, or what queries undo. graph: the segment. sites: the readers, without routers,
    which turn with them; keys have none. stats: (source, statistic) -> state. size: the channels k
    of the wire.
    """

    name: str
    group: Group | Scores
    graph: ModuleGraph
    sites: tuple[Site, ...]
    stats: Stats
    needs: frozenset[Need]
    size: int

    @property
    def apart(self) -> bool:
        """Whether every expert makes its own input, and has a scale [1, k] of its own."""
        fold = self.fold
        return fold is not None and len(self.graph.params[fold.producer.weight].shape) == 3

    @property
    def writes(self) -> bool:
        """Whether a reader's output reaches what leaves the segment without another site between:
        it writes to the residual stream."""
        return any(site.path in writers(self.graph.code) for site in self.sites)

    @property
    def fold(self) -> Fold | None:
        """Where scales of the channels go, if the producer takes any."""
        return None if isinstance(self.group, Nothing | Scores) else self.group.fold

    def sources(self) -> list[Source]:
        """The inputs that the readers see: one per source, and one per expert of a mixture; of an
        attention its keys and its queries, which meet no weights."""
        return list(self._sources())

    def _sources(self) -> Iterator[Source]:
        if isinstance(self.group, Scores):
            for wire in (self.group.key, self.group.query):
                states = {need: self.stats[wire.key, need] for need in self.needs}
                yield Source(weights=[], stats=_named(states, wire.key))
        for source, group in by_source(self.sites).items():
            states = {need: self.stats[source, need] for need in self.needs}
            if group[0].route is None:
                yield Source(
                    weights=[self.graph.weight_ok(s) for s in group],
                    stats=_named(states, self.name),
                )
                continue
            experts = self.graph.params[group[0].weight or ""].shape[0]
            for e in range(experts):
                of_expert = {
                    need: state.states[e] if isinstance(state, PerExpert) else state
                    for need, state in states.items()
                }
                weights = [self.graph.weight_ok(s, e) for s in group]
                yield Source(weights=weights, stats=_named(of_expert, self.name))

    def stored(self, m: Tensor) -> Tensor:
        """The scales [k] or [e, 1, k] nearest to m that the producer holds exactly: the same where
        channels share one of its channels, and rounded as its leaf is written."""
        if self.fold is None:
            return m
        rows = [m] if m.ndim == 1 else [m[e, 0] for e in range(len(m))]
        tied = [self.fold.tie(row) for row in rows]
        return self.fold.stored(self.graph, tied[0] if m.ndim == 1 else torch.stack(tied)[:, None])


@dataclass(frozen=True, kw_only=True)
class Element:
    """What acts on a wire: M, its inverse (None: it is computed), and notes for the report.

    M: scales [k] or [e, 1, k]; matrices [d, d] (the same for every head or block of d channels),
    [h, d, d] (one per head of the producer), or [k, k].
    """

    M: Tensor
    M_inv: Tensor | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


Choose = Callable[[Turn], "Tensor | Element | None"]


def _named(states: Mapping[Need, Any], wire: str) -> Copies:
    by_name = {name_of(need): state for need, state in states.items()}
    return Copies(by_name, f"{wire}: ")


def gauge(
    name: str,
    wires: str,
    choose: Choose,
    needs: Iterable[Need] = frozenset(),
    online: bool = False,
    detail: str = "",
) -> Transform:
    """Turn the inputs of sites and undo it: x -> x M, folded into what produces x, and
    W -> W M^-T in every site that reads it.

    What an input is made of is another name of it: the values of an attention (`*:value`), the
    output of the linear or norm before (`*.up_proj:out`); what stays at run time stays at the
    input. Keys of attentions turn too: k -> k M,
    which queries undo, q -> q M^-T, both at run time.

    The function stays, which the driver checks on one batch to 1e-4. Routers turn with the sites
    that share their input.

    Args:
        name: the stage's name in plans, reports and errors.
        wires: a pattern over full names of inputs: a glob (`*.o_proj:in`), or "re:" and a regular
            expression. It names all readers of a wire, or the stage is refused. Values and outputs
            end in `:value` and `:out`. Of attentions it names queries and keys, and ends in
            `:(query|key)`.
        choose: gets a Turn (the wire's group, its readers' weights and statistics) and returns M,
            an Element with M and its inverse, or None to leave the wire as it is. Scales of
            channels [k] fit the groups Diagonal and General, matrices [d, d] and [h, d, d] General,
            and all of them Scores.
        needs: statistics of the inputs (see `each_weight`).
        online: what the producer does not take stays at the input as an operation at run time, so
            that every wire takes matrices [k, k], and [n, n] for every n neighbouring channels.
        detail: settings in words, for plans and reports.

    Returns:
        A transform of two stages, the gauge and absorb; of queries and keys the gauge alone.

    Raises:
        QlabError: the pattern is for no inputs. When it runs: an M that is not of the wire's group,
            by the operation that stands in the way, and an M_inv that is not its inverse.

    Example:
        >>> import qlab, torch
        >>> flip = qlab.gauge("flip", "*.o_proj:in", lambda turn: -torch.eye(turn.group.size))
        >>> [(stage.name, str(stage.scope)) for stage in flip]
        [('flip', '*.o_proj'), ('absorb', 'every site')]
    """
    needs = named(needs)
    if wires.endswith(SCORES):
        return _of_scores(name, wires, choose, needs, online, detail)
    if not wires.endswith((INPUT, *MADE)):
        raise QlabError(
            f"the gauge {name!r} is for wires {wires!r}; it turns inputs of sites, such as "
            "'*.down_proj:in' or '*:in', and queries with keys, 're:.*:(query|key)'; values of "
            "heads turn at the input of what reads them"
        )

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        for origin, sharing in by_origin(graph.sites).items():
            readers = tuple(site for site in sharing if not site.router)
            if readers:
                turn = _turn(graph, stats, origin, readers, needs)
                graph, stats = _turned(name, graph, stats, turn, choose, online)
        return graph, stats

    left = (MatMul(torch.eye(2, dtype=torch.float32)),) if online else ()
    made_of = wires if wires.endswith(MADE) else None
    stage = Stage(name, needs, run, Gauged(left=left, made_of=made_of), detail=detail)
    pattern = wires.removesuffix(INPUT)
    turning = (stage,) if made_of or pattern == EVERY else at(pattern, (stage,))
    return chain(turning, absorb())


def _of_scores(
    name: str, wires: str, choose: Choose, needs: frozenset[Need], online: bool, detail: str
) -> Transform:
    """The gauge of queries and keys, which stays at run time."""
    if not online:
        raise QlabError(
            f"the gauge {name!r} is for wires {wires!r}, where nothing before takes a change of "
            "basis; leave it at run time with online=True"
        )

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        for group in scores(graph, name):
            turn = Turn(
                name=full_name(graph.path, group.key.name),
                group=group,
                graph=graph,
                sites=(),
                stats=stats,
                needs=needs,
                size=group.key.channels,
            )
            element = _chosen(name, turn, choose)
            if element is None:
                continue
            if not group.takes(element.M):
                raise QlabError(_refusal(name, turn, element.M, "return None"))
            graph = group.turned(graph, element.M.clone(), _inverse_of(name, turn, element))
            moved = {group.query.key, group.key.key}
            stats = {place: state for place, state in stats.items() if place[0] not in moved}
        return graph, stats

    left = (MatMul(torch.eye(2, dtype=torch.float32)),)
    return (Stage(name, needs, run, Gauged(wires, left), detail=detail),)


def _turn(
    graph: ModuleGraph, stats: Stats, origin: str, readers: tuple[Site, ...], needs: frozenset[Need]
) -> Turn:
    return Turn(
        name=full_name(graph.path, f"{readers[0].path}{INPUT}"),
        group=_group(graph, origin),
        graph=graph,
        sites=readers,
        stats=stats,
        needs=needs,
        size=graph.weight_ok(readers[0]).shape[-1],
    )


def _group(graph: ModuleGraph, origin: str) -> Group:
    """What may act on an input: the program's group, or nothing behind an operation on the way."""
    standing = standing_between(graph, origin)
    if standing is None:
        return groups(graph.code)[origin]
    where = full_name(graph.path, standing)
    return Nothing(f"an operation on {where} stands between; put it there behind this step")


def _turned(
    name: str, graph: ModuleGraph, stats: Stats, turn: Turn, choose: Choose, online: bool
) -> tuple[ModuleGraph, Stats]:
    """The graph after a turn, and its statistics. M waits at the inputs for `absorb`."""
    element = _chosen(name, turn, choose)
    if element is None:
        return graph, stats
    M, M_inv = _at_input(name, turn, element, online)
    graph, stats = reparametrize(graph, stats, turn.sites[0].origin, M, M_inv)
    if element.notes:
        notes = dict(graph.notes)
        for site in turn.sites:
            notes[site.path] = {**notes.get(site.path, {}), **element.notes}
        graph = replace(graph, notes=notes)
    return graph, stats


def _chosen(name: str, turn: Turn, choose: Choose) -> Element | None:
    """What a step chose for a wire. Refuses what is no finite tensor."""
    chosen = called(f"{turn.name}: what {name} chooses", choose, turn)
    if chosen is None:
        return None
    element = chosen if isinstance(chosen, Element) else Element(M=chosen)
    if not isinstance(element.M, Tensor) or not element.M.isfinite().all():
        raise QlabError(
            f"the gauge {name!r} chose {_said(element.M)} for {turn.name}; return a finite tensor"
        )
    return element


def _inverse_of(name: str, turn: Turn, element: Element) -> Tensor:
    """The inverse, as it was given or computed."""
    if element.M_inv is not None:
        return element.M_inv
    return 1 / element.M if is_scale(element.M) else _inverse(name, turn, element.M)


def _refusal(name: str, turn: Turn, M: Tensor, instead: str) -> str:
    """Why an M is not of the wire's group, in words."""
    return (
        f"the gauge {name!r} chose {_said(M)} for {turn.name}, and {_allowed(turn)}; choose such "
        f"an element, {instead}"
    )


def _at_input(name: str, turn: Turn, element: Element, online: bool) -> tuple[Tensor, Tensor]:
    """M and its inverse as the input meets them. Refuses an M that is not of the wire's group."""
    M, M_inv, group = element.M, _inverse_of(name, turn, element), turn.group
    if isinstance(group, General) and not is_scale(M):
        if M.ndim == 3 and M.shape == M_inv.shape and len(M) == len(group.heads_hd):
            M, M_inv = group.of_input(M), group.of_input(M_inv)
        if group.of_producer(M) is not None:
            return M, M_inv
    if is_scale(M) and turn.fold is not None and _takes(turn, turn.fold, M):
        return M, M_inv
    if not online:
        instead = "return None, or leave it at run time with online=True"
        raise QlabError(_refusal(name, turn, M, instead))
    return M, M_inv


def _takes(turn: Turn, fold: Fold, m: Tensor) -> bool:
    """Whether a producer takes these scales: positive ones, the same for channels that share one of
    its channels, and one per expert only of experts."""
    if m.shape[-1] != turn.size or not (m > 0).all() or (m.ndim == 3) != turn.apart:
        return False
    rows = [m] if m.ndim == 1 else [m[e, 0] for e in range(len(m))]
    return all(torch.allclose(fold.tie(row), row, rtol=1e-5) for row in rows)


def _inverse(name: str, turn: Turn, M: Tensor) -> Tensor:
    try:
        return torch.linalg.inv(M.double()).to(M.dtype)
    except RuntimeError as error:
        raise QlabError(
            f"the gauge {name!r} chose {_said(M)} for {turn.name}, which has no inverse; give an "
            "invertible matrix"
        ) from error


def _allowed(turn: Turn) -> str:
    """What may act on the wire, in words."""
    group = turn.group
    if isinstance(group, Scores):
        h, d = group.key.heads, group.size
        return f"queries undo matrices [{d}, {d}] or [{h}, {d}, {d}] alone, or scales [{h * d}]"
    if isinstance(group, Nothing):
        return f"nothing may act there that its producer undoes ({group.reason})"
    if isinstance(group, Diagonal):
        form = f"{'[e, 1, ' if turn.apart else '['}{turn.size}]"
        return f"its producer takes positive scales {form} alone, tied where channels are shared"
    h, d = group.heads_hd.shape
    return f"its producer takes invertible matrices [{h}, {d}, {d}] or [{d}, {d}] alone, or scales"


def _said(M: Any) -> str:
    if not isinstance(M, Tensor):
        return f"a {type(M).__name__}"
    kind = "scales" if is_scale(M) else "a matrix" if M.ndim == 2 else "matrices"
    finite = "" if M.isfinite().all() else " with NaN or Inf"
    return f"{kind} {tuple(M.shape)}{finite}"
