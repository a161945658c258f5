"""What the next step of an engine computes, as a function of values: parts of prompts, rows that
get one token each, and who has to give its pages back.

A request is its tokens, the pages that it holds, and how many of its tokens have keys and values in
them. It is ready when one token has none yet: that token gives the next one. The request that came
first goes first, and the youngest gives its pages back. Parts of a prompt end at multiples of
`chunk` of the request's own tokens, so that what else runs moves no boundary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Place:
    """What the schedule has to know of a request.

    request: its number; those that came first have smaller ones. length: how many tokens it has.
    done: for how many of them keys and values are written. pages: how many pages it holds. alone:
    how many of these nobody else reads. is_uncut: whether its prompt is one part.
    """

    request: int
    length: int
    done: int
    pages: int
    alone: int
    is_uncut: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether its last token alone has no keys and values yet."""
        return self.length - self.done == 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """rows: how many requests hold pages at a time. tokens: how many tokens of prompts a step
    computes, at least one part. chunk: tokens of a part. page: tokens of a page."""

    rows: int
    tokens: int
    chunk: int
    page: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """The tokens begin:end of a prompt."""

    request: int
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """preempted: requests that give all their pages back, and begin anew later. grown: request ->
    how many pages it takes. parts: of prompts, in the order in which they run. rows: requests that
    get one token each, at once."""

    preempted: tuple[int, ...]
    grown: Mapping[int, int]
    parts: tuple[Part, ...]
    rows: tuple[int, ...]


def plan(places: Sequence[Place], free: int, limits: Limits) -> Step:
    """The next step. free: how many pages nobody reads.

    A request whose pages would not fit waits, with all that came after it and would need some. The
    oldest one waits for nothing but a step in which the others have given theirs back.
    """
    order = sorted(places, key=lambda place: place.request)
    draft = _Draft(order, free, limits)
    for place in order:
        if place.request in draft.preempted:
            continue
        if place.is_ready:
            draft.add_row(place)
        else:
            draft.add_parts(place)
    return Step(
        preempted=tuple(draft.preempted),
        grown={request: count for request, count in draft.grown.items() if count},
        parts=tuple(draft.parts),
        rows=tuple(draft.rows),
    )


class _Draft:
    """A step while it is put together."""

    def __init__(self, order: Sequence[Place], free: int, limits: Limits):
        self.order, self.free, self.limits = order, free, limits
        self.tokens = limits.tokens
        self.holding = {place.request for place in order if place.pages}
        self.preempted: list[int] = []
        self.grown: dict[int, int] = {}
        self.parts: list[Part] = []
        self.rows: list[int] = []
        self.is_full = False

    def add_row(self, place: Place) -> None:
        if self._room(place, place.length):
            self.rows.append(place.request)

    def add_parts(self, place: Place) -> None:
        begin = place.done
        while begin < place.length and (self.tokens > 0 or not self.parts):
            part = place.length if place.is_uncut else self.limits.chunk
            end = min(place.length, (begin // part + 1) * part)
            if not self._room(place, end):
                return
            self.parts.append(Part(request=place.request, begin=begin, end=end))
            self.tokens -= end - begin
            begin = end

    def _room(self, place: Place, tokens: int) -> bool:
        """Whether a request gets the pages for so many of its tokens. Younger ones give theirs
        back for it."""
        held = place.pages + self.grown.get(place.request, 0)
        missing = -(-tokens // self.limits.page) - held
        if missing <= 0:
            return True
        if self.is_full:
            return False
        while self._lacks(place, missing) and self._preempt_younger_than(place):
            pass
        self.is_full = self._lacks(place, missing)
        if not self.is_full:
            self.free -= missing
            self.grown[place.request] = self.grown.get(place.request, 0) + missing
            self.holding.add(place.request)
        return not self.is_full

    def _lacks(self, place: Place, missing: int) -> bool:
        """Whether there are too few pages for a request, or too many that hold some."""
        others = len(self.holding - {place.request})
        return self.free < missing or others >= self.limits.rows

    def _preempt_younger_than(self, place: Place) -> bool:
        """Whether there was one that held pages."""
        for other in reversed(self.order):
            if other.request <= place.request:
                return False
            if other.pages and other.request not in self.preempted:
                self.preempted.append(other.request)
                self.holding.discard(other.request)
                self.free += other.alone
                return True
        return False
