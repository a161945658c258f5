"""Counters for operators, as Prometheus reads them."""

import time
from collections.abc import Sequence

from fastapi import Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qlab.serving.worker import Answer, Piece, Worker

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """What happened since the server began.

    Args:
        worker: what replies.
    """

    def __init__(self, worker: Worker):
        self._registry = CollectorRegistry()
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were answered")
        self._new_tokens = self._counter("new_tokens", "Tokens that were written")
        self._ended = Counter(
            "qlab_requests", "Replies that ended", ["finish"], registry=self._registry
        )
        self._first = Histogram(
            "qlab_first_token_seconds",
            "From the first sight of a request to its first token",
            buckets=SECONDS,
            registry=self._registry,
        )
        pages = worker.pipe.engine.pages
        self._gauge("requests_running", "Replies under way", lambda: len(worker.answers))
        self._gauge("waiting_tokens", "Tokens they may have", lambda: worker.waiting_tokens)
        self._gauge("pages_free", "Pages that no request reads", lambda: pages.available)
        self._gauge("pages", "Pages of the cache", lambda: pages.count)
        compiled = worker.pipe.engine.compiled
        self._gauge("graphs", "Graphs that were compiled", lambda: compiled.graphs)
        self._gauge("recompiles", "Graphs after the warm-up", lambda: compiled.recompiles)

    def _counter(self, name: str, says: str) -> Counter:
        return Counter(f"qlab_{name}", says, registry=self._registry)

    def _gauge(self, name: str, says: str, value) -> None:
        Gauge(f"qlab_{name}", says, registry=self._registry).set_function(value)

    def step(self, pieces: Sequence[tuple[Answer, Piece]]) -> None:
        """Count what a step wrote."""
        for answer, piece in pieces:
            request = answer.asked.request
            self._new_tokens.inc(piece.written)
            if piece.written and len(request.drawn) == piece.written:
                self._first.observe(time.monotonic() - answer.asked_at)
            if piece.finish is not None:
                self._prompt_tokens.inc(len(request.prompt))
                self._ended.labels(piece.finish).inc()

    def text(self) -> Response:
        """All of it, in Prometheus's format."""
        return Response(generate_latest(self._registry), media_type="text/plain; version=0.0.4")
