"""The thread that computes, and what its steps say to the event loop.

All that one step wrote crosses to the loop in one call. A reply is an `Answer` there: pieces, and
an end that always comes.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from qlab.errors import QlabError, first_line
from qlab.generation.pipeline import Asked, Pipeline
from qlab.generation.request import ERROR
from qlab.generation.sampling import Drawn

PIECES = 4096  # that may wait for a reader; a slower one is cut off
IDLE = 0.5  # seconds between looks at the clock when nobody asks


class Busy(QlabError):
    """Too many tokens wait already."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a step added to a reply. text: what is certain of it now. drawn: the tokens of that
    text, without those of a stop string. written: how many tokens the step wrote. finish: how it
    ended, or None. error: why it failed."""

    text: str
    drawn: tuple[Drawn, ...]
    written: int
    finish: str | None
    error: str | None


class Answer:
    """The reply to one prompt, in the event loop."""

    def __init__(self, asked: Asked):
        self.asked, self.is_ended = asked, False
        self.asked_at = time.monotonic()
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._told = self._written = 0

    @property
    def tokens(self) -> int:
        """How many tokens it may have, prompt and new."""
        request = self.asked.request
        return len(request.prompt) + request.sampling.max_tokens

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces up to the last one, whose `finish` says how the reply ended."""
        while True:
            piece = await self._pieces.get()
            yield piece
            if piece.finish is not None:
                return

    def cancel(self) -> None:
        """Stop computing it, if it has not ended."""
        self.asked.request.cancel()

    # the two below run in the thread that computes
    def new(self) -> Piece | None:
        """What was added since the last call, or None."""
        request = self.asked.request
        finish, written = request.finish, len(request.drawn) - self._written
        if not written and finish is None:
            return None
        text = self.asked.taken()
        drawn = tuple(request.drawn[self._told : self.asked.told_tokens])
        self._told, self._written = self._told + len(drawn), self._written + written
        error = None if request.error is None else f"the model failed: {first_line(request.error)}"
        self.is_ended = finish is not None
        return Piece(text=text, drawn=drawn, written=written, finish=finish, error=error)

    def failed(self, error: Exception | SystemExit) -> Piece:
        """The last piece, where a whole step failed."""
        self.is_ended = True
        said = f"a step failed: {first_line(error)}"
        return Piece(text="", drawn=(), written=0, finish=ERROR, error=said)

    def put(self, piece: Piece) -> None:
        """Hand a piece to whoever reads, in the event loop."""
        if self._pieces.qsize() >= PIECES:
            self.cancel()
        if self._pieces.qsize() < PIECES or piece.finish is not None:
            self._pieces.put_nowait(piece)


class Worker:
    """Computes what is asked in a thread of its own.

    Args:
        pipe: what replies.
        queue_tokens: how many tokens all requests may have together, prompts and new ones.
    """

    def __init__(self, pipe: Pipeline, queue_tokens: int):
        self.pipe, self.queue_tokens = pipe, queue_tokens
        # called in the event loop with what every step wrote
        self.stepped: Callable[[list[tuple[Answer, Piece]]], None] = lambda pieces: None
        self.answers: list[Answer] = []
        # why no step can be computed any more, and what is called in the event loop then
        self.ended: SystemExit | None = None
        self.on_end: Callable[[], None] = lambda: None
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._is_ending = False
        self._thread = threading.Thread(target=self._run, name="qlab", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin, in the event loop that asks."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are computed."""
        return self._thread.is_alive() and not self._is_ending

    @property
    def waiting_tokens(self) -> int:
        """Tokens that all requests may have together."""
        with self._lock:
            return sum(answer.tokens for answer in self.answers)

    def ask(self, prompt: Any, **settings: Any) -> Answer:
        """Ask for one reply. Busy where too many tokens wait."""
        answer = Answer(self.pipe.ask(prompt, **settings))
        if self.waiting_tokens + answer.tokens > self.queue_tokens and self.answers:
            answer.cancel()
            raise Busy(
                f"{self.waiting_tokens} tokens wait, and with {answer.tokens} more there would be "
                f"above {self.queue_tokens}; ask again later"
            )
        with self._lock:
            self.answers.append(answer)
        self._wake.set()
        return answer

    def cancel_all(self) -> None:
        """End every request with `abort`."""
        with self._lock:
            for answer in self.answers:
                answer.cancel()
        self._wake.set()

    def stop(self) -> None:
        """End every request and the thread."""
        self._is_ending = True
        self.cancel_all()
        self._thread.join()

    # -------------------------------------------------------------- the thread
    def _run(self) -> None:
        engine = self.pipe.engine
        while not (self._is_ending and engine.is_idle):
            if engine.is_idle:
                self._wake.wait(IDLE)
                self._wake.clear()
                self._tell()  # a reply may have ended before its answer was among the others
                continue
            try:
                engine.step()
            except (Exception, SystemExit) as error:  # nobody may wait on a dead thread
                self._send([(answer, answer.failed(error)) for answer in self._all()])
                engine.drop_all()
                if isinstance(error, SystemExit):
                    self._end(error)
            else:
                self._tell()

    def _tell(self) -> None:
        """What was added to every reply."""
        pieces = [(answer, answer.new()) for answer in self._all()]
        self._send([(answer, piece) for answer, piece in pieces if piece is not None])

    def _end(self, why: SystemExit) -> None:
        """Answer nobody any more, and let the server end."""
        self.ended, self._is_ending = why, True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.on_end)

    def _all(self) -> list[Answer]:
        with self._lock:
            return list(self.answers)

    def _send(self, pieces: list[tuple[Answer, Piece]]) -> None:
        with self._lock:
            self.answers = [answer for answer in self.answers if not answer.is_ended]
        if pieces and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, pieces)

    def _deliver(self, pieces: list[tuple[Answer, Piece]]) -> None:
        for answer, piece in pieces:
            answer.put(piece)
        self.stepped(pieces)
