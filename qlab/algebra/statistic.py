"""A statistic of what reaches a wire, and the same of every expert's own tokens.

A statistic is a monoid: each batch is lifted to a state, and states are combined in any order. When
the inputs become x @ M, the state is transported instead of being observed again. Those that have
names are in `qlab.algebra.stats`.

Legend: x_nk is n tokens by k channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.experts import rows_of


@dataclass(frozen=True)
class Observation:
    """The inputs x_nk of one source in one batch, and the keys [n] of its tokens (sample * length +
    position).

    ends [e]: where the rows of each expert end, if rows are sorted by expert. reference_nk: the
    same inputs in the reference model, None where those are x itself. received_n: how much
    attention every token receives (`qlab.algebra.received`), None where it is not asked for or the
    source feeds no attention. stream_no: the drift of what the output of its site is added to, the
    reference's less ours (`qlab.algebra.stream`), None likewise. segment: the path of the segment.
    """

    x_nk: Tensor
    keys: Tensor
    ends: Tensor | None = None
    reference_nk: Tensor | None = None
    received_n: Tensor | None = None
    stream_no: Tensor | None = None
    segment: str = ""


class Stat(NamedTuple):
    """A statistic of what reaches a wire, of one's own beside those that have names.

    A step that needs it is given its state by its name. It is observed in batches, whose states are
    combined; none but fp32 tensors need be held.

    Args:
        lift: observation -> state. `observation.x_nk` holds the tokens of a batch as rows.
        combine: two states -> one, associative and commutative up to fp32 rounding.
        transport: the state after x -> x * m (a vector [k]) or x @ M (a matrix [k, k]), or None if
            it has to be observed again, which is the default.
        nothing: k -> the state of k channels that no token reached, the identity of combine; by
            default None, which is combined with nothing.
        name: under which a step finds the state. The statistics of qlab go by the keys of STATS.
        into: what combine gives, in the memory of the first state, which is lost; None where there
            is no such way.
        grow: (a, observation) -> what combine(a, lift(observation)) gives, to the bit, in the
            memory of a, which is lost, without a second state; None where there is no such way.
        sums: whether combine adds states number by number.

    Example:
        >>> import qlab, torch
        >>> peak = qlab.Stat(lambda o: o.x_nk.abs().amax().float(), torch.maximum, name="peak")
        >>> def clip(W_ok, stats, spec):
        ...     return W_ok.clamp(-1, 1), {"peak": float(stats["peak"])}
        >>> (stage,) = qlab.each_weight("clip", clip, None, {peak})
        >>> [need.name for need in stage.needs]
        ['peak']
    """

    lift: Callable[[Observation], Any]
    combine: Callable[[Any, Any], Any]
    transport: Callable[[Any, Tensor], Any] = lambda state, M: None
    nothing: Callable[[int], Any] = lambda k: None
    name: str = ""
    into: Callable[[Any, Any], Any] | None = None
    grow: Callable[[Any, Observation], Any] | None = None
    sums: bool = False


class Elsewhere(ABC):
    """A state that is not in memory."""

    @abstractmethod
    def read(self) -> Any:
        """The state, read anew at each call: nobody else has it."""


def here(state: Any) -> Any:
    """The state in memory."""
    return state.read() if isinstance(state, Elsewhere) else state


def in_turn(given: Callable[[int], Any], run: Callable[[int, Any], Any], count: int) -> list[Any]:
    """run(e, given(e)) of every expert, one after the other."""
    return [run(e, given(e)) for e in range(count)]


class PerExpert(NamedTuple):
    """One state per expert, of the tokens that were routed to it. A state may be observed only when
    it is asked for. each: computes something of every expert, as `in_turn` does; where several
    processes have the states of some experts each, by whoever has them."""

    states: Sequence[Any]
    each: Callable[..., list[Any]] = in_turn


def per_expert(stat: Stat) -> Stat:
    """The statistic of every expert's own tokens. States move by a matrix [k, k] or a vector [k]
    that all experts share, or by vectors of their own [e, 1, k]."""

    def lift(o: Observation) -> PerExpert:
        nothing = lambda: _on(o.x_nk, stat.nothing(o.x_nk.shape[1]))
        parts = _by_expert(o)
        return PerExpert(tuple(stat.lift(part) if len(part.keys) else nothing() for part in parts))

    def by_growing(more: Callable[[Any, Observation], Any]) -> Callable[..., PerExpert]:
        def grow(state: PerExpert, o: Observation) -> PerExpert:
            pairs = zip(state.states, _by_expert(o))
            return PerExpert(tuple(more(s, part) if len(part.keys) else s for s, part in pairs))

        return grow

    def by(both: Callable[[Any, Any], Any]) -> Callable[[PerExpert, PerExpert], PerExpert]:
        def combine(a: PerExpert, b: PerExpert) -> PerExpert:
            pairs = zip(a.states, b.states)
            return PerExpert(
                tuple(y if x is None else x if y is None else both(x, y) for x, y in pairs)
            )

        return combine

    def move(state: PerExpert, M: Tensor) -> PerExpert | None:
        moved = [
            stat.transport(s, M[e, 0] if M.ndim == 3 else M) for e, s in enumerate(state.states)
        ]
        return None if any(s is None for s in moved) else PerExpert(tuple(moved))

    into = None if stat.into is None else by(stat.into)
    grow = None if stat.grow is None else by_growing(stat.grow)
    return Stat(lift, by(stat.combine), move, stat.nothing, into=into, grow=grow, sums=stat.sums)


def _by_expert(o: Observation) -> list[Observation]:
    """What each expert sees of an observation whose rows are sorted by expert."""
    assert o.ends is not None
    other = o.x_nk if o.reference_nk is None else o.reference_nk
    of_rows = lambda t, rows: None if t is None else t[rows]
    return [
        Observation(
            o.x_nk[rows],
            o.keys[rows],
            None,
            other[rows],
            of_rows(o.received_n, rows),
            of_rows(o.stream_no, rows),
            o.segment,
        )
        for rows in rows_of(o.ends)
    ]


def _on(like: Tensor, state: Any) -> Any:
    """The state on the device of a tensor."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(like.device), state)
