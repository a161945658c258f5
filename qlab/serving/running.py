"""The server as a process: a socket, and an end that leaves nobody waiting."""

import asyncio
import signal
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import uvicorn

from qlab.serving.app import Server, application

GRACE = 5.0  # seconds beyond the drain, for answers that were aborted to be sent


def run(server: Server, drain: float, **listening: Any) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Then nobody new is let in. Requests under way have `drain` seconds; the rest end with the finish
    reason `abort`.

    Args:
        server: the application's.
        drain: seconds.
        listening: host, port and certificates, as uvicorn takes them.

    Raises:
        SystemExit: no step can be computed any more.
    """
    config = uvicorn.Config(
        application(server),
        log_level="warning",
        timeout_graceful_shutdown=int(drain + GRACE),
        **listening,
    )
    Draining(config, server, drain).run()
    if server.worker.ended is not None:
        raise server.worker.ended


class Draining(uvicorn.Server):
    """uvicorn's server, whose signals drain it first.

    Args:
        config: of uvicorn.
        server: whose requests are drained.
        drain: seconds.
    """

    def __init__(self, config: uvicorn.Config, server: Server, drain: float):
        super().__init__(config)
        self._server, self._drain = server, drain
        server.worker.on_end = self.begin_to_end

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Drain on a signal, and end as if there had been none."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.begin_to_end)
        yield

    def begin_to_end(self) -> None:
        """Let nobody in, and abort what is left when the time is over. A second signal aborts at
        once."""
        if self._server.is_draining:
            self._server.worker.cancel_all()
        self._server.is_draining = self.should_exit = True
        asyncio.get_running_loop().call_later(self._drain, self._server.worker.cancel_all)
