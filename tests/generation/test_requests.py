"""Laws of the schedule and of the pages, on random requests and without a model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qlab.generation.pages import NOBODY, Pages
from qlab.generation.schedule import Limits, Place, plan

MANY = settings(max_examples=60)
ALPHABET = st.integers(0, 1)  # so that prompts begin alike


class Simulated:
    """A request without a model: its new tokens are 1s. wanted: how many of them."""

    def __init__(self, number, prompt, wanted, cancelled_at):
        self.number, self.tokens, self.wanted = number, list(prompt), wanted
        self.cancelled_at = cancelled_at
        self.length, self.pages, self.done, self.parts = len(prompt), [], 0, []
        self.ended = 0

    @property
    def is_over(self):
        return len(self.tokens) - self.length == self.wanted


def release(pages, request):
    pages.remember(request.tokens[: request.done], request.pages)
    pages.drop(request.pages)
    request.pages, request.done = [], 0


def check_step(step, requests, pages, limits):
    """What a step may do: parts follow each other and end at multiples, nobody who was preempted
    runs, and nobody runs without pages for all tokens."""
    alive = {r.number: r for r in requests}
    assert len(step.rows) == len(set(step.rows)) <= limits.rows
    assert not {*step.preempted} & ({*step.rows} | {p.request for p in step.parts} | {*step.grown})
    at = {number: r.done for number, r in alive.items()}
    computed = 0
    for part in step.parts:
        request = alive[part.request]
        assert part.begin == at[part.request] < part.end <= len(request.tokens)
        assert part.end % limits.chunk == 0 or part.end == len(request.tokens)
        assert part.begin == 0 or part.begin % limits.chunk == 0 or part.begin % limits.page == 0
        at[part.request], computed = part.end, computed + part.end - part.begin
        assert len(request.pages) + step.grown.get(part.request, 0) >= pages.needed(part.end)
    assert computed < limits.tokens + limits.chunk
    for number in step.rows:
        request = alive[number]
        assert len(request.tokens) - request.done == 1
        assert len(request.pages) + step.grown.get(number, 0) == pages.needed(len(request.tokens))
    assert sum(step.grown.values()) <= pages.available + sum(
        pages.alone(alive[number].pages) for number in step.preempted
    )


def run_step(step, alive, pages):
    """Do what a step says, as an engine does."""
    for number in step.preempted:
        release(pages, alive[number])
    for number, count in step.grown.items():
        alive[number].pages += pages.take(count)
    for part in step.parts:
        request = alive[part.request]
        request.done = part.end
        if part.end == len(request.tokens):
            pages.remember(request.tokens, request.pages)
            request.tokens.append(1)
    for number in step.rows:
        alive[number].done += 1
        alive[number].tokens.append(1)


@MANY
@given(
    arrivals=st.lists(
        st.tuples(
            st.lists(ALPHABET, min_size=1, max_size=20),
            st.integers(1, 8),
            st.integers(0, 10),
            st.none() | st.integers(0, 12),
        ),
        max_size=8,
    ),
    limits=st.builds(
        Limits,
        rows=st.integers(1, 4),
        tokens=st.integers(1, 12),
        chunk=st.integers(1, 7),
        page=st.integers(1, 4),
    ),
    spare=st.integers(0, 6),
    reuse=st.booleans(),
)
def test_every_request_ends_once_and_every_page_comes_back(arrivals, limits, spare, reuse):
    longest = max((len(prompt) + wanted for prompt, wanted, *_ in arrivals), default=1)
    pages = Pages(-(-longest // limits.page) + spare, limits.page, reuse)
    requests = [
        (Simulated(i, prompt, wanted, cancelled), at)
        for i, (prompt, wanted, at, cancelled) in enumerate(arrivals)
    ]
    waiting = list(requests)
    alive: list[Simulated] = []
    for t in range(400):
        alive += [r for r, at in waiting if at <= t]
        waiting = [(r, at) for r, at in waiting if at > t]
        for r in [
            r for r in alive if r.is_over or (r.cancelled_at is not None and r.cancelled_at < t)
        ]:
            release(pages, r)
            r.ended += 1
            alive.remove(r)
        if not alive and not waiting:
            break
        for r in sorted(alive, key=lambda r: r.number)[: limits.rows]:
            if not r.pages and not r.done:
                r.pages = pages.prefix(r.tokens)
                r.done = len(r.pages) * limits.page
        places = [
            Place(
                request=r.number,
                length=len(r.tokens),
                done=r.done,
                pages=len(r.pages),
                alone=pages.alone(r.pages),
            )
            for r in alive
        ]
        step = plan(places, pages.available, limits)
        check_step(step, alive, pages, limits)
        run_step(step, {r.number: r for r in alive}, pages)
    assert [r.ended for r, _ in requests] == [1] * len(requests)
    assert all(r.is_over or r.cancelled_at is not None for r, _ in requests)
    assert pages.available == pages.count


def test_the_oldest_goes_first_and_the_youngest_gives_its_pages_back():
    limits = Limits(rows=3, tokens=8, chunk=4, page=2)
    old = Place(request=1, length=5, done=4, pages=2, alone=2)
    young = Place(request=2, length=4, done=3, pages=2, alone=2)
    youngest = Place(request=3, length=9, done=4, pages=2, alone=2)
    step = plan([youngest, young, old], 0, limits)
    assert (step.preempted, dict(step.grown), step.rows, step.parts) == ((3,), {1: 1}, (1, 2), ())


def test_pages_that_others_read_too_are_not_counted_as_free():
    limits = Limits(rows=3, tokens=8, chunk=4, page=2)
    old = Place(request=1, length=5, done=4, pages=2, alone=0)
    young = Place(request=2, length=5, done=4, pages=3, alone=0)
    step = plan([old, young], 0, limits)
    assert (step.preempted, dict(step.grown), step.rows) == ((2,), {}, ())


class Readers(RuleBasedStateMachine):
    """Pages under any sequence of what requests do with them."""

    def __init__(self):
        super().__init__()
        self.pages = Pages(6, 2)
        self.reads: list[tuple[list[int], list[int]]] = []

    @rule(tokens=st.lists(ALPHABET, min_size=1, max_size=9))
    def begin(self, tokens):
        known = self.pages.prefix(tokens)
        assert len(known) * 2 < len(tokens)
        missing = self.pages.needed(len(tokens)) - len(known)
        if missing > self.pages.available:
            self.pages.drop(known)
            return
        taken = self.pages.take(missing)
        assert not {*taken} & {page for _, read in self.reads for page in read} | {*known} & {
            *taken
        }
        self.reads.append((tokens, known + taken))

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def remember(self, data):
        self.pages.remember(*data.draw(st.sampled_from(self.reads)))

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def end(self, data):
        read = data.draw(st.sampled_from(self.reads))
        self.reads.remove(read)
        self.pages.drop(read[1])

    @invariant()
    def readers_are_counted(self):
        read = [page for _, pages in self.reads for page in pages]
        assert NOBODY not in read
        assert self.pages.available == self.pages.count - len({*read})
        lone = {page for page in read if read.count(page) == 1}
        assert self.pages.alone(sorted({*read})) == len(lone)

    @invariant()
    def who_shares_a_page_shares_all_tokens_up_to_its_end(self):
        for tokens, pages in self.reads:
            for others, read in self.reads:
                for i in range(min(len(pages), len(read))):
                    if pages[i] == read[i]:
                        assert tokens[: 2 * i + 2] == others[: 2 * i + 2]


TestReaders = pytest.mark.filterwarnings("ignore")(Readers.TestCase)
TestReaders.settings = MANY
